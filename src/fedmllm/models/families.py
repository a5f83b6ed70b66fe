"""What a model family does differently. A family is a function registered under its `model_type` in transformers.

Most need nothing: the default trains q, k, v, o of the text model's attention, wherever the family keeps that model.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from fedmllm.registry import Registry

ATTENTION = r".*\b(text_model|language_model)\.(model\.)?layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|o_proj)"
_FEEDFORWARD = r".*\b(text_model|language_model)\.(model\.)?layers\.\d+\.mlp\.down_proj"
_KEYS_VALUES = r".*\b(text_model|language_model)\.(model\.)?layers\.\d+\.self_attn\.(k_proj|v_proj)"
_LAYER = re.compile(r"\b(?:text_model|language_model)\.(?:model\.)?layers\.(\d+)\.")


def text_layer(name: str) -> int | None:
    """The text model's layer that a module or tensor name belongs to; None for the vision tower and the rest."""
    found = _LAYER.search(name)
    return int(found.group(1)) if found else None


@dataclass(frozen=True)
class Family:
    target: str = ATTENTION
    """A regular expression that LoRA's module names match in full."""
    ia3_target: str = f"{_KEYS_VALUES}|{_FEEDFORWARD}"
    """What IA3 rescales: keys, values and the feed-forward's inner activations (2205.05638)."""
    ia3_feedforward: str = _FEEDFORWARD
    layer_of: Callable[[str], int | None] = text_layer
    positions: bool = False
    """Give position ids counted from the first real token; families that count their own (M-RoPE, offsets) must get none."""
    cache: bool = True
    """Whether the vision tower's output depends on the picture alone and may be handed back."""


families: Registry[Family] = Registry("family", __name__)


def family_of(model_type: str) -> Family:
    """The registered family, or the default for one that is not known here."""
    return families.build(model_type, {}) if model_type in families.names() else Family()


def _plain_rotary() -> Family:
    """A text model with ordinary rotary positions: padding on the left must not shift them."""
    return Family(positions=True)


for _name in ("idefics3", "smolvlm", "llava", "llava_next", "llava_onevision", "internvl"):
    families.register(_name)(_plain_rotary)
