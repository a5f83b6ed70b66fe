"""Cohorts: clients that train in one pass get the same results as if each trained alone."""

from __future__ import annotations

import re
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
from fedmllm.fleets.base import FleetContext
from fedmllm.fleets.inprocess import InProcessFleet
from fedmllm.models.encoded import Encoded
from fedmllm.models.mllm import MLLM
from fedmllm.rng import stream
from fedmllm.tensors import State, Tensors, distance, flatten
from fedmllm.training import meter
from fedmllm.training.batches import batch_epoch
from fedmllm.training.capacity import cohort_size, pass_bytes
from fedmllm.training.cohort import Work, train_cohort
from helpers import IN_TURN, built, quick
from naive_training import train_naively

ADAMW = TrainTable(optimizer="adamw", lr=1e-2, weight_decay=0.01, eps=1e-5)
SGD = TrainTable(optimizer="sgd", lr=0.5, weight_decay=0.01, momentum=0.5, clip=0.3)
WORDS = ("red", "blue", "green")
COUNTS = (7, 0, 3, 12, 5)
"""The number of samples of each client; one has none."""


@pytest.fixture(scope="module")
def model(tiny: Path) -> MLLM:
    return load(tiny)


def load(tiny: Path, kind: str = "lora", **lora: float) -> MLLM:
    table = LoraTable.model_validate({"rank": 2, "alpha": 4.0, **lora})
    adapter = AdapterTable.model_validate({"kind": kind})
    return MLLM.load(ModelTable(name=str(tiny), lora=table, adapter=adapter, precision="fp32"), seed=0)


def samples_of(model: MLLM, dataset: Path, client: int, count: int) -> list[Encoded]:
    """Prompts of different lengths, with and without a picture; answers have one word or several."""
    talks = [
        Conversation("name the color. " * (1 + (i * 5 + client) % 4), " ".join(WORDS[: 1 + i % 3]), image=(i + client) % 3 != 2)
        for i in range(count)
    ]
    return model.encode(talks, [dataset / f"{WORDS[(i + client) % 3]}.png" for i in range(count)], 300)


def start_of(model: MLLM, client: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(5 + client)
    return {k: 0.1 * torch.randn(t.shape, generator=generator) for k, t in model.adapter.get().items()}


def work_of(model: MLLM, dataset: Path, client: int, count: int, batch: int, accumulate: int, rule: LocalRule) -> Work:
    samples = samples_of(model, dataset, client, count)
    epoch = batch_epoch([sample.length for sample in samples], batch, accumulate, stream(0, "plan", client))
    steps = [[[samples[i] for i in micro] for micro in step] for step in epoch.steps]
    return Work(steps, start_of(model, client), rule, client)


def assert_same(actual: LocalResult, expected: LocalResult) -> None:
    moved = max(distance(actual.trained, actual.received), 1e-3)
    assert distance(actual.trained, expected.trained) < 2e-5 * max(1.0, moved / 1e-1)
    assert (actual.steps, actual.examples, actual.momentum) == (expected.steps, expected.examples, expected.momentum)
    assert actual.metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=1e-4)
    assert (actual.mean_gradient is None) == (expected.mean_gradient is None)
    if actual.mean_gradient is not None and expected.mean_gradient is not None:
        assert distance(actual.mean_gradient, expected.mean_gradient) < 1e-4


def less_moved(result: LocalResult) -> Tensors:
    """Freezes the first rank of each factor that moved less than the second."""
    frozen = {}
    for name, trained in result.trained.items():
        by_rank = (trained - result.received[name]).norm(dim=1 if "lora_A" in name else 0)
        frozen[name] = torch.zeros_like(trained)
        (frozen[name] if "lora_A" in name else frozen[name].T)[0] = float(by_rank[0] < by_rank[1])
    return frozen


def pulled_home(w: Tensors, received: Tensors, done: float) -> Tensors:
    """The gradient of a cubic distance that counts more towards the end, of the factors A alone."""
    return {k: (0.5 + done) * (t - received[k]) * (t - received[k]).abs() for k, t in w.items() if "lora_A" in k}


def rule_of(model: MLLM, client: int, trained: str) -> LocalRule:
    """A rule that differs between clients."""
    start = start_of(model)
    offset = {k: torch.full_like(t, 0.01 * (client + 1)) for k, t in start.items() if trained in k}
    return LocalRule(
        trainable=lambda name: trained in name,
        proximal=dict.fromkeys(start, 0.3 * client),
        offset=offset if client % 2 else None,
        lr_factor=0.5,
        frozen={k: (t > 0).float() for k, t in start.items()} if client == 1 else None,
        penalty=pulled_home if client != 1 else None,
        probe=less_moved if client == 2 else None,
        observe_gradient=client % 3 == 0,
    )


@settings(quick, max_examples=12)
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    batch=st.integers(1, 4),
    accumulate=st.integers(1, 2),
    optimizer=st.sampled_from([ADAMW, SGD, ADAMW.model_copy(update={"clip": 0.0})]),
    trained=st.sampled_from(["lora_", "lora_A", "lora_B"]),
)
def test_cohorts_equal_the_naive_loop(
    model: MLLM, dataset: Path, counts: list[int], batch: int, accumulate: int, optimizer: TrainTable, trained: str
) -> None:
    works = [work_of(model, dataset, c, count, batch, accumulate, rule_of(model, c, trained)) for c, count in enumerate(counts)]
    for work, result in zip(works, train_cohort(model, works, optimizer), strict=True):
        assert_same(result, train_naively(model, work, optimizer))


def run_rounds(
    model: MLLM, dataset: Path, folder: Path, combination: Sequence[str], cohort: int
) -> tuple[list[State], list[int]]:
    """The server's states after each of two rounds with three of five clients, at least one of which trains twice, and the
    sizes of all cohorts.

    The optimizer is SGD. AdamW divides by the root of the mean square, so rounds amplify a rounding error wherever a
    gradient is almost zero. One round of AdamW is compared with the naive loop above.
    """
    algorithm = built(*combination)
    train = TrainTable(
        rounds=2, clients_per_round=3, batch_size=3, optimizer="sgd", lr=0.1, schedule="constant", weight_decay=0.01
    )
    samples = {c: samples_of(model, dataset, c, count) for c, count in enumerate(COUNTS)}
    gaps = {c: 0.2 * c for c in samples}
    context = FleetContext(model, algorithm, samples, train, start_of(model), gaps, folder, cohort)
    model.adapter.set_fold({})
    plan = FederationPlan.of(train, range(len(COUNTS)), 3, model.info)
    sizes: list[int] = []

    def recorded(model: MLLM, works: Sequence[Work], settings: TrainTable) -> list[LocalResult]:
        sizes.append(len(works))
        return train_cohort(model, works, settings)

    fleet = InProcessFleet(context, recorded)
    return [state for _, state in federate(algorithm, fleet, plan, context.initial)], sizes


@pytest.mark.parametrize("combination", IN_TURN, ids="+".join)
def test_every_algorithm_is_the_same_in_cohorts(tiny: Path, dataset: Path, tmp_path: Path, combination: Sequence[str]) -> None:
    model = load(tiny, "lora-xs" if built(*combination).needs_core else "lora")
    alone, sizes_alone = run_rounds(model, dataset, tmp_path / "alone", combination, 1)
    together, sizes_together = run_rounds(model, dataset, tmp_path / "together", combination, 3)
    # Two rounds, in which some algorithms let clients train a second adapter.
    assert (set(sizes_alone), set(sizes_together)) == ({1}, {3})
    assert len(sizes_alone) == 3 * len(sizes_together) >= 6
    assert len(alone) == len(together) == 2
    for state, expected in zip(together, alone, strict=True):
        assert {group: set(tensors) for group, tensors in state.items()} == {
            group: set(tensors) for group, tensors in expected.items()
        }
    # Compression rounds to steps, so a tiny difference may become the size of a step.
    tolerance = 1e-2 if "none" not in combination[2:] else 2e-5
    first, second = flatten({"adapter": alone[-1]["adapter"]}), flatten({"adapter": together[-1]["adapter"]})
    moved = distance(first, flatten({"adapter": start_of(model)}))
    assert distance(first, second) < tolerance * max(moved, 1e-3)


def test_dropout_does_not_depend_on_other_clients(tiny: Path, dataset: Path) -> None:
    model = load(tiny, dropout=0.4)
    works = [work_of(model, dataset, c, count, 3, 1, LocalRule()) for c, count in enumerate((7, 5, 8))]
    together = train_cohort(model, works, ADAMW)
    for work, result in zip(works, together, strict=True):
        assert_same(train_cohort(model, [work], ADAMW)[0], result)
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
        assert_same(result, train_naively(model, work, ADAMW))


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
        samples = samples_of(model, dataset, client, count)
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


def test_a_client_that_diverged_does_not_affect_the_others(model: MLLM, dataset: Path) -> None:
    works = [work_of(model, dataset, c, 6, 3, 1, LocalRule()) for c in range(3)]
    broken = {k: torch.full_like(t, torch.nan) for k, t in works[1].received.items()}
    results = train_cohort(model, [works[0], replace(works[1], received=broken), works[2]], ADAMW)
    assert all(t.isnan().all() for t in results[1].trained.values())
    for i in (0, 2):
        assert_same(results[i], train_naively(model, works[i], ADAMW))


def test_training_leaves_the_model_unchanged(model: MLLM, dataset: Path) -> None:
    model.adapter.set(start_of(model, 7))
    before, random_state = model.adapter.get(), torch.get_rng_state()
    train_cohort(model, [work_of(model, dataset, c, 4, 2, 1, LocalRule()) for c in range(2)], ADAMW)
    assert distance(model.adapter.get(), before) == 0
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.requires_grad and p.grad is None for p in model.adapter.parameters.values())
    train_naively(model, work_of(model, dataset, 0, 2, 2, 1, LocalRule()), ADAMW)  # no hook is left


@pytest.mark.parametrize("kind", ["rslora", "lora-xs", "dora", "ia3", "prompt-tuning"])
def test_other_adapters(tiny: Path, dataset: Path, kind: str) -> None:
    """rsLoRA and LoRA-XS train in cohorts, as LoRA does. The others train one client at a time, by the same code."""
    model = load(tiny, kind)
    initial = model.adapter.get()
    works = [replace(work_of(model, dataset, c, 5, 2, 1, LocalRule()), received=initial) for c in range(2)]
    for work in works:
        assert_same(train_cohort(model, [work], ADAMW)[0], train_naively(model, work, ADAMW))
    train = TrainTable(cohort=4)
    if kind in ("rslora", "lora-xs"):
        assert_same(train_cohort(model, works, ADAMW)[1], train_naively(model, works[1], ADAMW))
        assert cohort_size(model, [], train, 3) == 3
    else:
        with pytest.raises(ValueError, match="only one client at a time"):
            train_cohort(model, works, ADAMW)
        with pytest.raises(ConfigError, match=r"train\.cohort = 4"):
            cohort_size(model, [], train, 3)
        assert cohort_size(model, samples_of(model, dataset, 0, 3), TrainTable(), 3) == 1


def test_rules_that_train_different_tensors_are_rejected(model: MLLM, dataset: Path) -> None:
    works = [work_of(model, dataset, c, 2, 2, 1, rule_of(model, c, factor)) for c, factor in enumerate(("lora_A", "lora_B"))]
    with pytest.raises(ValueError, match="same tensors"):
        train_cohort(model, works, ADAMW)


def test_the_cohort_size_depends_on_memory_and_speed_up(model: MLLM, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = samples_of(model, dataset, 0, 6)
    short, long = (choose(samples, key=lambda sample: sample.length) for choose in (min, max))
    assert 0 < pass_bytes(model, [short], TrainTable())[0] < pass_bytes(model, [long], TrainTable())[0]
    train = TrainTable(batch_size=2)
    sizes = {}
    for limit in (2**20, 2**26, 2**40):
        monkeypatch.setattr("fedmllm.training.capacity.device_memory", lambda device, limit=limit: limit)
        sizes[limit] = cohort_size(model, samples, train, 1000)
    assert sizes[2**20] == 1
    assert 1 < sizes[2**26] < sizes[2**40] < 1000  # the last is limited by the speed-up
    assert cohort_size(model, samples, train, 3) == 3
    assert cohort_size(model, samples, TrainTable(cohort=7), 1000) == 7


def test_padding_and_examples_are_counted_per_client(model: MLLM, dataset: Path) -> None:
    works = [work_of(model, dataset, c, count, 3, 1, LocalRule()) for c, count in enumerate((3, 9))]
    first, second = train_cohort(model, works, ADAMW)
    assert (first.examples, first.steps, second.examples, second.steps) == (3, 1, 9, 3)
    assert 0 <= first.metrics["padding"] < 1


def test_what_is_shown_changes_no_number(model: MLLM, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    works = [work_of(model, dataset, client, count, 3, 2, LocalRule()) for client, count in ((3, 7), (5, 12))]
    works = [replace(work, client=client) for work, client in zip(works, (3, 5), strict=True)]
    silent = train_cohort(model, works, ADAMW)
    told: list[tuple[str, int, int, str]] = []
    monkeypatch.setattr(meter, "_PAUSE", 0.0)
    monkeypatch.setattr(model, "progress", lambda *call: told.append(call))
    for result, before in zip(train_cohort(model, works, ADAMW), silent, strict=True):
        assert all(torch.equal(tensor, before.trained[name]) for name, tensor in result.trained.items())
        assert result.metrics == before.metrics
    assert [call[:3] for call in told] == [("training", n, 2) for n in range(3)]
    notes = [re.fullmatch(r"clients 3, 5  loss ([\d.]+)  [\d,]+ tokens/s", note) for *_, note in told[1:]]
    losses = [float(match[1]) for match in notes if match]
    steps = [sum(len(batch) for work in works for batch in work.steps[n : n + 1] for batch in batch) for n in (0, 1)]
    seen = sum(loss * count for loss, count in zip(losses, steps, strict=True)) / sum(steps)
    total = sum(result.metrics["loss"] * result.examples for result in silent)
    assert seen == pytest.approx(total / sum(steps), abs=1e-3)
