"""The processor and the GPUs of this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch


def devices() -> Iterator[tuple[str, str, str]]:
    """(device, what it is, what to know about it) for the processor and each GPU."""
    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    few = "fewer threads than cores: raise OMP_NUM_THREADS if nothing else needs them" if threads < cores // 2 else ""
    yield "processor", f"{cores} cores, {threads} threads, {torch.backends.cpu.get_cpu_capability()}", few
    if not torch.cuda.is_available():
        yield "GPU", "none", "real models are slow without one; the pocket model needs none"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        bf16 = "" if torch.cuda.is_bf16_supported() else "no bfloat16: models take twice the memory"
        yield f"GPU {index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GB", bf16
