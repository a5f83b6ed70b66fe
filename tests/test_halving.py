"""A GPU whose memory is full: less is computed at once, with the same results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor

from fedmllm.algorithms import LocalRule
from fedmllm.config import EvalTable, TrainTable
from fedmllm.data.prompts import Conversation
from fedmllm.errors import RunError
from fedmllm.models.encoded import Encoded
from fedmllm.models.halving import Limits
from fedmllm.models.mllm import MLLM
from fedmllm.models.pictures import Pictures
from fedmllm.rng import stream
from fedmllm.tensors import distance
from fedmllm.training.batches import client_steps
from fedmllm.training.cohort import Work, train_cohort
from test_cohort import assert_same, load, rule_of, samples_of, start_of
from test_test_set import CLOSED, OPEN, PREFIX, assert_equal, make_test_set, random_adapters

TRAIN = TrainTable(lr=1e-2, batch_size=4, accumulate=2)


def full(_: Any = None) -> NoReturn:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class SmallGpu:
    """Makes the memory of a model's GPU so small that it holds only so many rows: larger batches fail in the forward pass, or
    in the backward pass where there is one. `rows` has the sizes of the batches, `told` what the user is told."""

    def __init__(self, model: MLLM, holds: int, patch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []
        self.told: list[str] = []
        model.limits = Limits()
        model.limits.tell = self.told.append
        losses, last_logits, generate = model.losses, model.last_logits, model.generate

        def small_losses(batch: Sequence[Encoded]) -> Tensor:
            computed = losses(batch)
            if len(batch) > holds and computed.requires_grad:
                computed.register_hook(full)
            return computed

        def small_logits(batch: Sequence[Encoded], *rest: Any) -> Tensor:
            self.rows.append(len(batch))
            return full() if len(batch) > holds and not torch.is_grad_enabled() else last_logits(batch, *rest)

        def small_generate(batch: Sequence[Encoded], most: int) -> list[str]:
            self.rows.append(len(batch))
            return full() if len(batch) > holds else generate(batch, most)

        for name, method in (("losses", small_losses), ("last_logits", small_logits), ("generate", small_generate)):
            patch.setattr(model, name, method)


def works_of(model: MLLM, dataset: Path, clients: int) -> list[Work]:
    works = []
    for client in range(clients):
        samples = samples_of(model, dataset, client, 9 - client)
        steps = client_steps(samples, TRAIN, [stream(0, "plan", client)])
        rule = rule_of(model, client, "lora_") if model.adapter.stacks else LocalRule()
        start = start_of(model, client) if model.adapter.stacks else model.adapter.get()
        works.append(Work(steps, start, replace(rule, observe_loss=True), client))
    return works


@pytest.mark.parametrize(
    ("kind", "dropout", "clients", "holds", "cohort", "samples"),
    [
        ("lora", 0.0, 3, 4, 1, None),
        ("lora", 0.0, 3, 8, 1, None),
        ("lora", 0.0, 4, 8, 2, None),
        ("lora", 0.4, 2, 1, 1, 1),
        ("lora", 0.4, 1, 2, None, 2),
        ("dora", 0.0, 1, 3, None, 2),
    ],
)
def test_training_goes_on_with_fewer_clients_and_then_fewer_samples_at_once(
    tiny: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch,
    kind: str, dropout: float, clients: int, holds: int, cohort: int | None, samples: int | None,
) -> None:  # fmt: skip
    """The same entries are dropped, and the same rule applies to the same gradients."""
    model = load(tiny, kind, dropout=dropout)
    works = works_of(model, dataset, clients)
    expected = train_cohort(model, works, TRAIN)
    drawn = torch.get_rng_state()
    gpu = SmallGpu(model, holds, monkeypatch)
    for result, at_once in zip(train_cohort(model, works, TRAIN), expected, strict=True):
        assert_same(result, at_once)
        assert result.loss_before == pytest.approx(at_once.loss_before, rel=1e-5)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert (model.limits.clients.most, model.limits.samples.most) == (cohort, samples)
    assert len(gpu.told) == (cohort is not None) + (samples is not None), "each limit is told once"
    if cohort is not None:
        assert gpu.told[0] == (
            f"the memory of the GPU does not hold {clients} clients in one pass; from here on it is {cohort}"
        )
    gpu.rows.clear()
    train_cohort(model, works, TRAIN)
    assert max(gpu.rows) <= holds, "what was found out holds for the rest of the run"
    assert len(gpu.told) == (cohort is not None) + (samples is not None)


def test_parts_drop_the_entries_that_the_whole_batch_drops(tiny: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dropout of 0.4 changes the result by far more than parts do, so that another draw would be noticed above."""
    model = load(tiny, dropout=0.4)
    (work,) = works_of(model, dataset, 1)
    drawn, other = (train_cohort(model, [replace(work, seed=seed)], TRAIN)[0].trained for seed in (0, 1))
    SmallGpu(model, 1, monkeypatch)
    in_parts = train_cohort(model, [work], TRAIN)[0].trained
    assert distance(in_parts, drawn) < 1e-3 * distance(other, drawn)


def test_a_sample_that_is_too_much_ends_the_run(tiny: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tiny)
    works = works_of(model, dataset, 2)
    gpu = SmallGpu(model, 0, monkeypatch)
    with pytest.raises(RunError, match=r"the memory of the GPU is full.*set train\.checkpointing = true or model\.quantize"):
        train_cohort(model, works, TRAIN)
    assert gpu.told == []


def test_another_error_is_none_of_memory(tiny: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tiny)

    def broken(batch: Sequence[Encoded]) -> Tensor:
        raise RuntimeError("a bug")

    works = works_of(model, dataset, 2)
    monkeypatch.setattr(model, "losses", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        train_cohort(model, works, TRAIN)
    assert model.limits.clients.most is None


@pytest.mark.parametrize("adapters", [1, 2])
def test_evaluation_goes_on_with_fewer_questions_at_once(
    tiny: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch, adapters: int
) -> None:
    model = load(tiny)
    tests = make_test_set(model, dataset, [CLOSED, PREFIX, OPEN])
    settings, trained = EvalTable(batch_size=tests.size * adapters, max_new_tokens=4), random_adapters(model, adapters)
    expected = list(tests.predict_each(settings, trained))
    gpu = SmallGpu(model, 4, monkeypatch)
    assert_equal(list(tests.predict_each(settings, trained)), expected)
    assert gpu.told == [
        f"the memory of the GPU does not hold 12 questions in one pass; from here on it is {3 if adapters == 1 else 1}"
    ]


def test_pictures_are_encoded_fewer_at_once(tiny: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def features(model: MLLM) -> list[Tensor]:
        pictures = [dataset / f"{color}.png" for color in ("red", "blue", "green")]
        batch = model.encode([Conversation("what is it?", "red", image=True)] * 3, pictures, 300)
        return model.pictures._records([number for sample in batch for number in sample.pictures])

    expected, model = features(load(tiny)), load(tiny)
    told, tower, sizes = list[str](), Pictures._image_features, list[int]()
    model.limits.tell = told.append

    def small_tower(self: Pictures, inputs: dict[str, Tensor]) -> Any:
        sizes.append(len(inputs["pixel_values"]))
        return full() if sizes[-1] > 1 else tower(self, inputs)

    monkeypatch.setattr(Pictures, "_image_features", small_tower)
    for actual, record in zip(features(model), expected, strict=True):
        torch.testing.assert_close(actual, record, rtol=1e-4, atol=1e-5)
    assert sizes == [3, 1, 1, 1]
    assert told == ["the memory of the GPU does not hold 3 pictures in one pass of the vision tower; from here on it is 1"]
