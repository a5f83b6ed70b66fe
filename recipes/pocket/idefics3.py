"""Idefics3 with a Llama text model: the shipped model, of about 2.9 million parameters, and one seven times as large."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor, PreTrainedTokenizerFast
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from recipes.pocket import scenes
from recipes.pocket.architecture import (
    AROUND,
    GLOBAL,
    IMAGE,
    IMAGE_TOKENS,
    PATCH,
    SHUFFLE,
    SPECIAL,
    Family,
    text_settings,
    token_ids,
)  # fmt: skip


class Idefics3(Family):
    name = "idefics3"
    title = "Idefics3 with a Llama text model"
    special = SPECIAL
    image = mark = IMAGE
    picture = f"{AROUND}{GLOBAL}{IMAGE * IMAGE_TOKENS}{AROUND}"
    vision = (".vision_model.", ".connector.")
    layers = (".layers.", ".connector.")
    model_class = Idefics3ForConditionalGeneration
    text_size: Mapping[str, Any] = {}
    """What differs from `text_settings`."""
    vision_size: Mapping[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "initializer_range": 0.08,
    }

    def build_config(self, tokenizer: PreTrainedTokenizerFast, **text: Any) -> Idefics3Config:
        return Idefics3Config(
            text_config={"model_type": "llama", **text_settings(tokenizer), **self.text_size, **text},
            vision_config={**self.vision_size, "image_size": scenes.SIZE, "patch_size": PATCH},
            scale_factor=SHUFFLE,
            image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
            tie_word_embeddings=True,
            dtype="float32",
            **token_ids(tokenizer),
        )

    def build_processor(self, tokenizer: PreTrainedTokenizerFast) -> Idefics3Processor:
        pictures = Idefics3ImageProcessorPil(
            size={"longest_edge": scenes.SIZE},
            max_image_size={"longest_edge": scenes.SIZE},
            do_image_splitting=False,
            image_mean=[0.5, 0.5, 0.5],
            image_std=[0.5, 0.5, 0.5],
        )
        return Idefics3Processor(pictures, tokenizer, image_seq_len=IMAGE_TOKENS, chat_template=self.chat_template())

    def image_tokens(self, model: Any, pixels: Tensor) -> Sequence[Tensor]:
        tokens: Sequence[Tensor] = model.get_image_features(pixel_values=pixels).pooler_output
        return tokens


class LargeIdefics3(Idefics3):
    """The same classes with about 21 million parameters. Matrices begin near 1/√width, as those of the small one."""

    name = "idefics3-large"
    title = "Idefics3 with a Llama text model, seven times as large"
    multiples = 1 / 64  # a twelfth of the matrices' s.d.; packed, the model is less than half as large
    text_size: Mapping[str, Any] = {
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 9,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "initializer_range": 0.05,
    }
    vision_size: Mapping[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "initializer_range": 0.06,
    }
