"""Base weights in 4 bits (nf4 of QLoRA, 2305.14314) by bitsandbytes, on a GPU.

LoRA trains as on any other frozen weights: its factors stay in float32, and gradients pass through the quantised layers.
PEFT's `prepare_model_for_kbit_training` also enables gradients of the inputs, which only gradient checkpointing needs.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from fedmllm.config import ModelTable
from fedmllm.errors import ConfigError


def quantization(settings: ModelTable, device: torch.device) -> dict[str, Any]:
    """Arguments of `from_pretrained`, empty without quantisation. Raises ConfigError if a GPU or bitsandbytes is missing."""
    if settings.quantize == "none":
        return {}
    setting = f"model.quantize = {settings.quantize!r}"
    if device.type != "cuda":
        raise ConfigError(f'{setting} requires a GPU, but the model would run on "{device.type}"; set it to "none".')
    missing = [library for library in ("bitsandbytes", "accelerate") if find_spec(library) is None]
    if missing:
        raise ConfigError(f'{setting} requires {" and ".join(missing)}; run pip install "fedmllm[gpu]" or set it to "none".')
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return {"quantization_config": config, "device_map": {"": device}}
