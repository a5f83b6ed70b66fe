"""Base weights of four bits (nf4 of QLoRA, 2305.14314) by bitsandbytes, on a GPU.

LoRA trains beside them as beside any frozen weights: its factors stay float32, and gradients pass through quantised layers.
What `prepare_model_for_kbit_training` adds, gradients of the inputs, is needed by gradient checkpointing alone.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from fedmllm.config import ModelTable
from fedmllm.errors import ConfigError


def quantization(settings: ModelTable, device: torch.device) -> dict[str, Any]:
    """Arguments of `from_pretrained`, empty for none. Raises ConfigError where there is no GPU or no bitsandbytes."""
    if settings.quantize == "none":
        return {}
    wanted = f"model.quantize = {settings.quantize!r}"
    if device.type != "cuda":
        raise ConfigError(f'{wanted} needs a GPU, and the model would run on "{device.type}"; set it to "none".')
    missing = [library for library in ("bitsandbytes", "accelerate") if find_spec(library) is None]
    if missing:
        raise ConfigError(f'{wanted} needs {" and ".join(missing)}; run pip install "fedmllm[gpu]" or set it to "none".')
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return {"quantization_config": config, "device_map": {"": device}}
