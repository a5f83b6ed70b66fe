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
from fedmllm.config import AdapterTable, LoraTable, ModelTable
from fedmllm.data.prompts import Conversation
from fedmllm.errors import RunError
from fedmllm.models.adapter import VIRTUAL, Adapter
from fedmllm.models.encoded import Encoded
from fedmllm.models.mllm import MLLM
from fedmllm.models.scoring import option_scores
from fedmllm.tensors import Tensors, digest, distance
from fedmllm.training.cohort import train_local
from fedmllm.training.local import LocalSettings, Work

KINDS = ["lora", "rslora", "dora", "ia3", "prompt-tuning"]
ADAMW = LocalSettings("adamw", 1e-2, 0.01, (0.9, 0.95), 0.0, 1.0)
OPTIONS = ("(A) red", "(B) blue")
TALKS = [
    Conversation("which color is it?", "red", image=True),
    Conversation("a blue thing\nname the color.", "blue", image=False),
    Conversation("Text: a red thing that is a little longer\nwhich option is right?", "(A) red", image=True, options=OPTIONS),
]
# PEFT uses a deprecated property of transformers.
plain_peft = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def load(settings: ModelTable, kind: str, rank: int = 2, precision: str = "fp32") -> MLLM:
    table = {
        "adapter": AdapterTable(kind=kind, virtual_tokens=3),
        "lora": LoraTable(rank=rank, alpha=4.0),
        "precision": precision,
    }  # type: ignore[arg-type]
    return MLLM.load(settings.model_copy(update=table), seed=0)


@pytest.fixture
def pictures(dataset: Path) -> list[Path | None]:
    return [dataset / "red.png", None, dataset / "blue.png"]


def perturb(model: MLLM, seed: int = 3) -> Tensors:
    """Move the adapter away from its initial values and return the new ones."""
    generator = torch.Generator().manual_seed(seed)
    moved = {k: t + 0.2 * torch.randn(t.shape, generator=generator) for k, t in model.adapter.get().items()}
    model.adapter.set(moved)
    return moved


def logits(model: MLLM, batch: list[Encoded]) -> torch.Tensor:
    inputs = model.collate(batch, [sample.answer for sample in batch])
    with torch.no_grad():
        return model.backbone.model(**inputs).logits[:, -1].float()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_and_can_be_set(settings: ModelTable, pictures: list[Path | None], kind: str) -> None:
    model = load(settings, kind)
    batch = model.encode(TALKS, pictures, 200)
    start = model.adapter.get()
    result = train_local(model, Work([[batch]] * 6, start, LocalRule(), 0), ADAMW)
    first = train_local(model, Work([[batch]], start, LocalRule(), 0), ADAMW)
    assert result.metrics["loss"] < first.metrics["loss"]
    assert any(not torch.equal(result.trained[n], start[n]) for n in start)
    model.adapter.set(start)
    assert digest(model.adapter.get()) == digest(start)
    assert model.caches


@pytest.mark.parametrize("kind", KINDS)
def test_before_training_only_prompt_tuning_changes_the_model(
    settings: ModelTable, pictures: list[Path | None], kind: str
) -> None:
    model = load(settings, kind)
    batch = model.encode(TALKS, pictures, 200)
    with model.without_adapter():
        base_logits = logits(model, batch)
    assert torch.allclose(logits(model, batch), base_logits, rtol=1e-4, atol=1e-5) == (kind != "prompt-tuning")
    perturb(model)
    with model.without_adapter():
        torch.testing.assert_close(logits(model, batch), base_logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_other_samples_change_nothing(settings: ModelTable, pictures: list[Path | None], kind: str) -> None:
    model = load(settings, kind)
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
    model = load(settings, kind)
    perturb(model)
    model.adapter.export(tmp_path / "adapter", "tiny")
    base = AutoModelForImageTextToText.from_pretrained(tiny, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    for sample in model.encode(TALKS, pictures, 200):
        expected = logits(model, [sample])
        inputs = model.collate([sample], [sample.answer])
        inputs.pop("position_ids")
        if kind == "prompt-tuning":  # PEFT inserts the vectors itself
            inputs = {k: v[:, 3:] if k in ("input_ids", "attention_mask") else v for k, v in inputs.items()}
        with torch.no_grad():
            torch.testing.assert_close(loaded(**inputs).logits[:, -1], expected, rtol=1e-5, atol=1e-5)
    reloaded = load(settings, kind)
    reloaded.adapter.load(tmp_path / "adapter")
    assert digest(reloaded.adapter.get()) == digest(model.adapter.get())


def test_virtual_tokens_start_as_vectors_of_the_vocabulary_and_are_the_only_parameters(settings: ModelTable) -> None:
    model = load(settings, "prompt-tuning")
    (name,) = model.adapter.parameters
    vocabulary = model.backbone.model.get_input_embeddings().weight
    vectors = model.adapter.get()[name]
    assert (name, tuple(vectors.shape)) == (VIRTUAL, (3, 32))
    assert all(bool((vocabulary == vector).all(dim=1).any()) for vector in vectors)


def test_prompt_tuning_is_a_prompt_of_those_words(settings: ModelTable, pictures: list[Path | None]) -> None:
    """With the vectors of known tokens, the model computes the same as if those tokens preceded the prompt."""
    model = load(settings, "prompt-tuning")
    words = (40, 41, 42)
    model.adapter.set({VIRTUAL: model.backbone.model.get_input_embeddings().weight[list(words)].detach().clone()})
    for sample in model.encode(TALKS, pictures, 200):
        tuned = logits(model, [sample])
        with_words = replace(sample, prompt=words + sample.prompt)
        with model.without_adapter():
            torch.testing.assert_close(tuned, logits(model, [with_words]), rtol=1e-5, atol=1e-5)


# Ranks


@pytest.mark.parametrize("kind", ["lora", "rslora"])
@pytest.mark.parametrize("optimizer_name", ["adamw", "sgd"])
def test_a_lower_rank_trains_as_a_model_of_that_rank(
    settings: ModelTable, pictures: list[Path | None], kind: str, optimizer_name: str
) -> None:
    """An adapter of rank 2, padded with zeros in a model of rank 5, trains as in a model of rank 2: with its own α/r and rule."""
    optimizer = ADAMW if optimizer_name == "adamw" else LocalSettings("sgd", 0.3, 0.01, (0.9, 0.95), 0.5, 0.0)
    small, large = load(settings, kind, rank=2), load(settings, kind, rank=5)
    generator = torch.Generator().manual_seed(1)
    # Moderate values: with larger ones, the rounding of B's scale (one part in 10⁷) alone grows past 1e-5 in three steps.
    start = {n: 0.1 * torch.randn(t.shape, generator=generator) for n, t in small.adapter.get().items()}
    offset = {n: 0.01 * torch.ones_like(t) for n, t in start.items()}
    rule = LocalRule(proximal=dict.fromkeys(start, 0.3), offset=offset, observe_gradient=True)
    results = []
    for model in (small, large):
        batch = model.encode(TALKS, pictures, 200)
        results.append(train_local(model, Work([[batch]] * 3, start, rule, 0), optimizer))
    assert results[1].trained.keys() == results[0].trained.keys()
    assert distance(results[0].trained, results[1].trained) < 1e-5
    assert results[0].mean_gradient is not None
    assert results[1].mean_gradient is not None
    assert distance(results[0].mean_gradient, results[1].mean_gradient) < 1e-5
    assert distance(results[0].trained, start) > 1e-3


@plain_peft
def test_a_lower_rank_is_exported(settings: ModelTable, tiny: Path, pictures: list[Path | None], tmp_path: Path) -> None:
    model = load(settings, "lora", rank=5)
    moved = perturb(model)
    model.adapter.set(resized(moved, 2, model.info))
    batch = model.encode(TALKS, pictures, 200)
    model.adapter.export(tmp_path, "tiny")
    loaded = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(tiny, dtype=torch.float32), tmp_path).eval()
    inputs = model.collate(batch, [sample.answer for sample in batch])
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits[:, -1], logits(model, batch), rtol=1e-5, atol=1e-5)
    assert loaded.peft_config["default"].r == 2


def test_returning_to_the_full_rank_restores_the_model(settings: ModelTable, pictures: list[Path | None]) -> None:
    model = load(settings, "lora", rank=5)
    batch = model.encode(TALKS, pictures, 200)
    moved = perturb(model)
    before = logits(model, batch)
    model.adapter.set(resized(moved, 2, model.info))
    assert rank_of(model.adapter.get()) == 2
    model.adapter.set(moved)
    assert torch.equal(logits(model, batch), before)


@pytest.mark.parametrize("rank", [3, 6])
def test_factors_of_different_ranks_do_not_fit(settings: ModelTable, rank: int) -> None:
    model = load(settings, "lora", rank=5)
    tensors = model.adapter.get()
    unequal = {**tensors, max(tensors): torch.zeros(32, rank)}
    before = digest(model.adapter.get())
    with pytest.raises(ValueError, match="shape"):
        model.adapter.set(unequal)
    assert digest(model.adapter.get()) == before


# Folds


def random_fold(adapter: Adapter, rank: int, dense: bool = False) -> Tensors:
    generator = torch.Generator().manual_seed(9)
    fold: Tensors = {}
    for m in modules(adapter.get()):
        left, right = (0.3 * torch.randn(shape, generator=generator) for shape in ((32, rank), (rank, 32)))
        fold |= {m + ".fold": left @ right} if dense else {m + ".fold_A": right, m + ".fold_B": left}
    return fold


@plain_peft
@pytest.mark.parametrize("dense", [False, True], ids=["factors", "dense"])
@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_a_fold_is_exported_as_extra_rank(
    settings: ModelTable, tiny: Path, pictures: list[Path | None], tmp_path: Path, kind: str, dense: bool
) -> None:
    model = load(settings, kind)
    perturb(model)
    batch = model.encode(TALKS, pictures, 200)
    model.adapter.set_fold(random_fold(model.adapter, 3, dense))
    expected = logits(model, batch)
    model.adapter.export(tmp_path, "tiny")
    loaded = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(tiny, dtype=torch.float32), tmp_path).eval()
    inputs = model.collate(batch, [sample.answer for sample in batch])
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits[:, -1], expected, rtol=1e-4, atol=1e-4)
    reloaded = load(settings, kind)
    reloaded.adapter.load(tmp_path)
    torch.testing.assert_close(logits(reloaded, reloaded.encode(TALKS, pictures, 200)), expected, rtol=1e-4, atol=1e-4)


def test_a_fold_of_some_modules_resets_the_others(settings: ModelTable, pictures: list[Path | None]) -> None:
    model = load(settings, "lora")
    batch = model.encode(TALKS, pictures, 200)
    fold = random_fold(model.adapter, 3)
    first = modules(model.adapter.get())[0]
    partial = {n: t for n, t in fold.items() if n.startswith(first + ".")}
    model.adapter.set_fold(fold)
    model.adapter.set_fold(partial)
    fresh = load(settings, "lora")
    fresh.adapter.set_fold(partial)
    torch.testing.assert_close(logits(model, batch), logits(fresh, fresh.encode(TALKS, pictures, 200)))


def test_in_low_precision_a_small_fold_is_not_rounded_away(settings: ModelTable, pictures: list[Path | None]) -> None:
    """The fold is smaller than bfloat16's step at weights of 1, so it would vanish if it were added to the weights."""
    model = load(settings, "lora", precision="bf16")
    module = modules(model.adapter.get())[0]
    layer = model.model.get_submodule(module)
    before = layer.base_layer.weight.clone()
    x = torch.ones(1, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.base_layer.weight.zero_()  # so that the output is that of the fold
        fold = {module + ".fold_A": torch.full((1, 32), 1e-3), module + ".fold_B": torch.full((32, 1), 1e-3)}
        model.adapter.set_fold(fold)
        torch.testing.assert_close(layer(x).float(), torch.full((1, 32), 32e-6), rtol=1e-2, atol=0)
        model.adapter.set_fold(dict(fold))
        torch.testing.assert_close(layer(x).float(), torch.full((1, 32), 32e-6), rtol=1e-2, atol=0)
        model.adapter.set_fold({})
        assert not bool(layer(x).any())
        layer.base_layer.weight.copy_(before)


def test_an_adapter_of_another_kind_is_not_loaded(settings: ModelTable, tmp_path: Path) -> None:
    load(settings, "ia3").adapter.export(tmp_path, "tiny")
    with pytest.raises(RunError, match="contains an adapter of another kind"):
        load(settings, "lora").adapter.load(tmp_path)


def test_the_adapters_tensors_are_pairs_of_lora_factors(settings: ModelTable) -> None:
    names = load(settings, "lora").adapter.get()
    assert {m + suffix for m in modules(names) for suffix in (A, B)} == set(names)
