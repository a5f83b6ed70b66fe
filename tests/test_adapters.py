"""Adapters of every kind on a real (tiny) model: they can be set, trained, exported, and loaded in plain PEFT."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from fedmllm.algorithms import LocalRule
from fedmllm.algorithms.factors import A, B, modules, rank_of, resized
from fedmllm.config import AdapterTable, LoraTable, ModelTable, TrainTable
from fedmllm.errors import RunError
from fedmllm.models.adapter import VIRTUAL
from fedmllm.models.mllm import MLLM
from fedmllm.models.scoring import option_scores
from fedmllm.tensors import Tensors, digest, distance
from fedmllm.training.cohort import Work, train_cohort
from tiny_models import CLOSED, OPEN, last_logits, load_adapted, perturb, plain_peft

KINDS = ["lora", "rslora", "dora", "lora-xs", "ia3", "prompt-tuning"]
ADAMW = TrainTable(optimizer="adamw", lr=1e-2, weight_decay=0.01)
TALKS = [*OPEN, CLOSED]


@pytest.fixture
def pictures(dataset: Path) -> list[Path | None]:
    return [dataset / "red.png", None, dataset / "blue.png"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_and_can_be_set(settings: ModelTable, pictures: list[Path | None], kind: str) -> None:
    model = load_adapted(settings, kind)
    batch = model.encode(TALKS, pictures, 200)
    start = model.adapter.get()
    result = train_cohort(model, [Work([[batch]] * 6, start, LocalRule(), 0)], ADAMW)[0]
    first = train_cohort(model, [Work([[batch]], start, LocalRule(), 0)], ADAMW)[0]
    assert result.metrics["loss"] < first.metrics["loss"]
    assert any(not torch.equal(result.trained[n], start[n]) for n in start)
    model.adapter.set(start)
    assert digest(model.adapter.get()) == digest(start)
    assert model.caches


@pytest.mark.parametrize("kind", KINDS)
def test_before_training_only_prompt_tuning_changes_the_model(
    settings: ModelTable, pictures: list[Path | None], kind: str
) -> None:
    model = load_adapted(settings, kind)
    batch = model.encode(TALKS, pictures, 200)
    with model.without_adapter():
        base_logits = last_logits(model, batch)
    assert torch.allclose(last_logits(model, batch), base_logits, rtol=1e-4, atol=1e-5) == (kind != "prompt-tuning")
    perturb(model)
    with model.without_adapter():
        torch.testing.assert_close(last_logits(model, batch), base_logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_other_samples_change_nothing(settings: ModelTable, pictures: list[Path | None], kind: str) -> None:
    model = load_adapted(settings, kind)
    perturb(model)
    batch = model.encode(TALKS, pictures, 200)
    assert len({sample.length for sample in batch}) == 3
    assert model.loss(batch).item() == pytest.approx(sum(model.loss([sample]).item() for sample in batch), rel=1e-5)
    assert model.generate(batch, 4) == [model.generate([sample], 4)[0] for sample in batch]
    together, alone = option_scores(model, batch[2:]), option_scores(model, [batch[2]])
    torch.testing.assert_close(torch.tensor(together), torch.tensor(alone))


@plain_peft
@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_adapter_loads_in_plain_peft(
    settings: ModelTable, tiny: Path, pictures: list[Path | None], tmp_path: Path, kind: str
) -> None:
    model = load_adapted(settings, kind)
    perturb(model)
    model.adapter.export(tmp_path / "adapter", "tiny")
    base = AutoModelForImageTextToText.from_pretrained(tiny, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    for sample in model.encode(TALKS, pictures, 200):
        expected = last_logits(model, [sample])
        inputs = model.collate([sample], [sample.answer])
        inputs.pop("position_ids")
        if kind == "prompt-tuning":  # PEFT inserts the vectors itself
            inputs = {k: v[:, 3:] if k in ("input_ids", "attention_mask") else v for k, v in inputs.items()}
        with torch.no_grad():
            torch.testing.assert_close(loaded(**inputs).logits[:, -1:], expected, rtol=1e-5, atol=1e-5)
    reloaded = load_adapted(settings, kind)
    reloaded.adapter.load(tmp_path / "adapter")
    if kind == "lora-xs":  # it is read as the LoRA adapter that was written
        batch = model.encode(TALKS, pictures, 200)
        reloaded.encode(TALKS, pictures, 200)
        torch.testing.assert_close(last_logits(reloaded, batch), last_logits(model, batch), rtol=1e-5, atol=1e-5)
    else:
        assert digest(reloaded.adapter.get()) == digest(model.adapter.get())


def test_virtual_tokens_start_as_vectors_of_the_vocabulary_and_are_the_only_parameters(settings: ModelTable) -> None:
    model = load_adapted(settings, "prompt-tuning")
    (name,) = model.adapter.parameters
    vocabulary = model.backbone.model.get_input_embeddings().weight
    vectors = model.adapter.get()[name]
    assert (name, tuple(vectors.shape)) == (VIRTUAL, (3, 32))
    assert all(bool((vocabulary == vector).all(dim=1).any()) for vector in vectors)


def test_prompt_tuning_is_a_prompt_of_those_words(settings: ModelTable, pictures: list[Path | None]) -> None:
    """With the vectors of known tokens, the model computes the same as if those tokens preceded the prompt."""
    model = load_adapted(settings, "prompt-tuning")
    words = (40, 41, 42)
    model.adapter.set({VIRTUAL: model.backbone.model.get_input_embeddings().weight[list(words)].detach().clone()})
    for sample in model.encode(TALKS, pictures, 200):
        tuned = last_logits(model, [sample])
        with_words = replace(sample, prompt=words + sample.prompt)
        with model.without_adapter():
            torch.testing.assert_close(tuned, last_logits(model, [with_words]), rtol=1e-5, atol=1e-5)


# Ranks


@pytest.mark.parametrize("kind", ["lora", "rslora"])
@pytest.mark.parametrize("optimizer_name", ["adamw", "sgd"])
def test_a_lower_rank_trains_as_a_model_of_that_rank(
    settings: ModelTable, pictures: list[Path | None], kind: str, optimizer_name: str
) -> None:
    """Padded with zeros in a model of rank 5, an adapter of rank 2 trains as in a model of rank 2, including α/r and rule."""
    optimizer = (
        ADAMW if optimizer_name == "adamw" else TrainTable(optimizer="sgd", lr=0.3, weight_decay=0.01, momentum=0.5, clip=0.0)
    )
    small, large = load_adapted(settings, kind, rank=2), load_adapted(settings, kind, rank=5)
    generator = torch.Generator().manual_seed(1)
    # Moderate values: with larger ones, the rounding of B's scale (one part in 10⁷) alone grows past 1e-5 in three steps.
    start = {n: 0.1 * torch.randn(t.shape, generator=generator) for n, t in small.adapter.get().items()}
    offset = {n: 0.01 * torch.ones_like(t) for n, t in start.items()}

    def penalty(w: Tensors, received: Tensors, done: float) -> Tensors:
        return {n: 0.1 * (t - 2 * received[n]) for n, t in w.items()}

    rule = LocalRule(proximal=dict.fromkeys(start, 0.3), offset=offset, penalty=penalty, observe_gradient=True)
    results = []
    for model in (small, large):
        batch = model.encode(TALKS, pictures, 200)
        results.append(train_cohort(model, [Work([[batch]] * 3, start, rule, 0)], optimizer)[0])
    assert results[1].trained.keys() == results[0].trained.keys()
    assert distance(results[0].trained, results[1].trained) < 1e-5
    assert results[0].mean_gradient is not None
    assert results[1].mean_gradient is not None
    assert distance(results[0].mean_gradient, results[1].mean_gradient) < 1e-5
    assert distance(results[0].trained, start) > 1e-3


@plain_peft
def test_a_lower_rank_is_exported(settings: ModelTable, tiny: Path, pictures: list[Path | None], tmp_path: Path) -> None:
    model = load_adapted(settings, "lora", rank=5)
    moved = perturb(model)
    model.adapter.set(resized(moved, 2, model.info))
    batch = model.encode(TALKS, pictures, 200)
    model.adapter.export(tmp_path, "tiny")
    loaded = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(tiny, dtype=torch.float32), tmp_path).eval()
    inputs = model.collate(batch, [sample.answer for sample in batch])
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits[:, -1:], last_logits(model, batch), rtol=1e-5, atol=1e-5)
    assert loaded.peft_config["default"].r == 2


def test_returning_to_the_full_rank_restores_the_model(settings: ModelTable, pictures: list[Path | None]) -> None:
    model = load_adapted(settings, "lora", rank=5)
    batch = model.encode(TALKS, pictures, 200)
    moved = perturb(model)
    before = last_logits(model, batch)
    model.adapter.set(resized(moved, 2, model.info))
    assert rank_of(model.adapter.get()) == 2
    model.adapter.set(moved)
    assert torch.equal(last_logits(model, batch), before)


@pytest.mark.parametrize("rank", [3, 6])
def test_factors_of_different_ranks_do_not_fit(settings: ModelTable, rank: int) -> None:
    model = load_adapted(settings, "lora", rank=5)
    tensors = model.adapter.get()
    unequal = {**tensors, max(tensors): torch.zeros(32, rank)}
    before = digest(model.adapter.get())
    with pytest.raises(ValueError, match="shape"):
        model.adapter.set(unequal)
    assert digest(model.adapter.get()) == before


def test_an_adapter_of_another_kind_is_not_loaded(settings: ModelTable, tmp_path: Path) -> None:
    load_adapted(settings, "ia3").adapter.export(tmp_path, "tiny")
    with pytest.raises(RunError, match="contains an adapter of another kind"):
        load_adapted(settings, "lora").adapter.load(tmp_path)


def test_the_adapters_tensors_are_pairs_of_lora_factors(settings: ModelTable) -> None:
    names = load_adapted(settings, "lora").adapter.get()
    assert {m + suffix for m in modules(names) for suffix in (A, B)} == set(names)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "lora-xs"])
def test_dropout_acts_in_training_only(settings: ModelTable, pictures: list[Path | None], kind: str) -> None:
    table = {"adapter": AdapterTable.model_validate({"kind": kind}), "lora": LoraTable(rank=2, dropout=0.5)}
    model = MLLM.load(settings.model_copy(update=table), seed=0)
    perturb(model)
    batch = model.encode(TALKS, pictures, 200)
    first, second = (last_logits(model, batch) for _ in range(2))
    assert torch.equal(first, second)
