"""Families that differ only in who computes the position ids.

Ordinary rotary positions must not be shifted by the padding on the left, so ids are counted from the first real token. In
Qwen-VL, positions follow the rows and columns of the picture (M-RoPE), and the model computes them itself.
"""

from __future__ import annotations

from collections.abc import Callable

from fedmllm.models.families import Family, families

ROTARY, BY_MODEL = 0, None
FAMILIES = {
    "idefics3": ("SmolVLM, Idefics 3.", ROTARY),
    "smolvlm": ("SmolVLM2 (requires `pip install num2words`).", ROTARY),
    "llava": ("LLaVA 1.5.", ROTARY),
    "llava_next": ("LLaVA-NeXT.", ROTARY),
    "internvl": ("InternVL 3 (checkpoints whose names end in `-hf`).", ROTARY),
    "gemma3": ("Gemma 3.", ROTARY),
    "gemma4": ("Gemma 4.", ROTARY),
    "qwen2_vl": ("Qwen2-VL.", BY_MODEL),
    "qwen2_5_vl": ("Qwen2.5-VL.", BY_MODEL),
    "qwen3_vl": ("Qwen3-VL.", BY_MODEL),
    "qwen3_5": ("Qwen3.5.", BY_MODEL),
    "glm4v": ("GLM-4.1V.", BY_MODEL),
}
"""model_type -> (description, position id of the first real token)."""


def _factory(description: str, first_position: int | None) -> Callable[[], Family]:
    def factory() -> Family:
        return Family(first_position=first_position)

    factory.__doc__ = description
    return factory


for model_type, entry in FAMILIES.items():
    families.register(model_type)(_factory(*entry))


@families.register("llava_onevision")
def llava_onevision() -> Family:
    """LLaVA-OneVision."""
    return Family(first_position=ROTARY, alone_differs=True)  # only a picture by itself is cut into tiles
