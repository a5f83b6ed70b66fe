"""What memory training takes, and how many clients train in one pass: as many as fit in it and still speed up training.

This is decided before the run. The number depends on the experiment and the machine, never on what else runs there, so that a
resumed run continues with the same cohorts and the same bits.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from fedmllm.config import TrainTable
from fedmllm.errors import ConfigError
from fedmllm.models.encoded import Encoded
from fedmllm.models.mllm import MLLM
from fedmllm.models.outline import META, counting, frozen_bytes
from fedmllm.models.stack import Stack

_ENOUGH_TOKENS = {"cpu": 4096, "cuda": 32768}
"""The number of tokens beyond which a larger pass is no faster (docs/performance.md): measured for the CPU; on an H100 it is
7,776 for SmolVLM-2.2B, 15,008 for Qwen2.5-VL-3B and unknown for SmolVLM-500M, whose rate still rises at 25,664."""
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


def pass_bytes(model: MLLM, batch: Sequence[Encoded], train: TrainTable) -> tuple[int, int]:
    """(bytes that one client's pass over `batch`, forward and backward, takes at its peak beside all that `client_bytes` counts
    by itself, bytes that the model itself needs from its first pass on), counted in a pass of the model or of its outline."""
    adapter = model.adapter
    start = {name: torch.zeros(p.shape) for name, p in adapter.parameters.items()}
    if model.backbone.device == META:  # an outline has no pictures
        batch = [replace(sample, pictures=(), imagewise={}) for sample in batch]
    stack = Stack(adapter, [start], list(start), [0], checkpointing=train.checkpointing)
    with ExitStack() as undo:
        if not adapter.stacks:  # whose dropout acts in training mode only
            undo.enter_context(torch.random.fork_rng())
            undo.callback(model.model.eval)
            model.model.train()
        undo.enter_context(model.using(stack, 1))
        count = undo.enter_context(counting(model))
        stack.begin([(len(batch), model.width(batch))])
        model.losses(batch).sum().backward()  # type: ignore[no-untyped-call]
    return count.peak - count.live, count.live


def adapter_bytes(model: MLLM, train: TrainTable) -> tuple[int, int]:
    """Bytes of a client's adapter with its gradients and what an algorithm's rule may add (the received values, strengths, an
    offset, observed gradients), and of the state of its optimizer."""
    entries = sum(p.numel() for p in model.adapter.parameters.values())
    moments = 2 if train.optimizer == "adamw" else int(train.momentum > 0)
    return 6 * 4 * entries, moments * 4 * entries


def client_bytes(model: MLLM, of_sample: int, train: TrainTable) -> int:
    """Bytes that a client takes beside the frozen weights, if a pass over its longest sample takes `of_sample`."""
    return of_sample * train.batch_size + sum(adapter_bytes(model, train))


def training_bytes(model: MLLM, of_sample: int, train: TrainTable) -> int:
    """Bytes that training takes on a client's own device: as `client_bytes`, with the frozen weights. The masks for
    padding that a batch of samples of unequal length has are not in it: a fifth at most in the tests."""
    return frozen_bytes(model) + client_bytes(model, of_sample, train)


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
    device = model.backbone.device
    of_sample, _ = pass_bytes(model, [max(held, key=lambda sample: sample.length)], train)
    tokens = train.batch_size * sum(sample.length for sample in held) / len(held)
    return cohort_that_fits(device.type, device_memory(device), client_bytes(model, of_sample, train), tokens, most)


def cohort_that_fits(kind: str, memory: float, of_client: float, client_tokens: float, most: int) -> int:
    """Clients per pass on a device ("cpu" or "cuda") with `memory` bytes, if each takes so many bytes and a step of it has so
    many tokens."""
    fit_in_memory = _SHARE.get(kind, 0.25) * memory / of_client
    speed_up = _ENOUGH_TOKENS.get(kind, 4096) / client_tokens
    return max(1, min(most, int(fit_in_memory), round(speed_up)))
