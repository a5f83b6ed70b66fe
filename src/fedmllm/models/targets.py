"""Which modules of a model are trained: presets for parts of it, and the connector between vision tower and text model."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from fedmllm.errors import ConfigError
from fedmllm.models.families import Family

PRESETS = ("attention", "all-linear", "text", "vision", "projector")
"""The names that `model.lora.target` may join by "+" instead of giving a regular expression."""


def target_modules(model: Any, target: str | None, family: Family) -> str | list[str]:
    """What LoRA adapts: a regular expression or, for presets, the modules' names.

    "attention" is the family's default. "all-linear", or "text", has all linear layers of the text model without the head,
    "vision" and "projector" those of the vision tower and of what joins it to the text model. Raises ConfigError for a part
    without linear layers.
    """
    if target in (None, "attention"):
        return family.target
    assert target is not None
    presets = target.split("+")
    if not set(presets) <= set(PRESETS):
        return target
    linear = [
        name for name, module in model.named_modules() if _is_linear(module) and module is not model.get_output_embeddings()
    ]
    names: list[str] = []
    for preset in presets:
        part = "text" if preset == "all-linear" else preset
        matching = [
            name
            for name in linear
            if (re.fullmatch(family.target, name) if part == "attention" else family.part_of(name) == part)
        ]
        if not matching:
            remedy = (
                'set model.lora.whole = "projector" to train it whole, or leave it out'
                if part == "projector"
                else "leave it out"
            )
            raise ConfigError(
                f"model.lora.target = {target!r}: the {preset!r} part of this model has no linear layer; {remedy}."
            )
        names += matching
    return sorted(set(names))


def _is_linear(module: nn.Module) -> bool:
    # The layer inside of torch's multi-head attention is read and never called, so that an adapter on it would do nothing.
    return isinstance(module, nn.Linear) and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)


def whole_modules(model: Any, family: Family) -> list[str]:
    """The modules that make up the connector between vision tower and text model. Raises ConfigError if the model has none."""
    names: list[str] = []
    for name, module in model.named_modules():  # parents before their children
        inside = any(name.startswith(f"{parent}.") for parent in names)
        if family.part_of(name) == "projector" and not inside and not isinstance(module, nn.ModuleList):
            names.append(name)
    if not names:
        raise ConfigError('model.lora.whole = "projector": no connector was found in this model; set it to "none".')
    return names
