"""Which parts of a model are trained: presets of `model.lora.target`, and the connector trained whole beside LoRA."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForImageTextToText

from commands import call, run
from fedmllm.algorithms import LocalRule, algorithms
from fedmllm.config import LoraTable, ModelTable, TrainTable, validate
from fedmllm.errors import ConfigError
from fedmllm.experiment.compatibility import check_adapter
from fedmllm.models.families import Family, family_of
from fedmllm.models.mllm import MLLM
from fedmllm.models.targets import target_modules, whole_modules
from fedmllm.storage.run_dir import RunDir
from fedmllm.tensors import digest, distance
from fedmllm.training import cohort
from fedmllm.training.cohort import Work, train_cohort
from naive_training import train_naively
from tiny_families import FAMILIES, without_torchvision_and_num2words
from tiny_models import CLOSED, OPEN, last_logits, perturb, plain_peft

TALKS = [*OPEN, CLOSED]
WHOLE = LoraTable(rank=2, alpha=4.0, whole="projector")
ADAMW = TrainTable(optimizer="adamw", lr=1e-2)
_MLP = ["model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"]
_MERGER = ["model.visual.merger.mlp.0", "model.visual.merger.mlp.2"]
_DEEP = [
    f"model.visual.{name}.linear_fc{i}"
    for name in ("deepstack_merger_list.0", "deepstack_merger_list.1", "merger")
    for i in (1, 2)
]
PROJECTORS = {
    "idefics3": ["model.connector.modality_projection.proj"], "smolvlm": ["model.connector.modality_projection.proj"],
    "llava": _MLP, "llava_next": _MLP, "llava_onevision": _MLP, "internvl": _MLP,
    "qwen2_vl": _MERGER, "qwen2_5_vl": _MERGER, "qwen3_vl": _DEEP,
    "paligemma": ["model.multi_modal_projector.linear"], "paligemma2": ["model.multi_modal_projector.linear"],
    "qwen3_5": ["model.visual.merger.linear_fc1", "model.visual.merger.linear_fc2"],
    "glm4v": [f"model.visual.merger.{name}" for name in ("proj", "gate_proj", "up_proj", "down_proj")],
    "gemma4": ["model.embed_vision.embedding_projection"],
    "minicpmv4_6": ["model.merger.mlp.0.linear_1", "model.merger.mlp.0.linear_2"],
    "minicpmv4_7": ["model.merger.mlp.0.linear_1", "model.merger.mlp.0.linear_2"],
}  # fmt: skip
"""The linear layers of each family's connector; Gemma 3 has none."""


@pytest.fixture
def pictures(dataset: Path) -> list[Path | None]:
    return [dataset / "red.png", None, dataset / "blue.png"]


@pytest.fixture
def whole(settings: ModelTable) -> MLLM:
    return MLLM.load(settings.model_copy(update={"lora": WHOLE}), seed=0)


# Presets


@pytest.mark.parametrize("name", FAMILIES)
def test_presets_share_out_the_linear_layers_of_every_family(name: str) -> None:
    with without_torchvision_and_num2words():
        model = FAMILIES[name].build().model
    family = family_of(model.config.model_type)
    linear = {module for module, layer in model.named_modules() if isinstance(layer, nn.Linear)} - {"lm_head"}
    presets = ["vision", "text", "projector"] if name in PROJECTORS else ["vision", "text"]
    parts = {preset: set(target_modules(model, preset, family)) for preset in presets}
    assert parts.get("projector", set()) == set(PROJECTORS.get(name, []))
    assert all(not first & second for first, second in combinations(parts.values(), 2))
    assert set().union(*parts.values()) == linear == set(target_modules(model, "+".join(presets), family))
    assert set(target_modules(model, "all-linear", family)) == parts["text"]
    assert set(target_modules(model, "attention+text", family)) == parts["text"], "attention is among them"
    attention = set(target_modules(model, "attention+vision", family)) - parts["vision"]
    assert {module.rpartition(".")[2] for module in attention} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    for root in whole_modules(model, family):
        assert not isinstance(model.get_submodule(root), nn.ModuleList)
        assert {family.part_of(module) for module, _ in model.named_modules() if module.startswith(root)} == {"projector"}
    if name not in PROJECTORS:
        with pytest.raises(
            ConfigError, match=r"'projector\+text': the 'projector' part .* no linear layer; set model.lora.whole"
        ):
            target_modules(model, "projector+text", family)


def test_the_default_is_attention_and_other_text_is_a_regular_expression() -> None:
    family = Family()
    assert target_modules(None, None, family) == target_modules(None, "attention", family) == family.target
    for expression in (".*(text|vision)", "vision+texts", ".*q_proj"):
        assert target_modules(None, expression, family) == expression


def test_what_a_model_lacks_is_refused() -> None:
    model = nn.Sequential(nn.ReLU())
    model.get_output_embeddings = lambda: None
    with pytest.raises(ConfigError, match=r"'vision': the 'vision' part of this model has no linear layer; leave it out\.$"):
        target_modules(model, "vision", Family())
    with pytest.raises(ConfigError, match=r'^model.lora.whole = "projector": no connector was found'):
        whole_modules(model, Family())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"adapter": {"kind": "ia3"}, "lora": {"whole": "projector"}},
            "model.lora.whole is set and model.adapter.kind = 'ia3'",
        ),
        ({"lora": {"whole": "projector", "target": "projector+text"}}, "puts LoRA on the connector, which .* trains whole"),
        ({"lora": {"whole": "projector"}, "quantize": "4bit"}, "trains the weights themselves, which .* stores in 4 bits"),
    ],
)
def test_what_excludes_a_whole_connector(model: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate({"task": {"name": "shapes-qa"}, "model": model})


def test_methods_on_factors_refuse_a_whole_connector(whole: MLLM) -> None:
    raw = {"task": {"name": "shapes-qa"}, "model": {"lora": {"whole": "projector"}}, "algorithm": {"name": "flora"}}
    with pytest.raises(ConfigError, match=r"cannot work with model.lora.whole = .projector. .*; set it to .none., or choose"):
        check_adapter(validate(raw), algorithms.build("flora", {}), whole.adapter.get(), whole.info)


# Training


def test_a_whole_connector_trains_as_the_naive_twin_does(whole: MLLM, pictures: list[Path | None]) -> None:
    batch = whole.encode(TALKS, pictures, 200)
    start = whole.adapter.get()
    assert (whole.caches, whole.fused) == (False, False)
    work = Work([[batch]] * 3, start, LocalRule(), 0)
    result, naive = train_cohort(whole, [work], ADAMW)[0], train_naively(whole, work, ADAMW)
    moved = distance(naive.trained, start)
    assert distance(result.trained, naive.trained) < 1e-4 * moved
    connector = {name for name in start if whole.info.part(name) == "projector"}
    assert connector == {"base_model.model.model.connector.modality_projection.proj.weight"}
    assert all(not torch.equal(result.trained[name], start[name]) for name in start)


@plain_peft
def test_a_whole_connector_is_set_left_out_exported_and_loaded_in_plain_peft(
    whole: MLLM, settings: ModelTable, tiny: Path, pictures: list[Path | None], tmp_path: Path
) -> None:
    batch = whole.encode(TALKS, pictures, 200)
    plain = MLLM.load(settings, seed=0)
    base = last_logits(plain, plain.encode(TALKS[:1], pictures[:1], 200))
    perturb(whole)
    changed = last_logits(whole, batch[:1])
    with whole.without_adapter():
        torch.testing.assert_close(last_logits(whole, batch[:1]), base, rtol=1e-4, atol=1e-5)
    whole.adapter.export(tmp_path / "adapter", "tiny")
    reloaded = MLLM.load(settings.model_copy(update={"lora": WHOLE}), seed=0)
    reloaded.adapter.load(tmp_path / "adapter")
    assert digest(reloaded.adapter.get()) == digest(whole.adapter.get())
    model = AutoModelForImageTextToText.from_pretrained(tiny, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    with torch.no_grad():
        logits = loaded(**whole.collate(batch[:1], [batch[0].answer])).logits[:, -1:]
    torch.testing.assert_close(logits, changed, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(changed, base, rtol=1e-2)


@pytest.mark.parametrize("lora", [WHOLE, LoraTable(rank=2, alpha=4.0)], ids=["whole connector", "stacked LoRA"])
def test_training_is_in_float32_beside_bfloat16_weights(
    settings: ModelTable, pictures: list[Path | None], lora: LoraTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16, weights above 1/16 are at least 4.9e-4 apart, so that three steps of 1e-4 could not move them by less."""
    made: list[torch.optim.Optimizer] = []
    optimizer = cohort._optimizer
    monkeypatch.setattr(cohort, "_optimizer", lambda rows, train: made.append(optimizer(rows, train)) or made[-1])
    model = MLLM.load(settings.model_copy(update={"lora": lora, "precision": "bf16"}), seed=0)
    assert model.backbone.dtype is torch.bfloat16
    start = perturb(model)
    batch = model.encode(TALKS, pictures, 200)
    train = TrainTable(optimizer="adamw", lr=1e-4, schedule="constant", weight_decay=0.0)
    result = train_cohort(model, [Work([[batch]] * 3, start, LocalRule(observe_gradient=True), 0)], train)[0]
    for name, tensor in result.trained.items():
        assert tensor.dtype is torch.float32
        moved = float((tensor - start[name]).abs()[start[name].abs() > 1 / 16].max())
        assert 0 < moved < 4e-4, f"{name} moved by {moved}"
    states = [value for state in made[0].state.values() for value in state.values() if torch.is_tensor(value)]
    assert {value.dtype for value in states} == {torch.float32}
    assert result.mean_gradient is not None
    assert {gradient.dtype for gradient in result.mean_gradient.values()} == {torch.float32}


# Runs


def test_check_and_a_run_count_by_part(write_experiment: Callable[..., Path], tmp_path: Path) -> None:
    file, settings = write_experiment(rounds=1), ("--set", "model.lora.whole=projector", "--set", "eval.patterns=['both']")
    checked = call("check", file, *settings)
    assert checked.exit_code == 0, checked.output
    result = run("run", file, *settings, "--out", tmp_path / "run")
    sizes = result["adapter_parameters"]
    assert set(sizes) == {"text", "projector"}
    assert (
        f"an adapter of {sum(sizes.values())} parameters (projector {sizes['projector']}, text {sizes['text']});"
        in checked.output
    )
    expected = {part: 2 * 4 * count for part, count in sizes.items()}
    assert result["bytes_by_part"] == {"up": expected, "down": expected}
    assert sum(expected.values()) == result["bytes_up"]["adapter"]
    record = RunDir(tmp_path / "run").rounds()[0]
    assert (record["parts_up"], record["parts_down"]) == (expected, expected)
