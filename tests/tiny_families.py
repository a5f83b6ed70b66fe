"""A tiny random checkpoint of each family, with real tokenizer and processor files. A new family is an entry in `FAMILIES`.

Text models have two layers of width 32. Pictures have several sizes; families with dynamic resolution produce more tokens for
larger ones, within limits that keep prompts at a few dozen tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from fedmllm.models import processors
from fedmllm.models.processors import NoVideos, picture_processor
from tiny_parts import SIGLIP, SQUARE, VISION, Checkpoint, llama, template, text, tokenizer


@contextmanager
def without_torchvision_and_num2words() -> Iterator[None]:
    """Behave as if neither is installed: both are only for videos, which these checkpoints do not support."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processors, "is_torchvision_available", lambda: False)
        patch.setattr(processing_smolvlm, "num2words", str)
        yield


def _idefics(config_class: Any, model_class: Any, processor_class: Any, images: Any, *videos: Any) -> Checkpoint:
    """Pictures are cut into tiles of 32 × 32, plus one tile with the whole picture."""
    tokens = tokenizer()
    config = config_class(
        text_config=llama(tokens), vision_config={**VISION, "image_size": 32, "patch_size": 8}, scale_factor=2,
        image_token_id=tokens.convert_tokens_to_ids("<image>"), pad_token_id=0,
    )  # fmt: skip
    pictures = images(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}, do_image_splitting=True)
    processor = processor_class(pictures, tokens, *videos, image_seq_len=4, chat_template=template("<image>"))
    return Checkpoint(model_class(config), processor)


def idefics3() -> Checkpoint:
    model_class = hf.Idefics3ForConditionalGeneration
    return _idefics(hf.Idefics3Config, model_class, hf.Idefics3Processor, Idefics3ImageProcessorPil)


def smolvlm() -> Checkpoint:
    model_class, processor_class = hf.SmolVLMForConditionalGeneration, picture_processor(hf.SmolVLMProcessor)
    return _idefics(hf.SmolVLMConfig, model_class, processor_class, SmolVLMImageProcessorPil, NoVideos())


def llava() -> Checkpoint:
    tokens = tokenizer()
    config = hf.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **VISION, "image_size": 32, "patch_size": 8, "projection_dim": 24},
        text_config=llama(tokens), image_token_id=3, image_seq_length=16,
    )  # fmt: skip
    processor = hf.LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE), tokens, patch_size=8, image_token="<image>",
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=template("<image>"),
    )  # fmt: skip
    return Checkpoint(hf.LlavaForConditionalGeneration(config), processor)


def llava_next() -> Checkpoint:
    """As OneVision below, without CLIP's first token."""
    tokens, grids = tokenizer(), [[32, 32], [32, 64], [64, 32], [64, 64]]
    config = hf.LlavaNextConfig(
        vision_config={"model_type": "clip_vision_model", **VISION, "image_size": 32, "patch_size": 8, "projection_dim": 24},
        text_config=llama(tokens), image_token_id=3, image_grid_pinpoints=grids,
    )  # fmt: skip
    images = LlavaNextImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE, image_grid_pinpoints=grids)
    processor = hf.LlavaNextProcessor(
        images, tokens, patch_size=8,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=template("<image>"),
    )  # fmt: skip
    return Checkpoint(hf.LlavaNextForConditionalGeneration(config), processor)


def llava_onevision() -> Checkpoint:
    """One tile with the whole picture, plus the tiles of the best-fitting grid without the grid's borders."""
    tokens, grids = tokenizer(video_token="<video>"), [[32, 32], [32, 64], [64, 32], [64, 64]]
    config = hf.LlavaOnevisionConfig(
        vision_config=SIGLIP,
        text_config={"model_type": "qwen2", **text(tokens)}, image_grid_pinpoints=grids,
        image_token_index=3, video_token_index=tokens.video_token_id,
    )  # fmt: skip
    processor = picture_processor(hf.LlavaOnevisionProcessor)(
        LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=grids), tokens, NoVideos(), num_image_tokens=16,
        vision_feature_select_strategy="full", chat_template=template("<image>"),
    )  # fmt: skip
    return Checkpoint(hf.LlavaOnevisionForConditionalGeneration(config), processor)


def internvl() -> Checkpoint:
    """Pictures are cut into at most four tiles, plus a thumbnail if there is more than one."""
    tokens = tokenizer(start_image_token="<img>", end_image_token="</img>", context_image_token="<ctx>", video_token="<video>")
    config = hf.InternVLConfig(
        vision_config={**VISION, "image_size": [32, 32], "patch_size": [8, 8]},
        text_config={"model_type": "qwen2", **text(tokens)},
        image_token_id=tokens.context_image_token_id, image_seq_length=4,
    )  # fmt: skip
    processor = picture_processor(hf.InternVLProcessor)(
        GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True, max_patches=4), tokens, NoVideos(), image_seq_length=4,
        chat_template=template("<ctx>"),
    )  # fmt: skip
    return Checkpoint(hf.InternVLForConditionalGeneration(config), processor)


def _qwen(config_class: Any, model_class: Any, processor_class: Any, vision: dict[str, Any], **text_options: Any) -> Checkpoint:
    marks = {
        "vision_start": "<|vision_start|>",
        "image": "<|image_pad|>",
        "vision_end": "<|vision_end|>",
        "video": "<|video_pad|>",
    }
    tokens = tokenizer(**{f"{name}_token": mark for name, mark in marks.items()})
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    vision = {"depth": 2, "num_heads": 2, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2, **vision}
    config = config_class(
        text_config=text(tokens, rope_parameters=rope, max_position_embeddings=512, head_dim=16, **text_options),
        vision_config=vision,
        **{f"{name}_token_id": tokens.convert_tokens_to_ids(mark) for name, mark in marks.items()},
    )  # fmt: skip
    sizes = {"shortest_edge": 1024, "longest_edge": 4096}
    images = Qwen2VLImageProcessorPil(patch_size=8, temporal_patch_size=2, merge_size=2, size=sizes)
    mark = marks["vision_start"] + marks["image"] + marks["vision_end"]
    processor = picture_processor(processor_class)(images, tokens, NoVideos(), chat_template=template(mark))
    return Checkpoint(model_class(config), processor)


def qwen2_vl() -> Checkpoint:
    vision = {"embed_dim": 32, "hidden_size": 32}
    return _qwen(hf.Qwen2VLConfig, hf.Qwen2VLForConditionalGeneration, hf.Qwen2VLProcessor, vision)


def qwen2_5_vl() -> Checkpoint:
    vision = {
        "hidden_size": 32,
        "out_hidden_size": 32,
        "intermediate_size": 48,
        "window_size": 32,
        "fullatt_block_indexes": [1],
    }
    return _qwen(hf.Qwen2_5_VLConfig, hf.Qwen2_5_VLForConditionalGeneration, hf.Qwen2_5_VLProcessor, vision)


def qwen3_vl() -> Checkpoint:
    """With DeepStack features, which are inputs to several layers of the text model."""
    vision = {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "deepstack_visual_indexes": [0, 1]}
    vision |= {"num_position_embeddings": 64}
    return _qwen(hf.Qwen3VLConfig, hf.Qwen3VLForConditionalGeneration, hf.Qwen3VLProcessor, vision)


def qwen3_5() -> Checkpoint:
    """One layer with linear attention and one with full attention."""
    vision = {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "num_position_embeddings": 64}
    linear = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
    model_class, layers = hf.Qwen3_5ForConditionalGeneration, ["linear_attention", "full_attention"]
    return _qwen(
        hf.Qwen3_5Config, model_class, hf.Qwen3VLProcessor, vision, **linear, layer_types=layers, partial_rotary_factor=1.0
    )


def glm4v() -> Checkpoint:
    marks = {"image_start": "<|begin_of_image|>", "image": "<|image|>", "image_end": "<|end_of_image|>", "video": "<|video|>"}
    tokens = tokenizer(**{f"{name}_token": mark for name, mark in marks.items()})
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    config = hf.Glm4vConfig(
        text_config=text(tokens, rope_parameters=rope, max_position_embeddings=512),
        vision_config={
            "depth": 2, "num_heads": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "image_size": 64,
            "patch_size": 8,
        },
        **{f"{name}_token_id": tokens.convert_tokens_to_ids(mark) for name, mark in marks.items()},
    )  # fmt: skip
    images = Glm4vImageProcessorPil(patch_size=8, size={"shortest_edge": 1024, "longest_edge": 8192})
    mark = marks["image_start"] + marks["image"] + marks["image_end"]
    processor = picture_processor(hf.Glm4vProcessor)(images, tokens, NoVideos(), chat_template=template(mark))
    return Checkpoint(hf.Glm4vForConditionalGeneration(config), processor)


def paligemma(**text_options: Any) -> Checkpoint:
    """Without a chat template, like the published checkpoints."""
    tokens = tokenizer()
    images = SiglipImageProcessorPil(size=SQUARE)
    images.image_seq_length = 16
    processor = hf.PaliGemmaProcessor(images, tokens)  # adds its own location and segment tokens
    config = hf.PaliGemmaConfig(
        vision_config=SIGLIP,
        text_config={"model_type": "gemma", **text(tokens, head_dim=16), **text_options}, projection_dim=32, hidden_size=32,
        vocab_size=len(tokens), image_token_index=processor.image_token_id,
    )  # fmt: skip
    return Checkpoint(hf.PaliGemmaForConditionalGeneration(config), processor)


def paligemma2() -> Checkpoint:
    """The first layer of the text model has a sliding window that is shorter than a prompt with a picture."""
    return paligemma(model_type="gemma2", sliding_window=8, query_pre_attn_scalar=16)


def gemma3() -> Checkpoint:
    """One layer of each kind; the sliding window is shorter than a prompt with a picture."""
    tokens = tokenizer(boi_token="<soi>", eoi_token="<eoi>", image_token="<image>")
    config = hf.Gemma3Config(
        text_config=text(
            tokens, head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=16
        ),
        vision_config=SIGLIP, mm_tokens_per_image=4,
        boi_token_index=tokens.boi_token_id, eoi_token_index=tokens.eoi_token_id, image_token_index=tokens.image_token_id,
    )  # fmt: skip
    images = Gemma3ImageProcessorPil(size=SQUARE)
    return Checkpoint(
        hf.Gemma3ForConditionalGeneration(config),
        hf.Gemma3Processor(images, tokens, image_seq_length=4, chat_template=template("<soi>")),
    )


def gemma4() -> Checkpoint:
    """One layer of each kind, of different widths; the sliding window is shorter than a picture."""
    marks = ("boi", "image", "eoi", "boa", "audio", "eoa")
    tokens = tokenizer(**{f"{mark}_token": f"<|{mark}|>" for mark in marks})
    images = Gemma4ImageProcessorPil(patch_size=4, max_soft_tokens=70, pooling_kernel_size=2)
    processor = picture_processor(hf.Gemma4Processor)(
        hf.Gemma4AudioFeatureExtractor(), images, tokens, NoVideos(), image_seq_length=70, chat_template=template("<|image|>")
    )
    layers = ["sliding_attention", "full_attention"]
    config = hf.Gemma4Config(
        text_config=text(
            tokens, head_dim=16, global_head_dim=32, sliding_window=8, layer_types=layers, use_bidirectional_attention="vision",
            vocab_size_per_layer_input=len(tokens), hidden_size_per_layer_input=8,
        ),
        vision_config={
            **VISION, "num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "pooling_kernel_size": 2,
            "position_embedding_size": 64,
        },
        boi_token_id=tokens.boi_token_id, eoi_token_id=tokens.eoi_token_id, image_token_id=tokens.image_token_id,
        boa_token_id=tokens.boa_token_id, eoa_token_index=tokens.eoa_token_id, audio_token_id=tokens.audio_token_id,
        video_token_id=processor.video_token_id,
    )  # fmt: skip
    return Checkpoint(hf.Gemma4ForConditionalGeneration(config), processor)


def _minicpm(config_class: Any, model_class: Any, processor_class: Any, *ids: str) -> Checkpoint:
    """One layer with linear attention and one with full attention; larger pictures are cut into slices."""
    names = (
        "image",
        "video",
        "image_start",
        "image_end",
        "slice_start",
        "slice_end",
        "image_id_start",
        "image_id_end",
        "newline",
    )
    tokens = tokenizer(**{f"{name}_token": f"<|{name}|>" for name in names})
    layers = ["linear_attention", "full_attention"]
    linear = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
    config = config_class(
        text_config={"model_type": "qwen3_5_text", **text(tokens, head_dim=16, layer_types=layers, **linear)},
        vision_config={**VISION, "image_size": 64, "patch_size": 8}, insert_layer_id=0, image_size=64,
        image_token_id=tokens.image_token_id, video_token_id=tokens.video_token_id,
        **{f"{name}_id": tokens.convert_tokens_to_ids(f"<|{name}|>") for name in ids},
    )  # fmt: skip
    images = MiniCPMV4_6ImageProcessorPil(scale_resolution=48, patch_size=8, max_slice_nums=4)
    processor = picture_processor(processor_class)(images, NoVideos(), tokens, chat_template=template("<|image|>"))
    return Checkpoint(model_class(config), processor)


def minicpmv4_6() -> Checkpoint:
    return _minicpm(hf.MiniCPMV4_6Config, hf.MiniCPMV4_6ForConditionalGeneration, hf.MiniCPMV4_6Processor)


def minicpmv4_7() -> Checkpoint:
    marks = ("image_start", "image_end", "slice_start", "slice_end", "newline")
    return _minicpm(hf.MiniCPMV4_7Config, hf.MiniCPMV4_7ForConditionalGeneration, hf.MiniCPMV4_7Processor, *marks)


@dataclass(frozen=True)
class Entry:
    build: Callable[[], Checkpoint]
    adapted: tuple[int, ...] = (0, 1)
    """The text layers that have an adapter."""
    dynamic: bool = False
    """Whether the number of tokens depends on the picture's size."""


FAMILIES = {
    "idefics3": Entry(idefics3, dynamic=True),
    "smolvlm": Entry(smolvlm, dynamic=True),
    "llava": Entry(llava),
    "llava_next": Entry(llava_next, dynamic=True),
    "llava_onevision": Entry(llava_onevision, dynamic=True),
    "internvl": Entry(internvl, dynamic=True),
    "qwen2_vl": Entry(qwen2_vl, dynamic=True),
    "qwen2_5_vl": Entry(qwen2_5_vl, dynamic=True),
    "qwen3_vl": Entry(qwen3_vl, dynamic=True),
    "qwen3_5": Entry(qwen3_5, adapted=(1,), dynamic=True),
    "glm4v": Entry(glm4v, dynamic=True),
    "paligemma": Entry(paligemma),
    "paligemma2": Entry(paligemma2),
    "gemma3": Entry(gemma3),
    "gemma4": Entry(gemma4, dynamic=True),
    "minicpmv4_6": Entry(minicpmv4_6, adapted=(1,), dynamic=True),
    "minicpmv4_7": Entry(minicpmv4_7, adapted=(1,), dynamic=True),
}


def save(name: str, folder: Path) -> None:
    """Write the checkpoint. Its weights are large enough that a wrong picture, mask or position changes the results."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        checkpoint = FAMILIES[name].build()
        with torch.no_grad():
            for weight in checkpoint.model.parameters():
                if weight.dim() > 1:
                    weight.normal_(std=weight[0].numel() ** -0.5)
    for token, i in (("pad", 0), ("bos", 1), ("eos", 2)):
        setattr(checkpoint.model.generation_config, f"{token}_token_id", i)
    checkpoint.model.save_pretrained(folder)
    checkpoint.processor.save_pretrained(folder)
