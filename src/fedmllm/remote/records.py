"""Conversion between Flower's records and the bytes of `protocol.to_bytes`. A group of tensors is an ArrayRecord of its name.

This module uses NumPy only: Flower starts a process for each message to a site, and loading PyTorch would take most of its
time.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from safetensors.numpy import load, save

from fedmllm.errors import UserError
from fedmllm.remote.wire import MAX_BYTES

HEADER = "_head"
"""Name, on the wire, of the record that holds everything except the tensors; no group of tensors has this name."""


class RecordError(UserError):
    """The records are not ones that fedmllm sends."""


def pack(records: RecordDict) -> bytes:
    """One safetensors file with the header in its metadata.

    Raises RecordError for other kinds of records, for arrays that do not match their description, and for too many bytes.
    """
    try:
        header = records.config_records[HEADER]["head"]
        if not isinstance(header, str) or records.metric_records or set(records.config_records) != {HEADER}:
            raise RecordError("the message contains records that fedmllm does not send.")
        if sum(len(array.data) for arrays in records.array_records.values() for array in arrays.values()) > MAX_BYTES:
            raise RecordError("the message is longer than fedmllm sends.")
        flat: dict[str, np.ndarray[Any, Any]] = {}
        for group, arrays in records.array_records.items():
            for name, array in arrays.items():
                # Not ascontiguousarray, which would turn a scalar into an array of shape (1,).
                flat[f"{group}/{name}"] = np.asarray(array.numpy(), order="C")
        return save(flat, {"head": header})
    except RecordError:
        raise
    except Exception as error:  # whatever NumPy raises for invalid arrays: the bytes come from another machine
        raise RecordError(f"the message cannot be read ({type(error).__name__}).") from None


def unpack(content: bytes) -> RecordDict:
    """The inverse of `pack`. Raises RecordError, also for dtypes that NumPy lacks, such as bfloat16."""
    try:
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])["__metadata__"]["head"]
        groups: dict[str, dict[str, Array]] = {}
        for key, array in load(content).items():
            group, _, name = key.partition("/")
            groups.setdefault(group, {})[name] = Array(array)
        arrays = {group: ArrayRecord(named) for group, named in groups.items()}
        return RecordDict({HEADER: ConfigRecord({"head": header}), **arrays})
    except Exception as error:  # as above
        raise RecordError(f"the message cannot be created ({type(error).__name__}).") from None
