"""Several adapters evaluated in one pass give the same predictions as each adapter alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedmllm.config import AdapterTable, EvalTable, LoraTable, ModelTable, TrainTable
from fedmllm.data.prompts import prompts, render
from fedmllm.data.samples import Sample
from fedmllm.errors import RunError
from fedmllm.evaluation import test_set
from fedmllm.evaluation.predictions import Prediction
from fedmllm.evaluation.test_set import TestSet
from fedmllm.kinds import Match
from fedmllm.models.encoded import Encoded
from fedmllm.models.mllm import MLLM
from fedmllm.models.scoring import option_scores
from fedmllm.tensors import Tensors
from helpers import task

CLOSED = Sample("closed", "name the color", "red", choices=("red", "blue", "green"))
PREFIX = Sample("prefix", "which", "red circle", choices=("red", "red circle"))
"""One option is a prefix of the other, so both must be scored as a whole."""
OPEN = Sample("open", "name the color of the shape", "red")
MATCHES: tuple[Match, ...] = ("exact", "squad")


def load(tiny: Path, kind: str = "lora") -> MLLM:
    lora, adapter = LoraTable(rank=2, alpha=4.0), AdapterTable.model_validate({"kind": kind})
    return MLLM.load(ModelTable(name=str(tiny), lora=lora, adapter=adapter, precision="fp32"), seed=0)


def random_adapters(model: MLLM, count: int) -> list[Tensors]:
    generator = torch.Generator().manual_seed(3)
    start = model.adapter.get()
    return [{n: t + 0.4 * torch.randn(t.shape, generator=generator) for n, t in start.items()} for _ in range(count)]


def make_test_set(model: MLLM, dataset: Path, kinds: Sequence[Sample]) -> TestSet:
    samples = [
        replace(kind, id=f"{kind.id}{i}", text="some words" * (1 + i % 2), image=dataset / f"{color}.png" if i % 3 else None)
        for kind in kinds
        for i, color in enumerate(("red", "blue", "green", "red"))
    ]
    strategy = prompts.build("modality-agnostic", {})
    tests = TestSet(model, replace(task(), positive="red"), samples, ["both", "text"], strategy, TrainTable(max_length=300))
    model.prepare_features()
    return tests


def predict_one_by_one(model: MLLM, tests: TestSet, settings: EvalTable, adapters: Sequence[Tensors]) -> list[list[Prediction]]:
    predictions = []
    for adapter in adapters:
        model.adapter.set(adapter)
        predictions.append(tests.predict(settings))
    return predictions


def assert_equal(ours: list[list[Prediction]], theirs: list[list[Prediction]]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert [(p.pattern, p.id, p.predicted) for p in a] == [(p.pattern, p.id, p.predicted) for p in b]
        assert [p.score for p in a] == [p.score if p.score is None else pytest.approx(p.score, abs=1e-5) for p in b]


@pytest.mark.parametrize("kinds", [[CLOSED], [PREFIX], [OPEN], [CLOSED, PREFIX, OPEN]], ids=lambda kinds: kinds[-1].id)
@pytest.mark.parametrize("batch", [1, 37, 1000])
def test_adapters_evaluated_together_answer_as_alone(tiny: Path, dataset: Path, kinds: list[Sample], batch: int) -> None:
    model = load(tiny)
    tests = make_test_set(model, dataset, kinds)
    settings = EvalTable(batch_size=batch, max_new_tokens=4)
    adapters = random_adapters(model, 5)
    expected = predict_one_by_one(model, tests, settings, adapters)
    # The adapters differ enough that mixing them up would change the predictions.
    assert len({tuple((p.predicted, p.score) for p in predictions) for predictions in expected}) > 1
    assert_equal(list(tests.predict_each(settings, adapters)), expected)


def test_one_pass_evaluates_as_many_adapters_as_fit_in_a_batch(
    tiny: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny)
    tests = make_test_set(model, dataset, [CLOSED])
    passes: list[int] = []

    def counted(model: MLLM, batch: Sequence[Encoded], clients: int = 1) -> list[list[float]]:
        passes.append(clients)
        return option_scores(model, batch, clients)

    monkeypatch.setattr(test_set, "option_scores", counted)
    list(tests.predict_each(EvalTable(batch_size=3 * tests.size), random_adapters(model, 7)))
    assert passes == [3, 3, 1]


@pytest.mark.parametrize("kind", ["dora", "ia3", "prompt-tuning"])
def test_adapters_that_cannot_be_stacked_are_evaluated_one_by_one(tiny: Path, dataset: Path, kind: str) -> None:
    model = load(tiny, kind)
    tests = make_test_set(model, dataset, [CLOSED, OPEN])
    settings = EvalTable(batch_size=1000, max_new_tokens=2)
    adapters = random_adapters(model, 3)
    assert_equal(list(tests.predict_each(settings, adapters)), predict_one_by_one(model, tests, settings, adapters))


@pytest.mark.parametrize("match", MATCHES)
def test_a_closed_question_is_judged_by_the_index_of_the_option(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, match: Match
) -> None:
    pairs = [("15 cm", "1.5 cm"), ("C", "C++"), ("1", "-1"), ("<5", "5"), ("Vitamin", "Vitamin A"), ("U.S.", "us"),
             ("a", "the"), ("10 %", "10")]  # fmt: skip
    samples = [Sample(f"{i}-{a}", "which", pair[a], text="t", choices=pair) for i, pair in enumerate(pairs) for a in (0, 1)]
    strategy = prompts.build("modality-agnostic", {})
    tests = TestSet(load(tiny), replace(task(), positive="C++"), samples, ["both"], strategy, TrainTable())

    def first(model: MLLM, batch: Sequence[Encoded], clients: int = 1) -> list[list[float]]:
        return [[-0.1, -2.4] for _ in batch]

    monkeypatch.setattr(test_set, "option_scores", first)
    predictions = tests.predict(EvalTable(match=match))
    assert [p.correct for p in predictions] == [True, False] * len(pairs)
    assert {p.option for p in predictions} == {0}
    assert [p.score for p in predictions if p.score is not None] == [pytest.approx(math.exp(-2.4))] * 2


def test_open_answers_are_judged_by_the_rule_of_the_experiment(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, strategy = load(tiny), prompts.build("modality-agnostic", {})
    replies = {"1.5 cm": "15 cm", "hepatitis A": "Hepatitis.", "heart": "The heart.", "2": "2.0", "是的": "是的。"}
    samples = [Sample(f"s{i}", "what", answer, text=f"t {i}") for i, answer in enumerate(replies)]
    tests = TestSet(model, task(), samples, ["both"], strategy, TrainTable())

    def generate(batch: Sequence[Encoded], max_new_tokens: int) -> list[str]:
        answers = {model.encode([render(s, s.modalities, strategy)], [None], 300)[0].prompt: s.answer for s in samples}
        return [replies[answers[encoded.prompt]] for encoded in batch]

    monkeypatch.setattr(model, "generate", generate)
    verdicts = {name: [p.correct for p in tests.predict(EvalTable(match=name))] for name in MATCHES}
    assert verdicts == {"exact": [False, False, True, True, True], "squad": [True, True, True, False, False]}


@pytest.mark.parametrize("question", [CLOSED, PREFIX, OPEN], ids=lambda question: question.id)
def test_a_model_that_computes_nan_answers_nothing(tiny: Path, question: Sample) -> None:
    model, strategy = load(tiny), prompts.build("modality-agnostic", {})
    tests = TestSet(model, task(), [replace(question, text="some words")], ["both"], strategy, TrainTable(lr=0.25))
    broken = {name: torch.full_like(tensor, math.nan) for name, tensor in model.adapter.get().items()}
    for adapters in ([broken], [model.adapter.get(), broken]):
        with pytest.raises(RunError, match=r"NaN.*lower train\.lr, which was 0\.25"):
            list(tests.predict_each(EvalTable(max_new_tokens=2), adapters))
