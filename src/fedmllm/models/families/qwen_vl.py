"""Qwen-VL: positions follow the rows and columns of the picture (M-RoPE), and the model computes them itself."""

from __future__ import annotations

from fedmllm.models.families import Family, families


@families.register("qwen2_vl")
def qwen2_vl() -> Family:
    """Qwen2-VL."""
    return Family()


@families.register("qwen2_5_vl")
def qwen2_5_vl() -> Family:
    """Qwen2.5-VL."""
    return Family()


@families.register("qwen3_vl")
def qwen3_vl() -> Family:
    """Qwen3-VL."""
    return Family()
