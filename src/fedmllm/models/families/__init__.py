"""How model families differ. A family is a function registered under the `model_type` that transformers gives it.

Most families need no entry: by default LoRA adapts q, k, v and o of the text model's attention. A new family is one file here
and a tiny checkpoint in the table of tests/tiny_families.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fedmllm.registry import Registry

ATTENTION = r".*\b(text_model|language_model)\.(model\.)?layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|o_proj)"
_FEEDFORWARD = r".*\b(text_model|language_model)\.(model\.)?layers\.\d+\.mlp\.down_proj"
_KEYS_VALUES = r".*\b(text_model|language_model)\.(model\.)?layers\.\d+\.self_attn\.(k_proj|v_proj)"
_ALL_SAMPLES = re.compile(r"\b(text_model|language_model|lm_head|prompt_embeddings)\b")
_PROJECTOR = re.compile(r"\b(connector|multi_modal_projector|merger|deepstack_merger_list|embed_vision)\b")
_LAYER = re.compile(r"\b(?:text_model|language_model)\.(?:model\.)?layers\.(\d+)\.")


def text_layer(name: str) -> int | None:
    """The text model's layer that a module or tensor name belongs to; None for the vision tower and everything else."""
    match = _LAYER.search(name)
    return int(match.group(1)) if match else None


Part = Literal["text", "vision", "projector"]
"""The parts of a model: the text model, through which all samples pass, and the vision tower and the connector that joins the
two, through which only pictures pass."""


def part_of(name: str) -> Part:
    """The part that a module or tensor of this name belongs to."""
    if _ALL_SAMPLES.search(name):
        return "text"
    return "projector" if _PROJECTOR.search(name) else "vision"


@dataclass(frozen=True)
class Family:
    target: str = ATTENTION
    """A regular expression that matches the full names of the modules that LoRA adapts."""
    ia3_target: str = f"{_KEYS_VALUES}|{_FEEDFORWARD}"
    """The modules that IA3 rescales: keys, values and the inner activations of the feed-forward layers (2205.05638)."""
    ia3_feedforward: str = _FEEDFORWARD
    layer_of: Callable[[str], int | None] = text_layer
    part_of: Callable[[str], Part] = part_of
    first_position: int | None = None
    """The position id of the first real token, from which ids are counted. None: the model computes its own ids (M-RoPE)."""
    cache: bool = True
    """Whether the vision tower's output depends only on the picture and can be cached."""
    continues: bool = True
    """Whether several answers can continue from copies of one prompt's keys and values."""
    pixels_dim: int = 0
    """The dimension along which the `pixel_values` of several pictures are concatenated."""
    one_picture: str = ""
    """Why a prompt can show one picture only; empty if it can show several."""
    alone_differs: bool = False
    """Whether the processor treats a picture differently if it is the only one of its prompt."""
    answer_type: int = 0
    """The token type of answer tokens, for families whose token types distinguish prompt and answer."""
    template: str | None = None
    """A chat template for checkpoints that have none."""
    text_prompt: str | None = None
    """The format of a prompt without a picture if the processor accepts none; `{begin}` stands for the begin-of-text token."""


families: Registry[Family] = Registry("family", __name__)


def family_of(model_type: str) -> Family:
    """The registered family, or the default for a model type that is not registered."""
    return families.build(model_type, {}) if model_type in families.names() else Family()
