"""Families whose text model has ordinary rotary positions, which left padding must not shift: position ids start at 0."""

from __future__ import annotations

from fedmllm.models.families import Family, families


@families.register("idefics3")
def idefics3() -> Family:
    """SmolVLM, Idefics 3."""
    return Family(first_position=0)


@families.register("smolvlm")
def smolvlm() -> Family:
    """SmolVLM2 (requires `pip install num2words`)."""
    return Family(first_position=0)


@families.register("llava")
def llava() -> Family:
    """LLaVA 1.5."""
    return Family(first_position=0)


@families.register("llava_next")
def llava_next() -> Family:
    """LLaVA-NeXT."""
    return Family(first_position=0)


@families.register("llava_onevision")
def llava_onevision() -> Family:
    """LLaVA-OneVision."""
    return Family(first_position=0)


@families.register("internvl")
def internvl() -> Family:
    """InternVL 3 (checkpoints whose names end in `-hf`)."""
    return Family(first_position=0)


@families.register("gemma3")
def gemma3() -> Family:
    """Gemma 3."""
    return Family(first_position=0)
