"""A model that accelerate spreads over several devices, as far as one processor can show: its hooks, and an adapter whose
values, optimizer and gradients are elsewhere than its parameters."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import dispatch_model
from transformers import AutoModelForImageTextToText

from fedmllm.algorithms import LocalRule
from fedmllm.config import LoraTable, ModelTable, TrainTable, validate
from fedmllm.errors import ConfigError
from fedmllm.models import adapter, placement
from fedmllm.models.backbone import load_backbone
from fedmllm.models.mllm import MLLM
from fedmllm.models.scoring import option_scores
from fedmllm.tensors import Tensors, digest, distance
from fedmllm.training.capacity import cohort_size
from fedmllm.training.cohort import Work, train_cohort
from tiny_families import save, without_torchvision_and_num2words
from tiny_models import CLOSED, OPEN, last_logits

TALKS = [*OPEN, CLOSED]
AUTO = ModelTable(device_map="auto")
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def pictures(dataset: Path) -> list[Path | None]:
    return [dataset / "red.png", None, dataset / "blue.png"]


# Settings


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"device": "cuda:1"}, "^model.device = 'cuda:1' names one device, and model.device_map = \"auto\" uses all GPUs"),
        ({"quantize": "4bit"}, "^model.quantize = '4bit' keeps the model on one GPU"),
    ],
)
def test_what_excludes_a_device_map(model: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate({"task": {"name": "shapes-qa"}, "model": {"device_map": "auto", **model}})


def test_a_device_map_is_for_gpus() -> None:
    assert placement.device_map(AUTO, CUDA) == {"device_map": "auto"}
    assert placement.device_map(AUTO, CPU) == placement.device_map(ModelTable(), CUDA) == {}


def test_weights_outside_of_the_gpus_are_refused() -> None:
    placement.check_on_gpus(AUTO, SimpleNamespace())
    placement.check_on_gpus(AUTO, SimpleNamespace(hf_device_map={"model.visual": 0, "lm_head": 1}))
    for where in ("cpu", "disk"):
        spread = SimpleNamespace(hf_device_map={"model.visual": 0, "model.language_model.layers.9": where, "lm_head": where})
        with pytest.raises(ConfigError, match=r"does not fit .* leave 'lm_head' and 1 more of its parts outside, where they"):
            placement.check_on_gpus(AUTO, spread)


def test_without_a_gpu_the_setting_changes_nothing(settings: ModelTable, model: MLLM, pictures: list[Path | None]) -> None:
    mapped = MLLM.load(settings.model_copy(update={"device_map": "auto"}), seed=0)
    assert (mapped.backbone.device, mapped.adapter.spread, mapped.adapter.stacks, mapped.fused) == (CPU, False, True, True)
    logits = [last_logits(m, m.encode(TALKS, pictures, 200)) for m in (model, mapped)]
    assert torch.equal(*logits)


# A model under accelerate's hooks


def spread_out(settings: ModelTable, monkeypatch: pytest.MonkeyPatch) -> MLLM:
    """The model with hooks around each part, treated as if its adapter were on several devices."""
    backbone = load_backbone(settings)
    places = {**{f"model.{name}": "cpu" for name, _ in backbone.model.model.named_children()}, "lm_head": "cpu"}
    dispatch_model(backbone.model, places, force_hooks=True, skip_keys=backbone.model._skip_keys_device_placement)
    monkeypatch.setattr(adapter, "on_several_devices", lambda parameters: True)
    model = MLLM(backbone, settings, seed=0)
    monkeypatch.undo()
    assert (model.adapter.spread, model.adapter.stacks, model.fused) == (True, False, False)
    return model


@pytest.mark.parametrize("lora", [LoraTable(rank=2, alpha=4.0), LoraTable(rank=2, alpha=4.0, whole="projector")])
def test_an_adapter_on_several_devices_trains_the_same(
    settings: ModelTable, pictures: list[Path | None], lora: LoraTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of two micro-batches, with a frozen tensor: copies on the devices follow the values, gradients come back."""
    settings = settings.model_copy(update={"lora": lora})
    plain, spread = MLLM.load(settings, seed=0), spread_out(settings, monkeypatch)
    start = plain.adapter.get()
    assert digest(start) == digest(spread.adapter.get())
    frozen = min(start)
    rule = LocalRule(trainable=lambda name: name != frozen)
    trained: list[Tensors] = []
    for model in (plain, spread):
        batch = model.encode(TALKS, pictures, 200)
        work = Work([[batch[:2], batch[2:]]] * 2, start, rule, 0)
        trained.append(train_cohort(model, [work], TrainTable(optimizer="adamw", lr=1e-2))[0].trained)
        assert digest(model.adapter.get()) == digest(start), "the model's own adapter is unchanged"
    assert distance(trained[0], trained[1]) < 1e-4 * distance(trained[0], start)
    assert torch.equal(trained[1][frozen], start[frozen])
    assert sum(torch.equal(trained[1][name], start[name]) for name in start) == 1
    assert all(parameter.grad is None for parameter in spread.adapter.parameters.values())


def test_one_client_trains_at_a_time_on_several_devices(settings: ModelTable, monkeypatch: pytest.MonkeyPatch) -> None:
    model = spread_out(settings, monkeypatch)
    assert cohort_size(model, [], TrainTable(), 8) == 1
    with pytest.raises(ConfigError, match=r"train.cohort = 4: .* on several GPUs, trains one client at a time"):
        cohort_size(model, [], TrainTable(cohort=4), 8)


@pytest.mark.parametrize("family", ["qwen3_vl", "llava"])
def test_hooks_pass_cached_features_on(
    family: str, pictures: list[Path | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One list of features with those for DeepStack, and one tensor; scores from a cached prompt; generated answers."""
    with without_torchvision_and_num2words():
        save(family, tmp_path)
        settings = ModelTable(name=str(tmp_path), lora=LoraTable(rank=2, alpha=4.0), precision="fp32")
        plain, spread = MLLM.load(settings, seed=0), spread_out(settings, monkeypatch)
        assert spread.caches
        results = []
        for model in (plain, spread):
            batch = model.encode(TALKS, pictures, 200)
            results.append((last_logits(model, batch), option_scores(model, batch[2:]), model.generate(batch, 3)))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1:] == results[1][1:]


def test_inputs_go_where_the_embeddings_are(tiny: Path, settings: ModelTable, monkeypatch: pytest.MonkeyPatch) -> None:
    """That need not be the device that comes first."""
    load = AutoModelForImageTextToText.from_pretrained

    def placed(*arguments: object, **options: object) -> object:
        model = load(*arguments, **options)
        model.get_input_embeddings().to("meta")
        return model

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", placed)
    monkeypatch.setattr("fedmllm.models.backbone.device_map", lambda settings, device: {"device_map": {"": "cpu"}})
    assert load_backbone(settings).device == torch.device("meta")
