"""Qwen2-VL, with about 3.2 million parameters.

Its positions are rotary everywhere: along two axes in the vision tower, and along three (M-RoPE) in the text model. A merger
of two layers makes an image token of four patches.

The three axes take turns along the frequencies, as in Qwen3-VL. In the contiguous sections of the published Qwen2-VL, columns
have the slowest third of the frequencies, which does not tell the columns of a 4 × 4 grid apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision, eager_attention_forward
from transformers.vision_utils import get_vision_position_ids

from fedmllm.models.processors import NoVideos, picture_processor
from recipes.pocket import scenes
from recipes.pocket.architecture import BEGIN, END, IMAGE_TOKENS, PAD, PATCH, SHUFFLE, Family, text_settings, token_ids

MARKS = {
    "vision_start": "<|vision_start|>",
    "image": "<|image_pad|>",
    "vision_end": "<|vision_end|>",
    "video": "<|video_pad|>",
}
PATCHES = scenes.SIZE // PATCH
GRID = PATCHES // SHUFFLE


class Qwen2VL(Family):
    name = "qwen2-vl"
    title = "Qwen2-VL"
    special = (PAD, BEGIN, END, *MARKS.values())
    image = MARKS["image"]
    mark = f"{MARKS['vision_start']}{image}{MARKS['vision_end']}"
    picture = f"{MARKS['vision_start']}{image * IMAGE_TOKENS}{MARKS['vision_end']}"
    vision = (".visual.",)
    layers = (".layers.", ".blocks.", ".merger.")
    model_class = Qwen2VLForConditionalGeneration

    def build_config(self, tokenizer: PreTrainedTokenizerFast, **text: Any) -> Qwen2VLConfig:
        text_config = {**text_settings(tokenizer), **text}
        frequencies = text_config["hidden_size"] // text_config["num_attention_heads"] // 2
        # The base is that of Llama: without pictures, the two families rotate alike.
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1] * frequencies}
        vision_config = {
            "embed_dim": 128,
            "mlp_ratio": 3,
            "depth": 4,
            "num_heads": 4,
            "hidden_size": text_config["hidden_size"],
            "patch_size": PATCH,
            "temporal_patch_size": 1,
            "spatial_merge_size": SHUFFLE,
            "initializer_range": 0.08,
        }
        return Qwen2VLConfig(
            text_config={**text_config, "rope_parameters": rope},
            vision_config=vision_config,
            tie_word_embeddings=True,
            dtype="float32",
            **token_ids(tokenizer),
            **{f"{name}_token_id": tokenizer.convert_tokens_to_ids(mark) for name, mark in MARKS.items()},
        )

    def build_processor(self, tokenizer: PreTrainedTokenizerFast) -> Qwen2VLProcessor:
        """Pictures of any size and shape are resized to at most the pixels of the pictures of the recipe."""
        pictures = Qwen2VLImageProcessorPil(
            patch_size=PATCH,
            temporal_patch_size=1,
            merge_size=SHUFFLE,
            size={"shortest_edge": scenes.SIZE**2, "longest_edge": scenes.SIZE**2},
            image_mean=[0.5, 0.5, 0.5],
            image_std=[0.5, 0.5, 0.5],
        )
        return picture_processor(Qwen2VLProcessor)(pictures, tokenizer, NoVideos(), chat_template=self.chat_template())

    def image_tokens(self, model: Any, pixels: Tensor) -> Sequence[Tensor]:
        """The tower for pictures of one size, with one product for the attention of all; its own takes one for each."""
        tower = model.model.visual
        # A merged block of patches after another, as the processor orders them.
        blocks = pixels.view(-1, 3, GRID, SHUFFLE, PATCH, GRID, SHUFFLE, PATCH).permute(0, 2, 5, 3, 6, 1, 4, 7)
        patches = blocks.reshape(len(pixels), PATCHES**2, 3 * PATCH**2)
        hidden = functional.linear(patches, tower.patch_embed.proj.weight.flatten(1))  # a convolution is slow in bfloat16
        places = get_vision_position_ids(torch.tensor([[1, PATCHES, PATCHES]]), SHUFFLE)
        rotations = tower.rotary_pos_emb(hidden, places)
        for block in tower.blocks:
            attention = block.attn
            qkv = attention.qkv(block.norm1(hidden)).view(*hidden.shape[:2], 3, attention.num_heads, -1)
            q, k = apply_rotary_pos_emb_vision(qkv[:, :, 0], qkv[:, :, 1], *rotations)
            heads = [t.transpose(1, 2) for t in (q, k, qkv[:, :, 2])]
            mixed, _ = eager_attention_forward(attention, *heads, None, scaling=attention.scaling)
            hidden = hidden + attention.proj(mixed.flatten(2))
            hidden = hidden + block.mlp(block.norm2(hidden))
        merged: Tensor = tower.merger(hidden).view(len(pixels), IMAGE_TOKENS, -1)
        return merged.unbind()

    def position_ids(self, ids: Tensor, positions: Tensor, image_token: int) -> Tensor:
        """(3, rows, length): image tokens have the place of their picture, plus their row and column; what follows a picture
        continues as if it had as many tokens as its grid has rows."""
        is_image = ids == image_token
        before = is_image.cumsum(-1) - is_image.long()  # image tokens before each token, of at most one picture
        shift = torch.where(is_image, before, (before > 0) * (IMAGE_TOKENS - GRID))
        rows, columns = before // GRID * is_image, before % GRID * is_image
        start = positions - shift
        return torch.stack([start, start + rows, start + columns])
