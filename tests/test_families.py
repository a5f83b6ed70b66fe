"""Other families of transformers, on tiny random checkpoints: nothing in the package may be particular to the pocket model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin

from fedmllm.algorithms import LocalRule
from fedmllm.config import LoraTable, ModelTable
from fedmllm.data.prompts import Conversation
from fedmllm.models.mllm import MLLM
from fedmllm.models.pocket import architecture as parts
from fedmllm.tensors import distance
from fedmllm.training.local import LocalSettings, train_local

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
VISION = "<|vision_start|><|image_pad|><|vision_end|>"
"""How Qwen's templates mark a picture."""


def _tokenizer(*special: str):
    tokenizer = parts.build_tokenizer(documents=40, vocabulary=400)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


def _template(image: str) -> str:
    return parts.CHAT_TEMPLATE.replace("'<image>'", repr(image))


def _ids(tokenizer) -> dict[str, int]:
    return {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def llava(folder: Path) -> ProcessorMixin:
    tokenizer = _tokenizer()
    vision = {"model_type": "clip_vision_model", "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8, "projection_dim": 24}
    config = LlavaConfig(
        vision_config=vision,
        text_config={"model_type": "llama", **TEXT, **_ids(tokenizer)},
        image_token_id=3,
        image_seq_length=16,
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", image_token="<image>",
        num_additional_image_tokens=1, chat_template=_template("<image>"),
    )  # fmt: skip
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    return processor


def _qwen(folder: Path, config_class, model_class, processor_class, vision: dict[str, object]) -> ProcessorMixin:
    marks = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
    tokenizer = _tokenizer(*marks)
    start, pad, end, video = (tokenizer.convert_tokens_to_ids(mark) for mark in marks)
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    vision = {"depth": 2, "num_heads": 2, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2, **vision}
    config = config_class(
        text_config={**TEXT, **_ids(tokenizer), "rope_parameters": rope, "max_position_embeddings": 512, "head_dim": 16},
        vision_config=vision,
        image_token_id=pad, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end,
    )  # fmt: skip
    images = Qwen2VLImageProcessorPil(
        patch_size=8, temporal_patch_size=2, merge_size=2, size={"shortest_edge": 1024, "longest_edge": 4096}
    )
    model_class(config).save_pretrained(folder)
    # These processors cannot be saved and loaded without torchvision, which their videos need; pictures do not.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *_: object)
        return processor_class(images, tokenizer, chat_template=_template(VISION))


def qwen2_vl(folder: Path) -> ProcessorMixin:
    return _qwen(folder, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor, {"embed_dim": 32, "hidden_size": 32})


def qwen3_vl(folder: Path) -> ProcessorMixin:
    """With DeepStack features, which go into several layers of the text model."""
    vision = {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "deepstack_visual_indexes": [0, 1]}
    vision |= {"num_position_embeddings": 64}
    return _qwen(folder, Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor, vision)


@pytest.fixture(params=[llava, qwen2_vl, qwen3_vl], ids=lambda f: f.__name__)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make: Callable[[Path], ProcessorMixin] = request.param
    with torch.random.fork_rng():
        torch.manual_seed(0)
        processor = make(tmp_path / "model")
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda *_: processor)
    return tmp_path / "model"


def test_cached_equals_uncached_and_training_works(checkpoint: Path, tmp_path: Path) -> None:
    for name, size in (("red", (48, 32)), ("blue", (32, 32))):
        Image.effect_noise(size, 90).convert("RGB").save(tmp_path / f"{name}.png")
    talks = [
        Conversation("which color is it?", "red", image=True),
        Conversation("name the color.", "blue", image=False),
        Conversation("which option is right?", "(A) red", image=True, options=("(A) red", "(B) blue")),
    ]
    pictures = [tmp_path / "red.png", None, tmp_path / "blue.png"]
    found = []
    for caches in (True, False):
        settings = ModelTable(name=str(checkpoint), lora=LoraTable(rank=2), precision="fp32", cache_features=caches)
        model = MLLM.load(settings, seed=0)
        assert model.caches == caches
        assert model.info.layers == 2
        assert len(model.adapter.parameters) == 2 * 4 * 2
        batch = model.encode(talks, pictures, 300)
        model.prepare_features()
        result = train_local(
            model, [[batch]] * 2, model.adapter.get(), LocalRule(), LocalSettings("sgd", 0.5, 0.0, (0.9, 0.95), 0.0, 1.0), 0
        )
        assert distance(result.trained, result.received) > 1e-3
        found.append((model.loss(batch).item(), model.option_scores(batch[2:]), model.generate(batch, 3), result.trained))
        alone = sum(model.loss([one]).item() for one in batch)
        assert found[-1][0] == pytest.approx(alone, rel=1e-4)
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    torch.testing.assert_close(torch.tensor(found[0][1]), torch.tensor(found[1][1]), rtol=1e-3, atol=1e-4)
    assert found[0][2] == found[1][2]
    assert distance(found[0][3], found[1][3]) < 1e-3
