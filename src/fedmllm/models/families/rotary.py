"""Families whose text model has ordinary rotary positions, which left padding must not shift: position ids start at 0."""

from __future__ import annotations

from collections.abc import Callable

from fedmllm.models.families import Family, families

ROTARY = {
    "idefics3": "SmolVLM, Idefics 3.",
    "smolvlm": "SmolVLM2 (requires `pip install num2words`).",
    "llava": "LLaVA 1.5.",
    "llava_next": "LLaVA-NeXT.",
    "llava_onevision": "LLaVA-OneVision.",
    "internvl": "InternVL 3 (checkpoints whose names end in `-hf`).",
    "gemma3": "Gemma 3.",
}
"""model_type -> its description."""


def _described(description: str) -> Callable[[], Family]:
    def rotary() -> Family:
        return Family(first_position=0)

    rotary.__doc__ = description
    return rotary


for name, description in ROTARY.items():
    families.register(name)(_described(description))
