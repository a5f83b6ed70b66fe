"""What a run computes with: the versions of the libraries, the device and its precision."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import version
from typing import Any

import torch

from fedmllm.models.mllm import MLLM

LIBRARIES = ("fedmllm", "torch", "transformers", "peft", "numpy")


@cache
def versions() -> dict[str, str]:
    """The versions that this process has loaded, looked up once because reading them takes as long as a round of a tiny run."""
    return {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()}


def hardware(model: MLLM) -> dict[str, Any]:
    """The device, threads and precision that the model computes with.

    On another processor, or with kernels for other vector instructions, sums are rounded otherwise, which moves scores.
    """
    backbone = model.backbone
    on_gpu = backbone.device.type == "cuda"
    return {
        "platform": platform.platform(),
        "processor": torch.cuda.get_device_name(backbone.device) if on_gpu else torch.cpu.get_capabilities().get("cpu_name"),
        "kernels": None if on_gpu else torch.backends.cpu.get_cpu_capability(),
        "device": str(backbone.device),
        "threads": torch.get_num_threads(),
        "precision": str(backbone.dtype).removeprefix("torch."),
    }


def details(model: MLLM) -> list[str]:
    """The same in lines for people."""
    used, parameters = hardware(model), sum(model.adapter.sizes.values())
    computes = ", ".join(filter(None, (used["processor"], used["kernels"])))
    return [
        ", ".join(f"{name} {number}" for name, number in versions().items()),
        f"{used['device']} ({computes}) with {used['threads']} threads, {used['precision']}, on {used['platform']}",
        f"an adapter of {parameters} parameters; vision features are {'' if model.caches else 'not '}kept",
    ]
