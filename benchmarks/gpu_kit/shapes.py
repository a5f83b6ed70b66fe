"""Models of the shapes of SmolVLM-500M, SmolVLM-2.2B and Qwen2.5-VL-3B with random weights, made in memory without any file.

Speed and memory depend on shapes and types of tensors, not on their values. Only the vocabulary is made up: the tokenizer knows
few words and gives small ids, while the embedding and the head have their published size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers as hf
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import is_torchvision_available

from contenders.workload import ALPHA, RANK
from fedmllm.config import LoraTable, ModelTable
from fedmllm.models.backbone import Backbone
from fedmllm.models.families import family_of
from fedmllm.models.mllm import MLLM
from fedmllm.models.outline import SHAPES as PUBLISHED
from fedmllm.models.processors import NoVideos, picture_processor
from recipes.pocket import architecture

Made = tuple[type[Any], Any, Any]
"""(class of the model, its config, its processor)."""
QWEN_MARKS = {
    "vision_start_token": "<|vision_start|>",
    "image_token": "<|image_pad|>",
    "vision_end_token": "<|vision_end|>",
    "video_token": "<|video_pad|>",
}
TINY_TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def _tokenizer(**named: str) -> Any:
    """A byte-level BPE trained on a few texts; `named` are special tokens that the family's processor requires."""
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=architecture.build_tokenizer(documents=40, vocabulary=400).backend_tokenizer,
        pad_token=architecture.PAD, bos_token=architecture.BEGIN, eos_token=architecture.END,
        padding_side="left", model_max_length=4096, extra_special_tokens=named,
    )  # fmt: skip


def _images(name: str, on_pillow: type[Any], **options: Any) -> Any:
    """The image processor that transformers itself would choose: torchvision's if that is installed."""
    return (getattr(hf, name) if is_torchvision_available() else on_pillow)(**options)


def _template(picture: str) -> str:
    return architecture.CHAT_TEMPLATE.replace("'<image>'", repr(picture))


def smolvlm(tiny: bool, name: str = "HuggingFaceTB/SmolVLM-Instruct") -> Made:
    """SmolVLM-Instruct: 24 layers of width 2048 after a SigLIP of 27; SmolVLM-500M-Instruct: 32 of width 960 after a SigLIP of
    12. A square picture is cut into four tiles and shown once as a whole, 405 and 320 tokens in all; the published processor
    would upscale it to 16 tiles, longer than `train.max_length`."""
    tokens, published = _tokenizer(), PUBLISHED[name][1]
    text, vision, scale = dict(published["text_config"]), dict(published["vision_config"]), published["scale_factor"]
    if tiny:
        text = {**TINY_TEXT, "num_key_value_heads": TINY_TEXT["num_attention_heads"]}
        vision, scale = {**TINY_TEXT, "hidden_size": 24, "patch_size": 8, "image_size": 32}, 2
    tile = vision["image_size"]
    count = (tile // vision["patch_size"] // scale) ** 2
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    text |= {"model_type": "llama", **ids}
    text |= {"vocab_size": len(tokens) if tiny else text["vocab_size"], "max_position_embeddings": 16384}
    config = hf.Idefics3Config(
        text_config=text, vision_config=vision, scale_factor=scale,
        image_token_id=tokens.convert_tokens_to_ids(architecture.IMAGE), pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    sizes = {"size": {"longest_edge": 2 * tile}, "max_image_size": {"longest_edge": tile}}
    images = _images("Idefics3ImageProcessor", Idefics3ImageProcessorPil, do_image_splitting=True, **sizes)
    template = _template(architecture.IMAGE)
    processor = hf.Idefics3Processor(images, tokens, image_seq_len=count, chat_template=template)
    return hf.Idefics3ForConditionalGeneration, config, processor


def qwen(tiny: bool) -> Made:
    """Qwen2.5-VL-3B-Instruct: 36 layers of width 2048 with two key heads after a tower of 32. A picture of 560 × 560 pixels has
    400 tokens."""
    tokens, published = _tokenizer(**QWEN_MARKS), PUBLISHED["Qwen/Qwen2.5-VL-3B-Instruct"][1]
    text, vision, pixels = dict(published["text_config"]), dict(published["vision_config"]), 1280 * 28 * 28
    if tiny:
        rope = {**text["rope_parameters"], "mrope_section": [2, 3, 3]}
        text = {**TINY_TEXT, "num_key_value_heads": 2, "rope_parameters": rope, "vocab_size": len(tokens)}
        vision = {"hidden_size": 32, "intermediate_size": 48, "depth": 2, "num_heads": 2, "patch_size": 8, "window_size": 32}
        vision |= {"out_hidden_size": text["hidden_size"], "fullatt_block_indexes": [1]}
        pixels = 4096
    text |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True}
    config = hf.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True,
        **{f"{name}_id": tokens.convert_tokens_to_ids(mark) for name, mark in QWEN_MARKS.items()},
    )  # fmt: skip
    sizes = {"shortest_edge": pixels // 320, "longest_edge": pixels}
    images = _images(
        "Qwen2VLImageProcessor", Qwen2VLImageProcessorPil, patch_size=vision["patch_size"], merge_size=2, size=sizes
    )
    template = _template("".join(QWEN_MARKS[f"{name}_token"] for name in ("vision_start", "image", "vision_end")))
    processor = picture_processor(hf.Qwen2_5_VLProcessor)(images, tokens, NoVideos(), chat_template=template)
    return hf.Qwen2_5_VLForConditionalGeneration, config, processor


SHAPES: dict[str, Callable[[bool], Made]] = {
    "smolvlm-500m": partial(smolvlm, name="HuggingFaceTB/SmolVLM-500M-Instruct"),
    "smolvlm-2.2b": smolvlm,
    "qwen2.5-vl-3b": qwen,
}
"""Name -> what builds it; with True at the size of a toy, to try the kit on a CPU."""
PICTURE_SIZE = {False: 560, True: 64}
"""Width and height of the pictures, by whether the model is a toy."""


def make(shape: str, device: torch.device, dtype: torch.dtype, tiny: bool = False) -> MLLM:
    """A frozen model with random weights and a LoRA adapter on the attention of its text model."""
    model_class, config, processor = SHAPES[shape](tiny)
    with torch.device(device):
        model = model_class._from_config(config, dtype=dtype).requires_grad_(False).eval()
    for token, number in (("pad", 0), ("bos", 1), ("eos", 2)):
        setattr(model.generation_config, f"{token}_token_id", number)
    backbone = Backbone(
        model, processor, family_of(config.model_type), device, dtype,
        end_ids=(2,), answer_frame=(" ", f"{architecture.END}\n"),
    )  # fmt: skip
    return MLLM(backbone, ModelTable(name=shape, lora=LoraTable(rank=RANK, alpha=ALPHA), device=str(device)), seed=0)
