"""A Job or a Reply as Flower's RecordDict: a group of tensors is an ArrayRecord, the rest one JSON text in a ConfigRecord."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedmllm.remote.protocol import Job, ProtocolError, Reply, arrays
from fedmllm.tensors import State, Tensors

HEAD = "fedmllm"
"""The record with the head; no group of tensors is called so."""


def to_record(message: Job | Reply) -> RecordDict:
    """Raises ProtocolError for a tensor that NumPy has no type for, such as bfloat16."""
    state = message.state if isinstance(message, Job) else message.groups
    record = RecordDict({HEAD: ConfigRecord({"head": message.head()})})
    for group, tensors in state.items():
        # By name: a record made of a list would call its arrays "0", "1", ….
        record[group] = ArrayRecord({name: Array(array) for name, array in arrays(tensors).items()})
    return record


def job_of(record: RecordDict) -> Job:
    """Raises ProtocolError."""
    return Job.of(*_parts(record))


def reply_of(record: RecordDict) -> Reply:
    """Raises ProtocolError."""
    return Reply.of(*_parts(record))


def _parts(record: RecordDict) -> tuple[str, State]:
    head = record.config_records[HEAD].get("head") if HEAD in record.config_records else None
    if not isinstance(head, str):
        raise ProtocolError("it has no head; the other side is no fedmllm")
    return head, {group: _tensors(group, found) for group, found in record.array_records.items()}


def _tensors(group: str, record: Any) -> Tensors:
    found: Tensors = {}
    for name, array in record.items():
        try:
            # A copy: what Flower hands out cannot be written to.
            found[name] = torch.from_numpy(np.array(array.numpy()))
        except (TypeError, ValueError, EOFError, OSError) as error:
            raise ProtocolError(f"the tensor {name!r} of {group!r} cannot be read: {error}") from None
    return found


__all__ = ["HEAD", "job_of", "reply_of", "to_record"]
