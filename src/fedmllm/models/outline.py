"""How much memory a model takes, without its weights: its architecture on PyTorch's "meta" device, where tensors have shapes
and no data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForImageTextToText

from fedmllm.config import ModelTable
from fedmllm.models.backbone import Backbone
from fedmllm.models.families import family_of
from fedmllm.models.live_bytes import LiveBytes
from fedmllm.models.mllm import MLLM
from fedmllm.models.shipped import source_of

META = torch.device("meta")
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "HuggingFaceTB/SmolVLM-500M-Instruct": (
        "idefics3",
        {
            "text_config": {
                "model_type": "llama", "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32,
                "num_attention_heads": 15, "num_key_value_heads": 5, "vocab_size": 49280, "pad_token_id": 2,
            },
            "vision_config": {
                "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
                "image_size": 512, "patch_size": 16,
            },
            "scale_factor": 4, "tie_word_embeddings": False,
        },
    ),
    "HuggingFaceTB/SmolVLM-Instruct": (
        "idefics3",
        {
            "text_config": {
                "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
                "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 49155, "pad_token_id": 2,
            },
            "vision_config": {
                "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
                "image_size": 384, "patch_size": 14,
            },
            "scale_factor": 3, "tie_word_embeddings": False,
        },
    ),
    "Qwen/Qwen2.5-VL-3B-Instruct": (
        "qwen2_5_vl",
        {
            "text_config": {
                "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
                "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
                "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
            },
            "vision_config": {
                "hidden_size": 1280, "intermediate_size": 3420, "depth": 32, "num_heads": 16, "patch_size": 14,
                "window_size": 112, "out_hidden_size": 2048, "fullatt_block_indexes": [7, 15, 23, 31],
            },
            "tie_word_embeddings": True,
        },
    ),
}  # fmt: skip
"""name -> (model type, config) of models that files in this repository name, for machines that have no network."""


def _attend(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Attention on the meta device as on a CPU or GPU, where the weights of all pairs of tokens are never in memory."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.empty_like(attn_mask, dtype=q.dtype)
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    result: Tensor = attend(q, k, v, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return result


@contextmanager
def counting(model: MLLM) -> Iterator[LiveBytes]:
    """Count what the model, or an outline, allocates."""
    count = LiveBytes()
    if model.backbone.device != META:
        with count:
            yield count
    else:
        with META, patch.object(functional, "scaled_dot_product_attention", _attend), count:
            yield count


def config_of(settings: ModelTable) -> Any | None:
    """The model's config, or that of `SHAPES`; None if neither is on this machine or can be downloaded."""
    try:
        return AutoConfig.from_pretrained(source_of(settings.name), trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError):
        model_type, table = SHAPES.get(settings.name, ("", {}))
        return AutoConfig.for_model(model_type, **table) if model_type else None


def outline(settings: ModelTable, config: Any, dtype: torch.dtype, fused: bool = False) -> MLLM:
    """The model on the meta device, with its adapter. It computes losses and scores of samples without pictures; `fused` says
    whether by `FusedLlama`."""
    tokenizer = SimpleNamespace(pad_token_id=0, added_tokens_decoder={}, all_special_tokens=(), unk_token_id=None)
    tokenizer.convert_tokens_to_ids = list
    nobody = SimpleNamespace(tokenizer=tokenizer, chat_template="")
    with META, LiveBytes():
        model: nn.Module = AutoModelForImageTextToText.from_config(
            config, dtype=dtype, trust_remote_code=settings.trust_remote_code
        )
        model.requires_grad_(False).eval()
        backbone = Backbone(model, nobody, family_of(config.model_type), META, dtype, (0,), ("", ""))
        outlined = MLLM(backbone, settings.model_copy(update={"cache_features": False}), seed=0)
    outlined.fused = fused
    return outlined


def frozen_bytes(model: MLLM, quantized: bool = False) -> int:
    """Bytes of the frozen weights and buffers; if `quantized`, with linear layers except the head in nf4: four bits a weight,
    and for each 64 of them a scale in float32."""
    own = {id(p) for p in model.adapter.parameters.values()}
    weights: Mapping[int, Tensor] = {id(t): t for t in [*model.model.parameters(), *model.model.buffers()] if id(t) not in own}
    head = model.backbone.model.get_output_embeddings()
    linear = {id(m.weight) for m in model.backbone.model.modules() if isinstance(m, nn.Linear) and m is not head}
    return sum(t.numel() * 9 // 16 if quantized and key in linear else int(t.nbytes) for key, t in weights.items())
