"""Cohorts: many clients in one pass learn what each would learn alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmllm.algorithms import LocalResult, LocalRule
from fedmllm.algorithms.factors import resized
from fedmllm.config import AdapterTable, LoraTable, ModelTable, TrainTable
from fedmllm.data.prompts import Conversation
from fedmllm.errors import ConfigError
from fedmllm.federation import FederationPlan, federate
from fedmllm.fleets import inprocess
from fedmllm.fleets.base import FleetContext
from fedmllm.fleets.inprocess import InProcessFleet
from fedmllm.models.encoded import Encoded
from fedmllm.models.mllm import MLLM
from fedmllm.rng import stream
from fedmllm.tensors import State, Tensors, distance, flatten
from fedmllm.training.batches import batch_epoch
from fedmllm.training.capacity import bytes_kept, cohort_size
from fedmllm.training.cohort import train_cohort
from fedmllm.training.local import LocalSettings, Work
from helpers import COMBINATIONS, built, quick
from naive_training import train_naively

ADAMW = LocalSettings("adamw", 1e-2, 0.01, (0.9, 0.95), 0.0, 1.0)
SGD = LocalSettings("sgd", 0.5, 0.01, (0.9, 0.95), 0.5, 0.3)
WORDS = ("red", "blue", "green")
COUNTS = (7, 0, 3, 12, 5)
"""Samples of each client: one has none, none has as many as another."""


@pytest.fixture(scope="module")
def model(tiny: Path) -> MLLM:
    return load(tiny)


def load(tiny: Path, kind: str = "lora", **lora: float) -> MLLM:
    table = LoraTable.model_validate({"rank": 2, "alpha": 4.0, **lora})
    adapter = AdapterTable.model_validate({"kind": kind})
    return MLLM.load(ModelTable(name=str(tiny), lora=table, adapter=adapter, precision="fp32"), seed=0)


def held(model: MLLM, dataset: Path, client: int, count: int) -> list[Encoded]:
    """Prompts of unequal length, with and without a picture, answers of one word or several."""
    talks = [
        Conversation("name the color. " * (1 + (i * 5 + client) % 4), " ".join(WORDS[: 1 + i % 3]), image=(i + client) % 3 != 2)
        for i in range(count)
    ]
    return model.encode(talks, [dataset / f"{WORDS[(i + client) % 3]}.png" for i in range(count)], 300)


def start_of(model: MLLM, client: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(5 + client)
    return {k: 0.1 * torch.randn(t.shape, generator=generator) for k, t in model.adapter.get().items()}


def work_of(model: MLLM, dataset: Path, client: int, count: int, batch: int, accumulate: int, rule: LocalRule) -> Work:
    data = held(model, dataset, client, count)
    made = batch_epoch([one.length for one in data], batch, accumulate, stream(0, "plan", client))
    steps = [[[data[i] for i in micro] for micro in step] for step in made.steps]
    return Work(steps, start_of(model, client), rule, client)


def same(one: LocalResult, other: LocalResult, tolerance: float = 2e-5) -> None:
    moved = max(distance(one.trained, one.received), 1e-3)
    assert distance(one.trained, other.trained) < tolerance * max(1.0, moved / 1e-1)
    assert (one.steps, one.examples, one.momentum) == (other.steps, other.examples, other.momentum)
    assert one.metrics["loss"] == pytest.approx(other.metrics["loss"], rel=1e-4)
    assert (one.mean_gradient is None) == (other.mean_gradient is None)
    if one.mean_gradient is not None and other.mean_gradient is not None:
        assert distance(one.mean_gradient, other.mean_gradient) < 1e-4


def rule_of(model: MLLM, client: int, train: str) -> LocalRule:
    """A rule that differs from client to client."""
    start = start_of(model)
    offset = {k: torch.full_like(t, 0.01 * (client + 1)) for k, t in start.items() if train in k}
    return LocalRule(
        trainable=lambda name: train in name,
        proximal=dict.fromkeys(start, 0.3 * client),
        offset=offset if client % 2 else None,
        observe_gradient=client % 3 == 0,
    )


@settings(quick, max_examples=12)
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    batch=st.integers(1, 4),
    accumulate=st.integers(1, 2),
    optimizer=st.sampled_from([ADAMW, SGD, replace(ADAMW, clip=0.0)]),
    train=st.sampled_from(["lora_", "lora_A", "lora_B"]),
)
def test_each_learns_what_the_naive_loop_learns(
    model: MLLM, dataset: Path, counts: list[int], batch: int, accumulate: int, optimizer: LocalSettings, train: str
) -> None:
    works = [work_of(model, dataset, c, count, batch, accumulate, rule_of(model, c, train)) for c, count in enumerate(counts)]
    for work, result in zip(works, train_cohort(model, works, optimizer), strict=True):
        same(result, train_naively(model, work, optimizer))


def run_rounds(model: MLLM, dataset: Path, folder: Path, combination: Sequence[str], cohort: int) -> list[State]:
    """The server's states after each of three rounds, three of five clients each.

    By SGD: AdamW divides by the root of the mean square, and what three rounds make of a rounding error where a gradient
    is next to zero says nothing about cohorts. One round of AdamW is compared above, against the naive loop.
    """
    algorithm = built(*combination)
    train = TrainTable(
        rounds=3, clients_per_round=3, batch_size=3, optimizer="sgd", lr=0.1, schedule="constant", weight_decay=0.01
    )
    data = {c: held(model, dataset, c, count) for c, count in enumerate(COUNTS)}
    gaps = {c: 0.2 * c for c in data}
    site = FleetContext(model, algorithm, data, train, start_of(model), gaps, folder, cohort)
    model.adapter.set_fold({})
    made = federate(algorithm, InProcessFleet(site), FederationPlan.of(train, range(len(COUNTS)), 3, model.info), site.initial)
    return [state for _, state in made]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many clients each cohort of the fleet had."""
    found: list[int] = []

    def watched(model: MLLM, works: Sequence[Work], settings: LocalSettings) -> list[LocalResult]:
        found.append(len(works))
        return train_cohort(model, works, settings)

    monkeypatch.setattr(inprocess, "train_cohort", watched)
    return found


@pytest.mark.parametrize("combination", COMBINATIONS, ids="+".join)
def test_every_algorithm_is_the_same_in_cohorts(
    model: MLLM, dataset: Path, tmp_path: Path, passes: list[int], combination: Sequence[str]
) -> None:
    alone = run_rounds(model, dataset, tmp_path / "alone", combination, 1)
    assert passes == [1] * 9
    passes.clear()
    together = run_rounds(model, dataset, tmp_path / "together", combination, 3)
    assert passes == [3, 3, 3]
    assert len(alone) == len(together) == 3
    for one, other in zip(alone, together, strict=True):
        assert one.keys() == other.keys()
        for group in one:
            assert one[group].keys() == other[group].keys()
    # Compression rounds to steps, and a step may fall to either side; what that can move is the size of one.
    loose = 1e-2 if "none" not in combination[2:] else 2e-5
    first, second = flatten({"adapter": alone[-1]["adapter"]}), flatten({"adapter": together[-1]["adapter"]})
    moved = distance(first, flatten({"adapter": start_of(model)}))
    assert distance(first, second) < loose * max(moved, 1e-3)


def test_neighbours_do_not_change_what_dropout_draws(tiny: Path, dataset: Path) -> None:
    model = load(tiny, dropout=0.4)
    works = [work_of(model, dataset, c, count, 3, 1, LocalRule()) for c, count in enumerate((7, 5, 8))]
    together = train_cohort(model, works, ADAMW)
    for work, result in zip(works, together, strict=True):
        same(train_cohort(model, [work], ADAMW)[0], result)
    other = train_cohort(model, [replace(works[0], seed=9)], ADAMW)[0]
    assert distance(other.trained, together[0].trained) > 1e-3


def test_clients_of_unequal_rank(tiny: Path, dataset: Path) -> None:
    model = load(tiny, rank=4)
    works = []
    for client, rank in enumerate((4, 1, 2)):
        work = work_of(model, dataset, client, 6, 2, 1, LocalRule(observe_gradient=True))
        works.append(replace(work, received=resized(work.received, rank, model.info)))
    for work, result in zip(works, train_cohort(model, works, ADAMW), strict=True):
        assert {k: t.shape for k, t in result.trained.items()} == {k: t.shape for k, t in work.received.items()}
        same(result, train_naively(model, work, ADAMW))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_loss_before_training_is_that_of_the_received_adapter(tiny: Path, dataset: Path, kind: str) -> None:
    """Measured on request over the first of two passes, without dropout, and with no effect on the result of training."""
    model = load(tiny, kind, dropout=0.3)
    plain, asked = LocalRule(), LocalRule(observe_loss=True)
    for client, count in enumerate((7, 1, 0)):
        work = work_of(model, dataset, client, count, 2, 1, plain)
        if kind == "dora":
            work = replace(work, received=model.adapter.get())
        twice = replace(work, steps=[*work.steps, *work.steps], steps_per_pass=len(work.steps))
        without = train_cohort(model, [twice], ADAMW)[0]
        drawn = torch.get_rng_state()
        result = train_cohort(model, [replace(twice, rule=asked)], ADAMW)[0]
        assert torch.equal(torch.get_rng_state(), drawn)
        assert without.loss_before is None
        assert distance(result.trained, without.trained) == 0
        assert result.metrics == without.metrics
        model.model.eval()
        model.adapter.set(work.received)
        samples = held(model, dataset, client, count)
        expected = sum(model.loss([one]).item() for one in samples) / max(len(samples), 1)
        assert result.loss_before == pytest.approx(expected, rel=1e-5)


def test_the_loss_before_training_is_the_same_in_a_cohort(model: MLLM, dataset: Path) -> None:
    rules = [LocalRule(observe_loss=True), LocalRule(), LocalRule(observe_loss=True)]
    works = [
        work_of(model, dataset, c, count, 3, 1, rule) for c, (count, rule) in enumerate(zip((4, 9, 7), rules, strict=True))
    ]
    together = train_cohort(model, works, ADAMW)
    alone = [train_cohort(model, [work], ADAMW)[0] for work in works]
    assert [result.loss_before for result in together] == [result.loss_before for result in alone]
    assert together[1].loss_before is None
    without = train_cohort(model, [replace(work, rule=LocalRule()) for work in works], ADAMW)
    assert [distance(a.trained, b.trained) for a, b in zip(together, without, strict=True)] == [0, 0, 0]


def test_a_client_that_diverged_spoils_no_other(model: MLLM, dataset: Path) -> None:
    works = [work_of(model, dataset, c, 6, 3, 1, LocalRule()) for c in range(3)]
    broken = {k: torch.full_like(t, torch.nan) for k, t in works[1].received.items()}
    results = train_cohort(model, [works[0], replace(works[1], received=broken), works[2]], ADAMW)
    assert all(t.isnan().all() for t in results[1].trained.values())
    for i in (0, 2):
        same(results[i], train_naively(model, works[i], ADAMW))


def test_the_model_is_left_as_it_was(model: MLLM, dataset: Path) -> None:
    model.adapter.set(start_of(model, 7))
    before, drawn = model.adapter.get(), torch.get_rng_state()
    train_cohort(model, [work_of(model, dataset, c, 4, 2, 1, LocalRule()) for c in range(2)], ADAMW)
    assert distance(model.adapter.get(), before) == 0
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(p.requires_grad and p.grad is None for p in model.adapter.parameters.values())
    train_naively(model, work_of(model, dataset, 0, 2, 2, 1, LocalRule()), ADAMW)  # no hook is left behind


@pytest.mark.parametrize("kind", ["rslora", "dora", "ia3", "prompt-tuning"])
def test_other_adapters(tiny: Path, dataset: Path, kind: str) -> None:
    """rsLoRA trains in cohorts as LoRA does; the others one client at a time, on the same engine."""
    model = load(tiny, kind)
    initial = model.adapter.get()
    works = [replace(work_of(model, dataset, c, 5, 2, 1, LocalRule()), received=initial) for c in range(2)]
    for work in works:
        same(train_cohort(model, [work], ADAMW)[0], train_naively(model, work, ADAMW))
    train = TrainTable(cohort=4)
    if kind == "rslora":
        same(train_cohort(model, works, ADAMW)[1], train_naively(model, works[1], ADAMW))
        assert cohort_size(model, [], train, 3) == 3
    else:
        with pytest.raises(ValueError, match="one client at a time"):
            train_cohort(model, works, ADAMW)
        with pytest.raises(ConfigError, match=r"train\.cohort = 4"):
            cohort_size(model, [], train, 3)
        assert cohort_size(model, held(model, dataset, 0, 3), TrainTable(), 3) == 1


def test_rules_that_differ_in_what_they_train_are_refused(model: MLLM, dataset: Path) -> None:
    works = [work_of(model, dataset, c, 2, 2, 1, rule_of(model, c, half)) for c, half in enumerate(("lora_A", "lora_B"))]
    with pytest.raises(ValueError, match="same tensors"):
        train_cohort(model, works, ADAMW)


def test_the_size_of_a_cohort_follows_memory_and_use(model: MLLM, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = held(model, dataset, 0, 6)
    short = min(samples, key=lambda one: one.length)
    long = max(samples, key=lambda one: one.length)
    assert 0 < bytes_kept(model, short) < bytes_kept(model, long)
    train = TrainTable(batch_size=2)
    sizes = {}
    for limit in (2**20, 2**26, 2**40):
        monkeypatch.setattr("fedmllm.training.capacity.device_memory", lambda device, limit=limit: limit)
        sizes[limit] = cohort_size(model, samples, train, 1000)
    assert sizes[2**20] == 1
    assert 1 < sizes[2**26] < sizes[2**40] < 1000  # the last is bound by what pays
    assert cohort_size(model, samples, train, 3) == 3
    assert cohort_size(model, samples, TrainTable(cohort=7), 1000) == 7


def test_padding_and_examples_are_each_clients_own(model: MLLM, dataset: Path) -> None:
    works = [work_of(model, dataset, c, count, 3, 1, LocalRule()) for c, count in enumerate((3, 9))]
    first, second = train_cohort(model, works, ADAMW)
    assert (first.examples, first.steps, second.examples, second.steps) == (3, 1, 9, 3)
    assert 0 <= first.metrics["padding"] < 1
