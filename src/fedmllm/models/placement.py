"""Where a model's weights are: on one device, or spread over all GPUs by accelerate (`model.device_map = "auto"`).

Each GPU then has a run of consecutive layers, and hooks of accelerate move what passes from one to the next. The GPUs work one
after another, so this is for models that are too large for one GPU and makes nothing faster.
"""

from __future__ import annotations

from typing import Any

import torch

from fedmllm.config import ModelTable
from fedmllm.errors import ConfigError


def device_map(settings: ModelTable, device: torch.device) -> dict[str, Any]:
    """Arguments of `from_pretrained`, empty without a device map or a GPU."""
    return {"device_map": "auto"} if settings.device_map == "auto" and device.type == "cuda" else {}


def check_on_gpus(settings: ModelTable, model: Any) -> None:
    """Raises ConfigError if accelerate left part of the model outside of the GPUs, where nothing can be trained."""
    outside = sorted(part for part, where in getattr(model, "hf_device_map", {}).items() if where in ("cpu", "disk"))
    if outside and settings.device_map == "auto":
        raise ConfigError(
            f"model.name = {settings.name!r} does not fit on this machine's GPUs: accelerate would leave {outside[0]!r} and "
            f"{len(outside) - 1} more of its parts outside, where they cannot be trained; use more or larger GPUs, "
            'model.precision = "bf16", or on one GPU model.quantize = "4bit".'
        )
