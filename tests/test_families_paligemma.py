"""PaliGemma's prompts, which have no chat format."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from fedmllm.config import LoraTable, ModelTable
from fedmllm.data.prompts import Conversation
from fedmllm.models.mllm import MLLM
from tiny_families import save

# PaliGemma's processor converts a tensor to a numpy array in a deprecated way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
WITH_PICTURE = Conversation("which color is it?", "red", image=True)
TEXT_ONLY = Conversation("name the color.", "blue", image=False)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.effect_noise((96, 48), 60).convert("RGB").save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.fixture
def paligemma(tmp_path: Path) -> MLLM:
    save("paligemma", tmp_path / "model")
    return MLLM.load(ModelTable(name=str(tmp_path / "model"), lora=LoraTable(rank=2), precision="fp32"), seed=0)


def test_paligemma_prompts_have_the_format_of_the_processor(paligemma: MLLM, picture: Path) -> None:
    """With a picture, prompt, answer and token types equal the processor's output for `suffix`."""
    (sample,) = paligemma.encode([WITH_PICTURE], [picture], 300)
    expected = paligemma.backbone.processor(
        images=Image.open(picture), text="<image>" + WITH_PICTURE.user, suffix=WITH_PICTURE.answer, return_tensors="pt"
    )
    inputs = paligemma.collate([sample], [sample.answer])
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    assert torch.equal(inputs["token_type_ids"], expected["token_type_ids"])
    assert inputs["position_ids"][0].tolist() == list(range(1, sample.length + 1))


def test_paligemma_prompts_without_a_picture_have_the_same_format(paligemma: MLLM) -> None:
    (sample,) = paligemma.encode([TEXT_ONLY], [None], 300)
    assert paligemma.backbone.tokenizer.decode(sample.prompt) == "<begin>name the color.\n"
    types = paligemma.collate([sample], [sample.answer])["token_type_ids"][0].tolist()
    assert types == [0] * len(sample.prompt) + [1] * len(sample.answer)
