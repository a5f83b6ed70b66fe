"""Flower's records and the bytes of `protocol.to_bytes`, one into the other: a group of tensors is an ArrayRecord of its name.

NumPy alone: Flower starts a process for each message to a site, and most of its time would go into loading PyTorch.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from safetensors.numpy import load, save

from fedmllm.errors import UserError

HEAD = "_head"
"""The record that holds all but the tensors; no group of tensors has this name."""


class RecordError(UserError):
    """What arrived are no records that fedmllm sends."""


def pack(records: RecordDict) -> bytes:
    """One safetensors file, the head in its header. Raises RecordError for records of another shape, or arrays that are not
    what they say."""
    try:
        head = records.config_records[HEAD]["head"]
        if not isinstance(head, str) or records.metric_records or set(records.config_records) != {HEAD}:
            raise RecordError("the message holds other records than fedmllm's.")
        flat: dict[str, np.ndarray[Any, Any]] = {}
        for group, arrays in records.array_records.items():
            for name, array in arrays.items():
                # Not ascontiguousarray, which gives a number without a shape a shape.
                flat[f"{group}/{name}"] = np.asarray(array.numpy(), order="C")
        return save(flat, {"head": head})
    except RecordError:
        raise
    except Exception as error:  # whatever NumPy raises over bytes that are no array: they come from elsewhere
        raise RecordError(f"the message cannot be read ({type(error).__name__}).") from None


def unpack(content: bytes) -> RecordDict:
    """The inverse of `pack`. Raises RecordError, for a dtype that NumPy lacks too: bfloat16 does not travel."""
    try:
        length = int.from_bytes(content[:8], "little")
        head = json.loads(content[8 : 8 + length])["__metadata__"]["head"]
        groups: dict[str, dict[str, Array]] = {}
        for key, array in load(content).items():
            group, _, name = key.partition("/")
            groups.setdefault(group, {})[name] = Array(array)
        arrays = {group: ArrayRecord(named) for group, named in groups.items()}
        return RecordDict({HEAD: ConfigRecord({"head": head}), **arrays})
    except Exception as error:  # as above
        raise RecordError(f"the message cannot be made ({type(error).__name__}).") from None


__all__ = ["HEAD", "RecordError", "pack", "unpack"]
