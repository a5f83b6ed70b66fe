"""Parts that the tiny checkpoints of `tiny_families` share: sizes, the tokenizer, chat templates and text configurations."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import transformers as hf
from tokenizers import Tokenizer

from recipes.pocket import architecture

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
VISION = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIGLIP = {"model_type": "siglip_vision_model", **VISION, "image_size": 32, "patch_size": 8, "vision_use_head": False}
SQUARE = {"height": 32, "width": 32}


@dataclass(frozen=True)
class Checkpoint:
    """A model with random weights and its processor."""

    model: Any
    processor: Any


@cache
def _tokenizer_file() -> str:
    return str(architecture.build_tokenizer(documents=40, vocabulary=400).backend_tokenizer.to_str())


def tokenizer(**named: str) -> Any:
    """The pocket model's byte-level BPE on few texts; `named` are special tokens that the family's processor requires."""
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_file()),
        pad_token=architecture.PAD, bos_token=architecture.BEGIN, eos_token=architecture.END,
        padding_side="left", model_max_length=512, extra_special_tokens=named,
    )  # fmt: skip


def template(image: str) -> str:
    return architecture.CHAT_TEMPLATE.replace("'<image>'", repr(image))


def text(tokens: Any, **options: Any) -> dict[str, Any]:
    return {**TEXT, "vocab_size": len(tokens), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **options}


def llama(tokens: Any) -> dict[str, Any]:
    return {"model_type": "llama", **text(tokens)}
