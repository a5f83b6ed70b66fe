"""The task `pocket-memes`: what each side gives away, and that the stated ceilings are the best that can be reached."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Hashable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from commands import call, run
from fedmllm.config import validate
from fedmllm.data.images import decode
from fedmllm.data.samples import Sample, Split
from fedmllm.data.tasks import tasks
from fedmllm.data.tasks.pocket_memes import CHOICES, COLORS, Meme, ceiling, draw_meme
from fedmllm.errors import ConfigError
from fedmllm.experiment.parts import build
from fedmllm.rng import stream
from helpers import load_samples, quick

shares = st.floats(0, 1)
noises = st.floats(0, 0.5)
SEES: dict[str, Callable[[Meme], Hashable]] = {
    "both": lambda m: m,
    "image": lambda m: (m.shape, m.color),
    "text": lambda m: (m.named, m.word),
}


def every_meme(p_image: float, p_text: float, noise: float) -> dict[Meme, float]:
    """All memes there are with their probabilities, by going through every choice that the generator makes."""
    chances: dict[Meme, float] = defaultdict(float)
    for answer, flipped, named, other, plain, shape_tells, word_tells in itertools.product(
        (True, False), (True, False), COLORS, range(3), ("circle", "rectangle", "triangle"), (True, False), (True, False)
    ):
        same = answer != flipped
        color = named if same else [c for c in COLORS if c != named][other]
        shape = ("star" if same else "cross") if shape_tells else plain
        word = ("hot" if same else "cold") if word_tells else ""
        chance = 0.5 * (noise if flipped else 1 - noise) / len(COLORS) / 3 / 3
        chance *= (p_image if shape_tells else 1 - p_image) * (p_text if word_tells else 1 - p_text)
        chances[Meme(answer, shape, color, named, word)] += chance
    return chances


def best_auc(memes: dict[Meme, float], sees: Callable[[Meme], Hashable]) -> float:
    """The AUC of the score P(yes | what is seen), which no score exceeds (Neyman and Pearson 1933), pair by pair."""
    positive: dict[Hashable, float] = defaultdict(float)
    negative: dict[Hashable, float] = defaultdict(float)
    for meme, chance in memes.items():
        view = Meme(False, meme.shape, meme.color, meme.named, meme.word)  # the answer itself is not seen
        (positive if meme.answer else negative)[sees(view)] += chance
    seen = [v for v in positive.keys() | negative.keys() if positive[v] + negative[v] > 0]
    score = np.array([round(positive[v] / (positive[v] + negative[v]), 12) for v in seen])
    yes, no = np.array([positive[v] for v in seen]), np.array([negative[v] for v in seen])
    wins = (score[:, None] > score[None, :]) + 0.5 * (score[:, None] == score[None, :])
    return float(yes @ wins @ no / (yes.sum() * no.sum()))


@quick
@given(shares, shares, noises)
def test_the_ceilings_are_the_best_that_can_be_reached(p_image: float, p_text: float, noise: float) -> None:
    best = tasks.build("pocket-memes", {"p_image": p_image, "p_text": p_text, "noise": noise}).ceiling
    memes = every_meme(p_image, p_text, noise)
    assert sum(memes.values()) == pytest.approx(1)
    for pattern, sees in SEES.items():
        assert best[pattern] == pytest.approx(best_auc(memes, sees), abs=1e-9), pattern


def test_ceilings_by_hand() -> None:
    # Share 0.3: of pairs of a yes and a no, 0.7² = 0.49 have two that give nothing away, which is a coin; the others are won.
    assert ceiling(0.3, 0) == pytest.approx(0.51 + 0.49 / 2)
    assert ceiling(0, 0) == 0.5
    assert ceiling(1, 0.1) == pytest.approx(0.9)
    assert ceiling(0.8, 0.5) == 0.5, "answers turned over by a coin cannot be known"


@pytest.mark.parametrize(("p_image", "p_text", "noise"), [(0.3, 0.3, 0.0), (0.7, 0.1, 0.2)])
def test_the_generator_draws_what_the_enumeration_counts(p_image: float, p_text: float, noise: float) -> None:
    count = 12000
    drawn: dict[Meme, float] = defaultdict(float)
    for i in range(count):
        drawn[draw_meme(stream(0, "drawn", i), i % 2 == 1, p_image, p_text, noise)] += 1 / count
    expected = every_meme(p_image, p_text, noise)
    assert drawn.keys() <= {meme for meme, chance in expected.items() if chance}
    for meme, chance in expected.items():  # five standard deviations of a count
        assert abs(drawn[meme] - chance) < 5 * (chance * (1 - chance) / count) ** 0.5 + 1e-12, meme


def samples(split: Split = "train", **options: float) -> list[Sample]:
    return load_samples(tasks.build("pocket-memes", {"n": 300, "test": 300, **options}), split, "error").samples


def dominant(image: object) -> str:
    """The name of the colour that is closest to the darkest pixel."""
    assert isinstance(image, bytes)
    pixels = np.asarray(decode(image)).reshape(-1, 3).astype(int)
    ink = pixels[np.argmin(pixels.min(axis=1))]
    return min(COLORS, key=lambda name: float(np.abs(np.array(COLORS[name]) - ink).sum()))


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_answer_is_whether_the_colors_are_the_same(split: Split) -> None:
    """Checked from the pixels and the words."""
    loaded = samples(split)
    for s in loaded:
        named = re.match(r"A (\w+) object", s.text or "")
        assert named
        assert (dominant(s.image) == named[1]) == (s.answer == "yes"), s.id
        assert (s.choices, s.lettered, s.label) == (CHOICES, True, s.answer)
    assert sum(s.answer == "yes" for s in loaded) == 150


def test_cues_appear_in_their_shares() -> None:
    assert not any("day" in (s.text or "") for s in samples(p_text=0.0))
    assert all(("hot" in (s.text or "")) == (s.answer == "yes") for s in samples(p_text=1.0))
    assert {"cold", "hot"} == {re.findall("hot|cold", s.text or "")[0] for s in samples(p_text=1.0)}


def test_it_is_a_function_of_its_seed() -> None:
    assert samples(n=20) == samples(n=60)[:20]
    assert samples(n=20) != samples(n=20, seed=1)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"n": 1}, "n = 1 must be at least 2"),
        ({"p_image": 1.5}, "p_image = 1.5 must be between 0 and 1"),
        ({"p_text": -0.1}, "p_text = -0.1 must be between 0 and 1"),
        ({"noise": 0.6}, "noise = 0.6 must be between 0 and 0.5"),
    ],
)
def test_bad_options(options: dict[str, float], sentence: str) -> None:
    with pytest.raises(ConfigError, match=f"^task: {sentence}"):
        tasks.build("pocket-memes", options)


def test_the_ceiling_is_reported_next_to_the_score(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = f"""
    [task]
    name = "pocket-memes"
    n = 20
    test = 12
    p_image = 0.5
    noise = 0.1
    [model]
    name = "{tiny}"
    [eval]
    patterns = ["both", "image", "text"]
    bootstrap = 20
    """
    Path("memes.toml").write_text(text)
    metrics = run("baseline", "zero-shot", "memes.toml")["metrics"]
    # 1/2 + 0.8 · (1 − 0.5²)/2 and 1/2 + 0.8 · (1 − 0.7²)/2.
    assert {p: m["ceiling"] for p, m in metrics.items()} == {"both": 0.9, "image": 0.8, "text": 0.704}
    assert all("auc" in m for m in metrics.values())
    shown = call("baseline", "zero-shot", "memes.toml").stdout
    assert "ceiling" in shown
    assert "70.4" in shown


def test_a_mixture_with_another_task_has_no_known_ceiling(tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"id": "1", "text": "so", "answer": "yes", "choices": ["no", "yes"]}\n')
    other = {"name": "jsonl", "train": str(lines), "test": str(lines), "metric": "auc", "positive": "yes"}
    small = {"name": "pocket-memes", "n": 10, "test": 4}
    assert build(validate({"task": small})).prepare().task.ceiling["both"] == 1
    assert build(validate({"task": {**small, "companion": other}})).prepare().task.ceiling == {}
