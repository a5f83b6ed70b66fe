"""What memory training takes, and how many clients train in one pass: as many as fit in it and still speed up training.

This is decided before the run. The number depends on the experiment and the machine, never on what else runs there, so that a
resumed run continues with the same cohorts and the same bits.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from fedmllm.config import TrainTable
from fedmllm.errors import ConfigError
from fedmllm.models.encoded import Encoded
from fedmllm.models.mllm import MLLM

_ENOUGH_TOKENS = {"cpu": 4096, "cuda": 32768}
"""The number of tokens beyond which a larger pass is no faster: measured for the CPU (docs/performance.md), not for a GPU."""
_SHARE = {"cpu": 0.25, "cuda": 0.6}
"""The share of the device's memory that a pass may use."""


def device_memory(device: torch.device) -> int:
    """The device's total memory in bytes, in use or not; for a CPU at most the limit of the control group."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no control groups, or "max"
        return total


def bytes_kept(model: MLLM, sample: Encoded) -> int:
    """Bytes that a forward pass of one sample keeps for its backward pass, measured on the model itself."""
    weights = {p.untyped_storage().data_ptr() for p in model.model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    losses = []  # keeps the graph alive, so that no storage is freed and its address reused while bytes are counted
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses.append(model.losses([sample]))
    return sum(kept.values())


def client_bytes(model: MLLM, kept: int, batch_size: int) -> int:
    """Bytes that a client takes beside the frozen weights, if a forward pass keeps `kept` of its longest sample."""
    entries = sum(p.numel() for p in model.adapter.parameters.values())
    # Values, gradients, two moments, and what a rule may add: the start, strengths, an offset, observed gradients.
    return kept * batch_size + 8 * 4 * entries


def training_bytes(model: MLLM, kept: int, batch_size: int) -> int:
    """Bytes that training takes on a client's own device: as `client_bytes`, with the frozen weights. The masks for
    padding that a batch of samples of unequal length has are not in it: a fifth at most in the tests."""
    frozen = sum(int(p.nbytes) for p in model.model.parameters() if not p.requires_grad)
    return frozen + client_bytes(model, kept, batch_size)


def cohort_size(model: MLLM, samples: Iterable[Encoded], train: TrainTable, most: int) -> int:
    """Clients per pass, from 1 to `most`, for clients that hold `samples`.

    Raises ConfigError if the experiment sets more than one and this kind of adapter trains one client at a time.
    """
    if not model.adapter.stacks:
        if train.cohort not in ("auto", 1):
            raise ConfigError(
                f"train.cohort = {train.cohort}: model.adapter.kind = {model.settings.adapter.kind!r}, or an adapter beyond "
                "the text model or on several GPUs, trains one client at a time; leave train.cohort out."
            )
        return 1
    if train.cohort != "auto":
        return min(train.cohort, most)
    held = list(samples)
    if not held or most == 1:
        return 1
    kind = model.backbone.device.type
    kept = bytes_kept(model, max(held, key=lambda sample: sample.length))
    memory = _SHARE.get(kind, 0.25) * device_memory(model.backbone.device)
    fit_in_memory = memory / client_bytes(model, kept, train.batch_size)
    client_tokens = train.batch_size * sum(sample.length for sample in held) / len(held)
    speed_up = _ENOUGH_TOKENS.get(kind, 4096) / client_tokens
    return max(1, min(most, int(fit_in_memory), round(speed_up)))
