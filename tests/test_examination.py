"""Several adapters tested in one pass answer what each answers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedmllm.config import AdapterTable, EvalTable, LoraTable, ModelTable
from fedmllm.data.prompts import prompts
from fedmllm.data.samples import Sample
from fedmllm.evaluation import predictions
from fedmllm.evaluation.predictions import Prediction, TestSet
from fedmllm.models.encoded import Encoded
from fedmllm.models.mllm import MLLM
from fedmllm.models.scoring import option_scores
from fedmllm.tensors import Tensors
from helpers import task

CLOSED = Sample("closed", "name the color", "red", choices=("red", "blue", "green"))
WHOLE = Sample("whole", "which", "red circle", choices=("red", "red circle"))
"""One option begins the other: both are scored whole."""
OPEN = Sample("open", "name the color of the shape", "red")


def load(tiny: Path, kind: str = "lora") -> MLLM:
    lora, adapter = LoraTable(rank=2, alpha=4.0), AdapterTable.model_validate({"kind": kind})
    return MLLM.load(ModelTable(name=str(tiny), lora=lora, adapter=adapter, precision="fp32"), seed=0)


def adapters_of(model: MLLM, count: int) -> list[Tensors]:
    generator = torch.Generator().manual_seed(3)
    start = model.adapter.get()
    return [{n: t + 0.4 * torch.randn(t.shape, generator=generator) for n, t in start.items()} for _ in range(count)]


def examination(model: MLLM, dataset: Path, kinds: Sequence[Sample]) -> TestSet:
    samples = [
        replace(kind, id=f"{kind.id}{i}", text="some words" * (1 + i % 2), image=dataset / f"{color}.png" if i % 3 else None)
        for kind in kinds
        for i, color in enumerate(("red", "blue", "green", "red"))
    ]
    made = TestSet(
        model, replace(task(), positive="red"), samples, ["both", "text"], prompts.build("modality-agnostic", {}), 300
    )
    model.prepare_features()
    return made


def alone(model: MLLM, asked: TestSet, settings: EvalTable, adapters: Sequence[Tensors]) -> list[list[Prediction]]:
    found = []
    for adapter in adapters:
        model.adapter.set(adapter)
        found.append(asked.take(settings))
    return found


def alike(one: list[list[Prediction]], other: list[list[Prediction]]) -> None:
    assert len(one) == len(other)
    for mine, theirs in zip(one, other, strict=True):
        assert [(p.pattern, p.id, p.predicted) for p in mine] == [(p.pattern, p.id, p.predicted) for p in theirs]
        assert [p.score for p in mine] == [p.score if p.score is None else pytest.approx(p.score, abs=1e-5) for p in theirs]


@pytest.mark.parametrize("kinds", [[CLOSED], [WHOLE], [OPEN], [CLOSED, WHOLE, OPEN]], ids=lambda kinds: kinds[-1].id)
@pytest.mark.parametrize("batch", [1, 37, 1000])
def test_adapters_tested_together_answer_as_alone(tiny: Path, dataset: Path, kinds: list[Sample], batch: int) -> None:
    model = load(tiny)
    asked = examination(model, dataset, kinds)
    settings = EvalTable(batch_size=batch, max_new_tokens=4)
    adapters = adapters_of(model, 5)
    expected = alone(model, asked, settings, adapters)
    # The adapters are far enough apart that a mixed-up client would show.
    assert len({tuple((p.predicted, p.score) for p in found) for found in expected}) > 1
    alike(list(asked.predict_each(settings, adapters)), expected)


def test_one_pass_serves_as_many_adapters_as_the_batch_has_room_for(
    tiny: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny)
    asked = examination(model, dataset, [CLOSED])
    passes: list[int] = []

    def counted(model: MLLM, batch: Sequence[Encoded], clients: int = 1) -> list[list[float]]:
        passes.append(clients)
        return option_scores(model, batch, clients)

    monkeypatch.setattr(predictions, "option_scores", counted)
    list(asked.predict_each(EvalTable(batch_size=3 * asked.size), adapters_of(model, 7)))
    assert passes == [3, 3, 1]


@pytest.mark.parametrize("kind", ["dora", "ia3", "prompt-tuning"])
def test_adapters_that_do_not_stack_are_tested_one_by_one(tiny: Path, dataset: Path, kind: str) -> None:
    model = load(tiny, kind)
    asked = examination(model, dataset, [CLOSED, OPEN])
    settings = EvalTable(batch_size=1000, max_new_tokens=2)
    adapters = adapters_of(model, 3)
    alike(list(asked.predict_each(settings, adapters)), alone(model, asked, settings, adapters))
