"""The contract of suites, checked with models that are functions of what they are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from fedmllm.data.images import decode
from fedmllm.data.samples import Sample, Task
from fedmllm.evaluation.predictions import PATTERNS, Prediction
from fedmllm.evaluation.suites import Exam, LivePicture, OneModel, Replies, suites
from fedmllm.evaluation.suites.cross_modal import noise_picture
from fedmllm.kinds import Pattern
from fedmllm.rng import stream
from fedmllm.storage.strict_json import dump
from fedmllm.testing.registered import check_registered

ToyModel = Callable[[Sample], Sequence[float] | str]
"""A sample as it is shown -> the probabilities of its choices, or the answer to an open question."""

ToyPictures = Callable[[Sample, Sequence[float]], LivePicture]
"""A sample as it is shown and the probabilities of its choices -> its question about any pixels."""


class LinearPicture:
    """A closed question whose options' logits are linear in the pixels: log p(option) of the picture itself + W (x − picture).

    Several pictures, of equal width, are one below the other. `weights` is W: (options, height, width, 3); without it, W is
    drawn from the size.
    """

    def __init__(self, sample: Sample, answer: Sequence[float], weights: NDArray[np.float64] | None = None) -> None:
        levels = np.concatenate([np.asarray(decode(picture)) for picture in sample.pictures])
        self.pixels: NDArray[np.float32] = np.asarray(levels, dtype=np.float32) / np.float32(255)
        self._logits, shape = np.log(answer), (len(answer), *self.pixels.shape)
        self._weights = stream(0, "toy weights").normal(size=shape) if weights is None else weights

    def scores(self, pixels: NDArray[np.float32]) -> NDArray[np.float64]:
        logits = self._logits + np.tensordot(pixels - self.pixels, self._weights, ([1, 2, 3], [1, 2, 3]))
        scores: NDArray[np.float64] = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return scores

    def gradients(self, pixels: NDArray[np.float32], option: int) -> NDArray[np.float32]:
        excess = np.exp(self.scores(pixels)) - np.eye(len(self._logits))[option]
        return np.tensordot(excess, self._weights, 1).astype(np.float32)


def toy_exam(
    samples: Sequence[Sample],
    models: Sequence[ToyModel],
    *,
    patterns: Sequence[Pattern] = ("both", "image", "text"),
    counts: Sequence[Sequence[int]] = ((1, 0, 0, 0),),
    owners: Sequence[int] = (),
    positive: str | None = None,
    live: ToyPictures = LinearPicture,
) -> Exam:
    """An exam of toy models, measured by AUC if an answer is `positive` and else by accuracy. `live` takes a sample as it is
    shown and the probabilities of its options."""

    def replies(model: ToyModel, asked: Sequence[Sample], pattern: Pattern) -> Replies:
        assert len({sample.id for sample in asked}) == len(asked), "an id is asked about twice"
        shown = [s.showing(PATTERNS[pattern]) for s in asked if pattern == "both" or pattern in s.modalities]
        return {s.id: _reply(pattern, s, model(s), positive) for s in shown}

    def ask(asked: Sequence[Sample], patterns: Sequence[Pattern]) -> dict[Pattern, list[Replies]]:
        return {pattern: [replies(model, asked, pattern) for model in models] for pattern in patterns}

    def one(model: ToyModel) -> OneModel:
        def pictures(asked: Sequence[Sample], pattern: Pattern) -> Iterator[LivePicture]:
            for sample in asked:
                answered = model(shown := sample.showing(PATTERNS[pattern]))
                assert not isinstance(answered, str), "an open question has no options to attack"
                yield live(shown, answered)

        return OneModel(partial(replies, model), pictures)

    task = Task("toy", "auc" if positive else "accuracy", lambda split: samples, positive)
    return Exam(
        task,
        samples,
        patterns,
        "exact",
        0,
        np.array(counts, dtype=np.int64).reshape(-1, 4),
        owners,
        ask,
        [one(model) for model in models],
    )


def _reply(pattern: Pattern, sample: Sample, answer: Sequence[float] | str, positive: str | None) -> Prediction:
    if isinstance(answer, str):
        return Prediction(pattern, sample.id, sample.answer, answer, answer == sample.answer, False, not answer)
    assert sample.choices is not None
    option = int(np.argmax(answer))
    score = answer[sample.choices.index(positive)] if positive in sample.choices else None
    text = sample.choices[option]
    return Prediction(
        pattern, sample.id, sample.answer, text, text == sample.answer, True, False, score, None, option, tuple(answer)
    )


def _samples() -> dict[str, list[Sample]]:
    """Samples of each kind: with both modalities, with one, with none, with two pictures, and with an open question."""
    choices, pictures = ("no", "yes"), [noise_picture(seed, 8) for seed in range(2)]
    kinds: dict[str, list[Sample]] = {}
    for kind, (image, text) in {
        "both": (True, True),
        "image": (True, False),
        "text": (False, True),
        "none": (False, False),
    }.items():
        kinds[kind] = [
            Sample(f"{kind}{i}", "is it?", choices[i % 2], pictures[i // 2] if image else None,
                   f"some words {i // 3}" if text else None, choices)
            for i in range(4)
        ]  # fmt: skip
    kinds["two pictures"] = [replace(sample, id=f"two {sample.id}", image=tuple(pictures)) for sample in kinds["both"][:2]]
    kinds["open"] = [Sample(f"open{i}", "what?", f"answer {i % 2}", pictures[i % 2], "a b c") for i in range(3)]
    return kinds


def _drawn(sample: Sample) -> Sequence[float] | str:
    """An answer that depends on all that is shown, and on nothing else."""
    seed = sum(len(picture) for picture in sample.pictures if isinstance(picture, bytes))
    rng = stream(seed, "toy answer", sample.text or "", sample.question)
    if sample.choices is None:
        return f"answer {int(rng.integers(2))}"
    share = float(rng.random())
    return [share, 1 - share]


def check_suite(name: str) -> None:
    """The suite copes with a task of any kinds of samples, with several models, and without client data; what it finds follows
    from the answers alone and can be written as JSON; every table has rows of figures, and a sentence says what is missing."""
    check_registered(suites, name)
    part, kinds = f"suite {name!r}", _samples()
    suite = suites.build(name, {})
    everything = [sample for samples in kinds.values() for sample in samples]
    federations: Sequence[tuple[list[ToyModel], list[tuple[int, ...]], tuple[int, ...]]]
    federations = [([_drawn], [(1, 1, 0, 0)], ()), ([_drawn] * 2, [], (0, 3))]
    for samples in (*kinds.values(), everything):
        for models, counts, owners in federations if samples is everything else federations[:1]:
            exam = toy_exam(samples, models, counts=counts, owners=owners)
            findings = suite(exam).to_json()
            assert list(findings) == ["tables", "unavailable", "details"], f"{part}: the keys are {list(findings)}"
            for title, table in findings["tables"].items():
                figures = [figure for row in table.values() for figure in row.values()]
                numbers = all(isinstance(figure, int | float) for figure in figures)
                assert numbers, f"{part}: a figure of the table {title!r} is no number"
            sentences = all(text.endswith(".") for text in findings["unavailable"])
            assert sentences, f"{part}: `unavailable` holds more than sentences"
            found = any(findings["tables"].values()) or findings["unavailable"]
            assert found, f"{part}: finds nothing and does not say why"
    again = dump(suite(exam).to_json())
    assert again == dump(findings), f"{part}: what it finds depends on more than the answers"
