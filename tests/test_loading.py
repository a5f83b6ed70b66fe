"""Loading a model: code from its repository, 4-bit weights, processors, and the errors if loading fails."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from transformers import dynamic_module_utils
from transformers.models.smolvlm import processing_smolvlm

from fedmllm.config import LoraTable, ModelTable
from fedmllm.data.prompts import Conversation
from fedmllm.errors import ConfigError
from fedmllm.models import processors, quantized
from fedmllm.models.mllm import MLLM
from tiny_families import save

TALK = Conversation("name the color.", "blue", image=False)


# Code from the model's repository


@pytest.fixture
def with_code(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint with classes of its own. Importing its code creates a file `ran` in the folder."""
    folder = tmp_path / "with-code"
    shutil.copytree(tiny, folder)
    (folder / "configuration_own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import Idefics3Config\n"
        f"Path({str(folder / 'ran')!r}).touch()\n"
        "class OwnConfig(Idefics3Config):\n"
        "    model_type = 'own'\n"
    )
    (folder / "modeling_own.py").write_text(
        "from transformers import Idefics3ForConditionalGeneration\n"
        "from .configuration_own import OwnConfig\n"
        "class OwnModel(Idefics3ForConditionalGeneration):\n"
        "    config_class = OwnConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnModel"]}
    config["auto_map"] = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForImageTextToText": "modeling_own.OwnModel",
    }
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])  # transformers prepends its folder of modules
    return folder


def test_code_of_the_model_runs_if_the_settings_allow_it(with_code: Path, tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = ModelTable(name=str(with_code), lora=LoraTable(rank=2), precision="fp32", trust_remote_code=True)
    model = MLLM.load(settings, seed=0)
    (warning,) = [record for record in caplog.records if record.name.startswith("fedmllm")]
    assert warning.levelname == "WARNING"
    assert warning.getMessage().endswith(f"code from the repository of {with_code} will run on this machine.")
    assert type(model.backbone.model).__name__ == "OwnModel"
    same = MLLM.load(settings.model_copy(update={"name": str(tiny), "trust_remote_code": False}), seed=0)
    with torch.no_grad():
        assert model.loss(model.encode([TALK], [None], 100)) == same.loss(same.encode([TALK], [None], 100))


def test_code_of_the_model_does_not_run_by_default(with_code: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(
        ConfigError, match=r"requires code from its repository; .* set model.trust_remote_code = true"
    ) as caught:
        MLLM.load(ModelTable(name=str(with_code)), seed=0)
    assert "\n" not in str(caught.value)
    assert not (with_code / "ran").exists()
    assert not caplog.records


# 4-bit weights


def test_4_bits_require_a_gpu(tiny: Path) -> None:
    with pytest.raises(ConfigError, match=r'^model.quantize = \'4bit\' requires a GPU, .* "cpu"; set it to "none"\.$'):
        MLLM.load(ModelTable(name=str(tiny), device="cpu", quantize="4bit"), seed=0)


def test_4_bits_require_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "find_spec", lambda name: None if name == "bitsandbytes" else ModuleType(name))
    with pytest.raises(ConfigError, match=r'requires bitsandbytes; run pip install "fedmllm\[gpu\]" or set it to "none"\.$'):
        quantized.quantization(ModelTable(quantize="4bit"), torch.device("cuda"))


def test_4_bits_are_nf4_and_compute_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "find_spec", ModuleType)
    device = torch.device("cuda")
    arguments = quantized.quantization(ModelTable(quantize="4bit"), device)
    assert arguments["device_map"] == {"": device}
    config = arguments["quantization_config"]
    assert config.load_in_4bit
    assert config.bnb_4bit_quant_type == "nf4"
    assert config.bnb_4bit_compute_dtype is torch.bfloat16
    assert quantized.quantization(ModelTable(), device) == {}


class Packed(nn.Module):
    """Imitates a quantised linear layer, whose weight consists of bytes and has another shape than the matrix."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.matrix = [linear.weight.detach()]
        packed = torch.arange(linear.weight.numel() // 2, dtype=torch.int64).to(torch.uint8).unsqueeze(1)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.matrix[0])


def test_a_fold_does_not_change_packed_weights(model: MLLM) -> None:
    """bitsandbytes stores two weights per byte, to which nothing can be added, so the fold is computed in a separate branch."""
    name = next(iter(model.adapter.parameters)).rpartition(".lora_")[0]
    layer = model.model.get_submodule(name)
    layer.base_layer = Packed(layer.base_layer)
    before = layer.base_layer.weight.clone()
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    output = layer(x)
    fold = {f"{name}.fold_A": torch.full((1, 32), 0.5), f"{name}.fold_B": torch.full((32, 1), 2.0)}
    model.adapter.set_fold(fold)
    torch.testing.assert_close(layer(x), output + x.sum(1, keepdim=True).expand(3, 32))
    model.adapter.set_fold({})
    assert torch.equal(layer(x), output)
    assert torch.equal(layer.base_layer.weight, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_lora_trains_on_4_bit_weights(tiny: Path, dataset: Path) -> None:
    pytest.importorskip("bitsandbytes")
    settings = ModelTable(name=str(tiny), lora=LoraTable(rank=2, alpha=4.0), quantize="4bit")
    model = MLLM.load(settings, seed=0)
    batch = model.encode([Conversation("which color is it?", "red", image=True), TALK], [dataset / "red.png", None], 100)
    model.prepare_features()
    name = next(iter(model.adapter.parameters)).rpartition(".lora_")[0]
    packed = model.model.get_submodule(name).base_layer.weight
    assert packed.dtype is torch.uint8
    before = packed.clone()
    optimizer = torch.optim.AdamW(model.adapter.parameters.values(), lr=2e-2)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model.loss(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.dtype is torch.float32 and p.grad is not None for p in model.adapter.parameters.values())
    fold = {f"{name}.fold_A": torch.full((1, 32), 0.5), f"{name}.fold_B": torch.full((32, 1), 2.0)}
    model.adapter.set_fold(fold)
    with torch.no_grad():
        assert model.loss(batch).item() != pytest.approx(losses[-1], rel=1e-4)
    assert torch.equal(packed, before)


# Processors


def test_a_model_without_a_chat_template_is_rejected(tmp_path: Path) -> None:
    save("gemma3", tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match=r"has no chat template, so it cannot answer prompts; choose its instruct version"):
        MLLM.load(ModelTable(name=str(tmp_path)), seed=0)


def test_the_error_names_a_missing_library_of_a_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processors, "is_torchvision_available", lambda: False)
    monkeypatch.setattr(processing_smolvlm, "num2words", str)
    save("smolvlm", tmp_path)
    monkeypatch.setattr(processing_smolvlm, "num2words", None)
    with pytest.raises(ConfigError, match=r"cannot be loaded .*pip install num2words"):
        MLLM.load(ModelTable(name=str(tmp_path)), seed=0)


def test_a_processor_without_videos_is_otherwise_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The placeholder replaces only the video processor; other parts of a wrong type are still rejected."""
    monkeypatch.setattr(processors, "is_torchvision_available", lambda: False)
    save("qwen2_vl", tmp_path)
    processor = MLLM.load(ModelTable(name=str(tmp_path), precision="fp32"), seed=0).backbone.processor
    assert isinstance(processor.video_processor, processors.NoVideos)
    assert type(processor).__mro__[1].__name__ == type(processor).__name__ == "Qwen2VLProcessor"
    with pytest.raises(TypeError, match="image_processor"):
        type(processor)(processor.tokenizer, processor.tokenizer, processor.video_processor)


def test_a_processor_in_the_older_file_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen2-VL's repository has no processor_config.json, but separate files for picture settings and chat template."""
    monkeypatch.setattr(processors, "is_torchvision_available", lambda: False)
    save("qwen2_vl", tmp_path)
    processor = MLLM.load(ModelTable(name=str(tmp_path), precision="fp32"), seed=0).backbone.processor
    settings = json.loads((tmp_path / "processor_config.json").read_text())["image_processor"]
    settings |= {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    template = (tmp_path / "chat_template.jinja").read_text()
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    for name in ("processor_config.json", "chat_template.jinja"):
        (tmp_path / name).unlink()
    older = MLLM.load(ModelTable(name=str(tmp_path), precision="fp32"), seed=0).backbone.processor
    assert older.chat_template == processor.chat_template
    assert older.image_processor.to_dict() == processor.image_processor.to_dict()
