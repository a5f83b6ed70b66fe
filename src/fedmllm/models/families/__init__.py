"""What a model family does differently. A family is a function registered under its `model_type` in transformers.

Most need nothing: the default trains q, k, v, o of the text model's attention, wherever the family keeps that model. A new
family is an entry here and one in the table of tests/tiny_families.py.
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
    first_position: int | None = None
    """Give position ids counted from the first real token, which has this one. None: the family counts its own (M-RoPE)."""
    cache: bool = True
    """Whether the vision tower's output depends on the picture alone and may be handed back."""
    continues: bool = True
    """Whether several answers can go on from copies of one prompt's keys and values."""
    pixels_dim: int = 0
    """The dimension along which several pictures' `pixel_values` are joined."""
    answer_type: int = 0
    """The token type of an answer's tokens, for families whose token types tell prompt and answer apart."""
    template: str | None = None
    """A chat template for checkpoints that come with none."""
    text_prompt: str | None = None
    """How a prompt without a picture is written where the processor takes none: `{begin}` is the begin mark."""


families: Registry[Family] = Registry("family", __name__)


def family_of(model_type: str) -> Family:
    """The registered family, or the default for one that is not known here."""
    return families.build(model_type, {}) if model_type in families.names() else Family()


def _plain_rotary() -> Family:
    """A text model with ordinary rotary positions: padding on the left must not shift them."""
    return Family(first_position=0)


for _name in ("idefics3", "smolvlm", "llava", "llava_next", "llava_onevision", "internvl", "gemma3"):
    families.register(_name)(_plain_rotary)


def _own_positions() -> Family:
    """A text model whose positions follow the picture's rows and columns (M-RoPE), which it counts itself."""
    return Family()


for _name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
    families.register(_name)(_own_positions)


@families.register("minicpmv4_6")
def _minicpm46() -> Family:
    """Pictures of any size are cut in patches that lie in one row, all pictures of a batch behind each other.

    Three of four text layers have linear attention, which has no q, k, v, o: the adapter is on the others.
    """
    return Family(first_position=0, continues=False, pixels_dim=-1)  # linear attention's state cannot be copied row by row


@families.register("minicpmv4_7")
def _minicpm47() -> Family:
    """As 4.6, with positions of its own: those of a picture's patches on a canvas."""
    return Family(pixels_dim=-1)


@families.register("paligemma")
def _paligemma() -> Family:
    """No chat: picture, begin mark, prompt and line break are a prefix attended both ways, the answer is causal (2407.07726).

    The processor writes the begin mark and the line break, but takes no prompt without a picture.
    """
    return Family(
        first_position=1,
        answer_type=1,
        template=(
            "{% for message in messages %}{% for part in message['content'] %}"
            "{{ '<image>' if part['type'] == 'image' else part['text'] }}"
            "{% endfor %}{% endfor %}"
        ),
        text_prompt="{begin}{prompt}\n",
    )
