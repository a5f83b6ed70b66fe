"""Invariants of local training on a tiny model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmllm.algorithms import LocalRule
from fedmllm.config import LoraTable, ModelTable, TrainTable
from fedmllm.data.prompts import Conversation, prompts, render
from fedmllm.data.samples import Sample
from fedmllm.data.summary import PATTERNS as SEEN
from fedmllm.models.encoded import Encoded
from fedmllm.models.mllm import MLLM
from fedmllm.rng import stream
from fedmllm.tensors import Tensors, digest, distance
from fedmllm.training.batches import batch_epoch, client_steps
from fedmllm.training.cohort import Work, train_cohort

ADAMW = TrainTable(optimizer="adamw", lr=1e-2, weight_decay=0.01)
SGD = TrainTable(optimizer="sgd", lr=0.5, clip=0.0)


@pytest.fixture
def samples(model: MLLM, dataset: Path) -> list[Encoded]:
    names = ["red", "blue", "green", "red"]
    talks = [Conversation(f"question {i}, name the color.", name, image=i % 3 != 2) for i, name in enumerate(names * 2)]
    return model.encode(talks, [dataset / f"{name}.png" for name in names * 2], 200)


def train(
    model: MLLM, steps: list[list[list[Encoded]]], settings: TrainTable = ADAMW, rule: LocalRule | None = None, seed: int = 0
):
    start = start_of(model)
    return train_cohort(model, [Work(steps, start, rule or LocalRule(), seed)], settings)[0]


def start_of(model: MLLM) -> Tensors:
    generator = torch.Generator().manual_seed(5)
    return {k: 0.1 * torch.randn(t.shape, generator=generator) for k, t in model.adapter.get().items()}


def test_training_decreases_the_loss_and_does_not_change_its_input(model: MLLM, samples: list[Encoded]) -> None:
    start = start_of(model)
    before = digest(start)
    result = train_cohort(model, [Work([[samples]] * 8, start, LocalRule(), 0)], ADAMW)[0]
    assert digest(start) == before
    assert (result.steps, result.examples) == (8, 64)
    first = train_cohort(model, [Work([[samples]], start, LocalRule(), 0)], ADAMW)[0].metrics["loss"]
    assert result.metrics["loss"] < first
    assert result.trained.keys() == start.keys()


def test_equals_a_plain_loop(model: MLLM, samples: list[Encoded]) -> None:
    """Compared with a plain AdamW loop over the same steps, as in centralised training."""
    steps = [[samples[:4]], [samples[4:]], [samples[2:6]]]
    trained = train(model, steps).trained
    model.adapter.set(start_of(model))
    parameters = list(model.adapter.parameters.values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.01, betas=(0.9, 0.95))
    for (batch,) in steps:
        optimizer.zero_grad()
        (model.loss(batch) / len(batch)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    assert distance(trained, model.adapter.get()) < 1e-5


@pytest.mark.parametrize("optimizer", [ADAMW, SGD], ids=["adamw", "sgd"])
def test_batch_of_8_equals_8_accumulated(model: MLLM, samples: list[Encoded], optimizer: TrainTable) -> None:
    whole = train(model, [[samples]], optimizer).trained
    accumulated = train(model, [[[sample] for sample in samples]], optimizer).trained
    assert distance(whole, accumulated) < 1e-5 * max(1.0, distance(whole, start_of(model)))


def test_same_seed_same_bits(settings: ModelTable, dataset: Path) -> None:
    """With dropout, which depends on the seed. The global generator is neither used nor changed."""
    lora = LoraTable(rank=2, alpha=4.0, dropout=0.3)
    digests = []
    for global_seed, seed in ((1, 0), (2, 0), (3, 1)):
        model = MLLM.load(settings.model_copy(update={"lora": lora}), seed=0)
        samples = model.encode([Conversation("name the color.", "red", True)] * 2, [dataset / "red.png"] * 2, 200)
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        digests.append(digest(train(model, [[samples]] * 2, seed=seed).trained))
        assert torch.equal(before, torch.get_rng_state())
    assert digests[0] == digests[1] != digests[2]


def test_untrained_tensors_stay_bit_for_bit(model: MLLM, samples: list[Encoded]) -> None:
    result = train(model, [[samples]] * 2, rule=LocalRule(trainable=lambda name: "lora_B" in name))
    for name, tensor in result.trained.items():
        assert torch.equal(tensor, result.received[name]) == ("lora_A" in name)
    assert all(p.requires_grad for p in model.adapter.parameters.values())


def test_proximal_offset_and_penalty_enter_the_gradient(model: MLLM, samples: list[Encoded]) -> None:
    """With SGD, w₁ = w₀ − η (g₀ + o + h(0)) and w₂ = w₁ − η (g₁ + μ (w₁ − w₀) + o + h(½)), compared with autograd on the
    complete loss. The penalty h is (w − w₀)³ / 3 + 0.1 w² with a factor 1 + the share of the steps that are done."""

    def cubic(w: Tensors, received: Tensors, done: float) -> Tensors:
        return {k: (1 + done) * ((t - received[k]).square() + 0.2 * t) for k, t in w.items()}

    mu, lr = 0.7, SGD.lr
    start = start_of(model)
    offset = {k: torch.full_like(t, 0.01) for k, t in start.items()}
    rule = LocalRule(proximal=dict.fromkeys(start, mu), offset=offset, penalty=cubic, observe_gradient=True)
    result = train_cohort(model, [Work([[samples]] * 2, start, rule, 0)], SGD)[0]
    model.adapter.set(start)
    parameters = model.adapter.parameters
    raw = {k: torch.zeros_like(t) for k, t in start.items()}
    for step in range(2):
        penalty = sum(
            mu / 2 * (p - start[k]).square().sum()
            + (offset[k] * p).sum()
            + (1 + step / 2) * ((p - start[k]).pow(3) / 3 + 0.1 * p.square()).sum()
            for k, p in parameters.items()
        )
        loss = model.loss(samples) / len(samples)
        plain = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
        complete = torch.autograd.grad(loss + penalty, list(parameters.values()))
        with torch.no_grad():
            for (name, p), g_raw, g in zip(parameters.items(), plain, complete, strict=True):
                raw[name] += g_raw / 2
                p -= lr * g
    assert distance(result.trained, model.adapter.get()) < 1e-5
    assert result.mean_gradient is not None
    assert distance(result.mean_gradient, raw) < 1e-6


def test_gradients_are_clipped(model: MLLM, samples: list[Encoded]) -> None:
    clipped = TrainTable(optimizer="sgd", lr=1.0, clip=1e-3)
    result = train(model, [[samples]], clipped)
    assert distance(result.trained, result.received) == pytest.approx(1e-3, rel=1e-2)


def test_a_rule_that_trains_nothing_is_an_error(model: MLLM, samples: list[Encoded]) -> None:
    with pytest.raises(ValueError, match="leaves no tensor to train"):
        train(model, [[samples]], rule=LocalRule(trainable=lambda name: False))


PATTERNS = st.sampled_from([(True, True), (True, False), (False, True), (False, False)])


@given(
    samples=st.lists(st.tuples(st.integers(1, 60), PATTERNS), min_size=1, max_size=70),
    batch_size=st.integers(1, 9),
    accumulate=st.integers(1, 4),
    by_length=st.booleans(),
)
def test_every_sample_is_in_exactly_one_step(
    samples: list[tuple[int, tuple[bool, bool]]], batch_size: int, accumulate: int, by_length: bool
) -> None:
    lengths, patterns = [length for length, _ in samples], [pattern for _, pattern in samples] if by_length else None
    epoch = batch_epoch(lengths, batch_size, accumulate, stream(0, "test"), patterns)
    flat = [i for step in epoch.steps for batch in step for i in batch]
    assert sorted(flat) == list(range(len(lengths)))
    assert all(len(batch) <= batch_size for step in epoch.steps for batch in step)
    assert all(len(step) <= accumulate for step in epoch.steps)
    assert 0 <= epoch.padding < 1
    one_by_one = batch_epoch(lengths, 1, batch_size * accumulate, stream(0, "test"), patterns)
    held = [sorted(i for batch in step for i in batch) for step in epoch.steps]
    assert held == [sorted(i for batch in step for i in batch) for step in one_by_one.steps]


def test_batches_are_a_plain_shuffle() -> None:
    order = stream(0, "test").permutation(50).tolist()
    epoch = batch_epoch(list(range(1, 51)), 4, 2, stream(0, "test"))
    assert [[i for batch in step for i in batch] for step in epoch.steps] == [order[i : i + 8] for i in range(0, 50, 8)]


def mixture(paired: int, images: int, texts: int, nothing: int) -> tuple[list[int], list[str]]:
    """Lengths and patterns of a client's samples, whose lengths tell the patterns apart, as pictures and texts do."""
    counts = {"both": (paired, 60), "image": (images, 45), "text": (texts, 25), "none": (nothing, 10)}
    patterns = [pattern for pattern, (count, _) in counts.items() for _ in range(count)]
    spread = stream(3, "lengths").integers(0, 8, len(patterns)).tolist()
    return [counts[pattern][1] + extra for pattern, extra in zip(patterns, spread, strict=True)], patterns


MIXTURES = [(0, 48, 48, 0), (20, 20, 20, 20), (60, 10, 10, 0), (0, 90, 6, 0), (4, 30, 30, 0)]


@pytest.mark.parametrize("counts", MIXTURES)
@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("batching", ["random", "by-length"])
def test_steps_of_one_pattern_are_as_frequent_as_by_chance(counts: tuple[int, ...], size: int, batching: str) -> None:
    """By chance, a step of b among n samples holds pattern p alone with probability C(n_p, b) / C(n, b)."""
    lengths, patterns = mixture(*counts)
    epochs = [
        batch_epoch(lengths, size, 1, stream(seed, "test"), patterns if batching == "by-length" else None).steps
        for seed in range(150)
    ]
    full = [step[0] for steps in epochs for step in steps if len(step[0]) == size]
    alone = sum(len({patterns[i] for i in step}) == 1 for step in full) / len(full)
    chance = sum(math.comb(count, size) for count in counts) / math.comb(len(lengths), size)
    assert alone == pytest.approx(chance, abs=4 * math.sqrt(chance * (1 - chance) / len(full)) + 1e-3)


@pytest.mark.parametrize("counts", MIXTURES)
def test_sorting_by_length_keeps_the_mixture_of_every_step_of_the_shuffle(counts: tuple[int, ...]) -> None:
    lengths, patterns = mixture(*counts)
    mixtures = [
        sorted(sorted(patterns[i] for batch in step for i in batch) for step in epoch.steps)
        for epoch in (batch_epoch(lengths, 4, 2, stream(5, "test"), by) for by in (None, patterns))
    ]
    assert mixtures[0] == mixtures[1]


@pytest.mark.parametrize(("patterns", "share"), [([0] * 128, 0.6), ([0, 1] * 64, 1.0), ([0] * 64 + [1] * 64, 0.7)])
def test_sorting_by_length_pads_less_within_patterns(patterns: list[int], share: float) -> None:
    """Lengths of 10 and 50. In the second case they are the patterns, so that nothing can be sorted within one."""
    lengths = [10, 50] * 64
    shuffled, by_length = (
        sum(batch_epoch(lengths, 8, 1, stream(seed, "test"), by).padding for seed in range(10)) for by in (None, patterns)
    )
    assert by_length <= share * shuffled + 1e-9


@pytest.mark.parametrize("batching", ["random", "by-length"])
def test_a_client_trains_on_batches_as_the_experiment_says(batching: Literal["random", "by-length"]) -> None:
    lengths, patterns = mixture(20, 10, 15, 0)
    samples = [
        Encoded((1,) * (length - 1), (2,), (), 0 if pattern in ("both", "image") else None, {}, {}, pattern in ("both", "text"))
        for length, pattern in zip(lengths, patterns, strict=True)
    ]
    train = TrainTable(batch_size=4, accumulate=2, epochs=2, batching=batching)
    steps = client_steps(samples, train, [stream(0, "a"), stream(0, "b")])
    by = patterns if batching == "by-length" else None
    epochs = [batch_epoch(lengths, 4, 2, stream(0, name), by).steps for name in "ab"]
    assert steps == [[[samples[i] for i in batch] for batch in step] for epoch in epochs for step in epoch]
    other = client_steps(samples, train, [stream(0, "a")])
    assert (other == client_steps(samples, TrainTable(batch_size=4, accumulate=2), [stream(0, "a")])) == (batching == "random")


def test_a_clients_samples_know_what_they_show(model: MLLM, dataset: Path) -> None:
    sample = Sample("a", "which color is it?", "red", image=dataset / "red.png", text="a red thing")
    patterns = {"both": (True, True), "image": (True, False), "text": (False, True), "none": (False, False)}
    strategy = prompts.build("modality-agnostic", {})
    for pattern, shown in patterns.items():
        (encoded,) = model.encode([render(sample, SEEN[pattern], strategy)], [sample.image], 200)
        assert encoded.pattern == shown
