"""adversarial: how often a small change, chosen with knowledge of the model, turns a right answer into a wrong one.

Pictures: with ℓ = −log p(right option), x the pixels from 0 to 1, ε a budget and clip the projection on |x′ − x| ≤ ε and
0 ≤ x′ ≤ 1,

    FGSM (1412.6572): x′ = clip(x + ε sign ∇ℓ(x))
    PGD (1706.06083): x₀ = clip(x + u), u uniform in ±ε;  x_{t+1} = clip(x_t + α sign ∇ℓ(x_t)), ten steps of α = ε/4.

Texts: a greedy search over edits of one character (after DeepWordBug, 1801.04354, and TextBugger, 1812.05271). The words are
ordered by how much ℓ rises without them; then, edit by edit, each kind of edit is tried in the first four words, and the one
that raises ℓ most is kept.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedmllm.data.samples import Modality, Sample
from fedmllm.errors import DataError
from fedmllm.evaluation.predictions import PATTERNS, Prediction
from fedmllm.evaluation.suites import Exam, Findings, LivePicture, OneModel, Suite, suites
from fedmllm.kinds import Pattern
from fedmllm.rng import stream

LIMIT = 64
"""No more samples than this are attacked, of each modality."""
EPSILONS = (1, 2, 4, 8)
"""In 255ths of the range from black to white."""
STEPS = 10
EDITS = (1, 2, 4)
"""Numbers of edited characters."""
_PLACES = 4
_WORDS = 24
"""A long text has this many words, by a draw, among which the most important are looked for."""

Figures = dict[str, dict[str, float | int]]
Attack = Callable[[Exam, Sequence[Sample], Pattern], Figures]
Pixels = NDArray[np.float32]
Pieces = list[str]
"""A text cut into what is between words (even indices) and words (odd ones)."""


@suites.register("adversarial")
def adversarial() -> Suite:
    """Attacks on pictures (FGSM, PGD) and texts (greedy edits of characters) against random changes of the same size."""
    return examine


def examine(exam: Exam) -> Findings:
    """Each model is attacked by itself. Of the samples that it answers right, the tables have the share that each attack makes
    wrong, as a mean over models and samples; `n` is the number of these samples."""
    findings = Findings()
    can_be: dict[Modality, list[Sample]] = {
        "image": [sample for sample in exam.samples if sample.choices and sample.image is not None],
        "text": [sample for sample in exam.samples if sample.choices and sample.text and sample.text.strip()],
    }
    attacks: Sequence[tuple[Modality, str, str, Attack]] = (
        ("image", "pictures", "picture", _attack_pictures),
        ("text", "texts", "text", _attack_texts),
    )
    for modality, title, name, attack in attacks:
        samples = can_be[modality]
        patterns = [pattern for pattern in exam.patterns if modality in PATTERNS[pattern]]
        if without := len(exam.samples) - len(samples):
            findings.unavailable.append(
                f"{without} of {len(exam.samples)} test samples have no {name} to attack, or an open question."
            )
        drawn = stream(exam.seed, "adversarial", modality).permutation(len(samples))[:LIMIT]
        attacked = [samples[index] for index in sorted(drawn.tolist())]
        findings.details[title] = {"attacked": len(attacked), "of": len(samples)}
        try:
            if attacked and patterns:
                findings.tables[title] = {k: row for p in patterns for k, row in attack(exam, attacked, p).items()}
        except DataError as error:
            findings.unavailable.append(str(error))
    return findings


def _rows(
    pattern: Pattern, budgets: Sequence[str], attacks: Sequence[str], models: int, wrong: Sequence[NDArray[np.bool_]]
) -> Figures:
    """`wrong`: (attacks, budgets) of each model and sample that was right without an attack."""
    shares = np.mean(wrong, axis=0) if wrong else np.full((len(attacks), len(budgets)), np.nan)
    return {
        f"{pattern}, {budget}": {"n": round(len(wrong) / models), **dict(zip(attacks, map(float, column), strict=True))}
        for budget, column in zip(budgets, shares.T, strict=True)
    }


def _right(model: OneModel, samples: Sequence[Sample], pattern: Pattern) -> dict[str, Sample]:
    """id -> sample, of those that the model answers right without an attack."""
    replies = model.ask(samples, pattern)
    return {s.id: s for s in samples if s.id in replies and replies[s.id].correct}


def _option(sample: Sample) -> int:
    return (sample.choices or ()).index(sample.answer)


# Pictures


def _attack_pictures(exam: Exam, samples: Sequence[Sample], pattern: Pattern) -> Figures:
    epsilons, wrong = np.array(EPSILONS) / 255, list[NDArray[np.bool_]]()
    for model in exam.models:
        right = list(_right(model, samples, pattern).values())
        for sample, picture in zip(right, model.live(right, pattern), strict=True):
            option, rng = _option(sample), stream(exam.seed, "adversarial", "pixels", sample.id)
            noise = step(picture, epsilons, picture.pixels, rng.choice((-1.0, 1.0), picture.pixels.shape))
            changed = np.stack([fgsm(picture, option, epsilons), pgd(picture, option, epsilons, rng), noise])
            chosen = picture.scores(changed.reshape(-1, *picture.pixels.shape)).argmax(axis=1)
            wrong.append((chosen != option).reshape(changed.shape[:2]))
    budgets = [f"{epsilon}/255" for epsilon in EPSILONS]
    return _rows(pattern, budgets, ("fgsm", "pgd", "random"), len(exam.models), wrong)


def step(
    picture: LivePicture, epsilons: NDArray[np.float64], start: Pixels, moves: NDArray[np.float32] | NDArray[np.float64]
) -> Pixels:
    """(budgets, …): `start` moved by `moves` times each budget, then projected on ±ε around the picture and on 0 to 1."""
    each = epsilons.reshape(-1, *[1] * picture.pixels.ndim)
    within = np.clip(start + each * moves, picture.pixels - each, picture.pixels + each)
    projected: Pixels = np.clip(within, 0, 1).astype(np.float32)
    return projected


def fgsm(picture: LivePicture, option: int, epsilons: NDArray[np.float64]) -> Pixels:
    """(budgets, …): one step along the sign of the gradient."""
    return step(picture, epsilons, picture.pixels, np.sign(picture.gradients(picture.pixels[None], option)))


def pgd(picture: LivePicture, option: int, epsilons: NDArray[np.float64], rng: np.random.Generator) -> Pixels:
    """(budgets, …): `STEPS` steps of ε/4 from a random start, for all budgets at once."""
    pixels = step(picture, epsilons, picture.pixels, rng.uniform(-1, 1, picture.pixels.shape))
    for _ in range(STEPS):
        pixels = step(picture, epsilons, pixels, np.sign(picture.gradients(pixels, option)) / 4)
    return pixels


# Texts


def _attack_texts(exam: Exam, samples: Sequence[Sample], pattern: Pattern) -> Figures:
    wrong: list[NDArray[np.bool_]] = []
    for model in exam.models:
        right = _right(model, samples, pattern)
        greedy, random = _greedy(exam.seed, model, right, pattern), _random(exam.seed, model, right, pattern)
        # An answer that is wrong after one edit needs no more of them.
        wrong += [np.array([[greedy[i] <= n for n in EDITS], random[i]]) for i in right]
    budgets = [f"{n} edit{'s' * (n > 1)}" for n in EDITS]
    return _rows(pattern, budgets, ("greedy", "random"), len(exam.models), wrong)


def cut(text: str) -> Pieces:
    """The text in pieces. A run without spaces, as where words are not written apart, is cut after every twelve characters."""
    return re.split(r"(\S{1,12})", text)


def edits(word: str, rng: np.random.Generator) -> list[str]:
    """The word after one edit of each kind at a random place: a letter is substituted or inserted and, unless the word has one
    character only or all are equal, a character is dropped or two neighbours change places."""
    at = int(rng.integers(len(word)))
    letters = [letter for letter in string.ascii_lowercase if letter != word[at]]
    substitute, insert = (letters[int(rng.integers(len(letters)))] for _ in range(2))
    edited = [word[:at] + substitute + word[at + 1 :], word[:at] + insert + word[at:]]
    if len(word) > 1:
        edited.append(word[:at] + word[at + 1 :])
    if unequal := [i for i in range(len(word) - 1) if word[i] != word[i + 1]]:
        i = unequal[int(rng.integers(len(unequal)))]
        edited.append(word[:i] + word[i + 1] + word[i] + word[i + 2 :])
    return edited


def _with(pieces: Pieces, index: int, piece: str) -> Pieces:
    return [*pieces[:index], piece, *pieces[index + 1 :]]


def _greedy(seed: int, model: OneModel, right: Mapping[str, Sample], pattern: Pattern) -> dict[str, float]:
    """id -> the number of edits after which the answer is wrong, infinite if `EDITS` are not enough."""
    pieces = {i: cut(sample.text or "") for i, sample in right.items()}
    rngs = {i: stream(seed, "adversarial", "edits", i) for i in right}
    places = _important(model, right, pieces, rngs, pattern)
    needed = dict.fromkeys(right, math.inf)
    for number in range(1, max(EDITS) + 1):
        tried = {
            i: [_with(pieces[i], at, word) for at in places[i] for word in edits(pieces[i][at], rngs[i])]
            for i in right if needed[i] > number
        }  # fmt: skip
        for i, replies in _asked(model, right, tried, pattern).items():
            best = min(replies, key=lambda k: (replies[k].correct, _probability(replies[k], right[i])))
            pieces[i] = tried[i][best]
            needed[i] = math.inf if replies[best].correct else number
    return needed


def _important(
    model: OneModel,
    right: Mapping[str, Sample],
    pieces: Mapping[str, Pieces],
    rngs: Mapping[str, np.random.Generator],
    pattern: Pattern,
) -> dict[str, list[int]]:
    """id -> the places of the words without which the right option is least probable, the most important first."""
    places: dict[str, list[int]] = {}
    for i, of_text in pieces.items():
        words = range(1, len(of_text), 2)
        places[i] = [words[k] for k in sorted(rngs[i].permutation(len(words))[:_WORDS].tolist())]
    without = {i: [_with(pieces[i], at, "") for at in p] for i, p in places.items() if len(p) > _PLACES}
    for i, replies in _asked(model, right, without, pattern).items():
        order = sorted(replies, key=lambda k: _probability(replies[k], right[i]))
        places[i] = [places[i][k] for k in order[:_PLACES]]
    return places


def _random(seed: int, model: OneModel, right: Mapping[str, Sample], pattern: Pattern) -> dict[str, list[bool]]:
    """id -> whether the answer is wrong after each number of random edits in random words."""
    texts: dict[str, list[Pieces]] = {}
    for i, sample in right.items():
        pieces, rng, after = cut(sample.text or ""), stream(seed, "adversarial", "random edits", i), {}
        for number in range(1, max(EDITS) + 1):
            at = 1 + 2 * int(rng.integers(len(pieces) // 2))
            options = edits(pieces[at], rng)
            pieces = _with(pieces, at, options[int(rng.integers(len(options)))])
            after[number] = pieces
        texts[i] = [after[number] for number in EDITS]
    asked = _asked(model, right, texts, pattern)
    return {i: [k in asked.get(i, {}) and not asked[i][k].correct for k in range(len(EDITS))] for i in right}


def _asked(
    model: OneModel, samples: Mapping[str, Sample], texts: Mapping[str, Sequence[Pieces]], pattern: Pattern
) -> dict[str, dict[int, Prediction]]:
    """id -> {number of its text: reply} of samples with other texts. Texts that are too long are left out."""
    variants = {
        f"{k} {i}": (i, k, replace(samples[i], id=f"{k} {i}", text="".join(pieces)))
        for i, of_sample in texts.items() for k, pieces in enumerate(of_sample)
    }  # fmt: skip
    replies: dict[str, dict[int, Prediction]] = {}
    if variants:
        for name, reply in model.ask([sample for _, _, sample in variants.values()], pattern).items():
            i, k, _ = variants[name]
            replies.setdefault(i, {})[k] = reply
    return replies


def _probability(reply: Prediction, sample: Sample) -> float:
    return reply.probabilities[_option(sample)]
