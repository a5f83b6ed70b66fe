"""The suite `adversarial`: attacks whose best change is known, and the gradients of a real model."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from commands import run
from fedmllm.config import ModelTable
from fedmllm.data.prompts import Conversation
from fedmllm.data.samples import Sample
from fedmllm.data.tasks import tasks
from fedmllm.errors import DataError
from fedmllm.evaluation.suites.adversarial import EDITS, EPSILONS, LIMIT, cut, edits, examine, fgsm, pgd, step
from fedmllm.models.live import LivePicture
from fedmllm.models.mllm import MLLM
from fedmllm.models.scoring import option_scores
from fedmllm.report.suites import KEY_FIGURES
from fedmllm.rng import stream
from fedmllm.testing.suites import LinearPicture, ToyModel, toy_exam
from helpers import png

CHOICES = ("no", "yes")
ALL = np.array((0, *EPSILONS)) / 255


def closed(id: str, image: bytes | None = None, text: str | None = None, answer: str = "yes") -> Sample:
    return Sample(id, "is it?", answer, image, text, CHOICES)


def picture(level: int, side: int = 4) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (side, side), (level,) * 3).save(content, "PNG")
    return content.getvalue()


def certain(sample: Sample) -> Sequence[float]:
    return [0.1, 0.9]


# Pictures


@pytest.mark.parametrize("level", [0, 2, 128, 250, 255])
@pytest.mark.parametrize("option", [0, 1])
def test_the_best_change_of_a_linear_model(level: int, option: int) -> None:
    """The loss grows with w·(x′ − x), whose largest value takes every pixel as far along sign(w) as ε and the range allow."""
    live = LinearPicture(closed("a", picture(level)), [0.3, 0.7])
    towards = (live._weights[1 - option] - live._weights[option])[None]
    each = ALL.reshape(-1, 1, 1, 1)
    best = np.clip(live.pixels + each * np.sign(towards), 0, 1)
    rng = stream(0, "test")
    noise = step(live, ALL, live.pixels, rng.choice((-1.0, 1.0), live.pixels.shape))
    for changed in (fgsm(live, option, ALL), pgd(live, option, ALL, rng)):
        assert changed == pytest.approx(best, abs=1e-6)
        losses, random = -live.scores(changed)[:, option], -live.scores(noise)[:, option]
        assert losses[0] == pytest.approx(-np.log((0.3, 0.7)[option])), "a budget of 0 is the plain test"
        assert (losses[1:] > random[1:]).all()
    assert np.abs(noise - live.pixels).max(axis=(1, 2, 3)) == pytest.approx(ALL, abs=1e-6)
    assert 0 <= noise.min() <= noise.max() <= 1


def test_the_gradients_of_the_toy() -> None:
    live, rng = LinearPicture(closed("a", picture(128)), [0.2, 0.3, 0.5]), stream(0, "test")
    pixels, direction = (live.pixels + rng.normal(size=(2, *live.pixels.shape)) / 9 for _ in range(2))
    pixels, direction = pixels.astype(np.float32), (direction - live.pixels) / 1e3
    change = live.scores(pixels - direction)[:, 2] - live.scores(pixels + direction)[:, 2]
    expected = 2 * (live.gradients(pixels, 2) * direction).sum(axis=(1, 2, 3))
    assert change == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("needed", [0.5, 1.5, 3, 7.9, 8.1])
def test_pictures_fall_at_the_budget_that_is_known(needed: float) -> None:
    """Of 48 equal weights ±c, the logits' difference log 9 is overcome by ε = log 9 / (48 c)."""

    def live(sample: Sample, answer: Sequence[float]) -> LinearPicture:
        signs = stream(1, "signs").choice((-1.0, 1.0), (4, 4, 3))
        weights = np.stack([signs, -signs]) * np.log(9) / (2 * 48 * needed / 255)
        return LinearPicture(sample, answer, weights)

    samples = [closed(str(i), picture(100 + i), "words") for i in range(3)] + [closed("wrong", picture(9), answer="no")]
    found = examine(toy_exam(samples, [certain], live=live)).to_json()
    for pattern in ("both", "image"):
        for epsilon in EPSILONS:
            row = found["tables"]["pictures"][f"{pattern}, {epsilon}/255"]
            falls = float(epsilon > needed)
            assert (row["n"], row["fgsm"], row["pgd"]) == (3, falls, falls)
            assert row["random"] == 0 or epsilon > 3 * needed
    assert not any(row.startswith("text") for row in found["tables"]["pictures"])
    assert found == examine(toy_exam(samples, [certain], live=live)).to_json(), "the same seed, the same findings"


def test_each_model_is_attacked_by_itself() -> None:
    def live(sample: Sample, answer: Sequence[float]) -> LinearPicture:
        return LinearPicture(sample, answer, None if answer[1] > 0.8 else np.zeros((2, 4, 4, 3)))

    weak: ToyModel = lambda sample: [0.1, 0.9] if sample.id == "a" else [0.9, 0.1]  # noqa: E731
    samples = [closed("a", picture(128)), closed("b", picture(130))]
    steady: ToyModel = lambda sample: [0.4, 0.6]  # noqa: E731
    row = examine(toy_exam(samples, [weak, steady], live=live, owners=(2, 5))).tables["pictures"]["both, 8/255"]
    single = examine(toy_exam(samples, [weak], live=live)).tables["pictures"]["both, 8/255"]
    assert (row["n"], single["n"]) == (2, 1), "three right answers of two models"
    assert row["fgsm"] == pytest.approx(single["fgsm"] / 3)


# Texts


@pytest.mark.parametrize(
    ("text", "holds", "edits_needed"),
    [
        ("a very red thing in the sun", lambda t: "red" in t.split(), 1),
        ("a very red thing in the hot sun", lambda t: "red" in t.split() or "sun" in t.split(), 2),
        ("red", lambda t: t == "red", 1),
        ("一个红色的东西在阳光下面非常漂亮真的", lambda t: t.startswith("一个红色的东西在阳光下"), 1),
        ("a very red thing", lambda t: True, 99),
    ],
)
def test_texts_fall_after_the_edits_that_they_need(text: str, holds: Callable[[str], bool], edits_needed: int) -> None:
    def model(sample: Sample) -> Sequence[float]:
        words = (sample.text or "").split()
        more = 0.1 * ("red" in words) + 0.1 * ("sun" in words)  # which says where the search should look
        return [0.3 - more, 0.7 + more] if holds(sample.text or "") else [0.7, 0.3]

    found = examine(toy_exam([closed("a", None, text)], [model])).tables["texts"]
    for pattern in ("both", "text"):
        rows = [found[f"{pattern}, {n} edit{'s' * (n > 1)}"] for n in EDITS]
        assert [row["greedy"] for row in rows] == [float(n >= edits_needed) for n in EDITS]
        assert all(row["n"] == 1 for row in rows)


def test_greedy_edits_do_more_than_random_ones() -> None:
    words = "one two three four five six seven eight nine ten"
    samples = [closed(f"s{i}", None, words.replace(" ", f" {'x' * (i % 5)} ")) for i in range(20)]
    model: ToyModel = lambda s: [0.2, 0.8] if "seven" in (s.text or "") else [0.6, 0.4]  # noqa: E731
    row = examine(toy_exam(samples, [model])).tables["texts"]["both, 1 edit"]
    assert row["greedy"] == 1
    assert row["random"] < 0.5


def transposed(a: str, b: str) -> bool:
    different = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
    return len(different) == 1 or (
        len(different) == 2 and different[1] == different[0] + 1 and a[different[0]] == b[different[1]] != a[different[1]]
    )


@given(st.text(st.characters(exclude_categories=("Z", "C")), min_size=1, max_size=12), st.integers(0, 99))
def test_an_edit_changes_one_character(word: str, seed: int) -> None:
    for edited in edits(word, stream(seed, "test")):
        assert edited
        assert edited != word
        shorter, longer = sorted((word, edited), key=len)
        if len(shorter) == len(longer):
            assert transposed(word, edited)
        else:
            assert any(longer[:i] + longer[i + 1 :] == shorter for i in range(len(longer)))


@given(st.text())
def test_a_text_is_its_pieces(text: str) -> None:
    pieces = cut(text)
    assert "".join(pieces) == text
    assert all(0 < len(word) <= 12 and not any(map(str.isspace, word)) for word in pieces[1::2])


# What cannot be attacked


def test_what_cannot_be_attacked_is_said() -> None:
    opened = Sample("open", "what?", "red", picture(1), "a text")
    samples = [closed("a", None, "a text"), closed("b", None, " "), closed("c", picture(7)), opened]
    found = examine(toy_exam(samples, [lambda s: [0.1, 0.9] if s.choices else "red"])).to_json()
    assert found["unavailable"] == [
        "3 of 4 test samples have no picture to attack, or an open question.",
        "3 of 4 test samples have no text to attack, or an open question.",
    ]
    assert found["details"] == {"pictures": {"attacked": 1, "of": 1}, "texts": {"attacked": 1, "of": 1}}
    wrong = examine(toy_exam([closed("a", picture(7), "a", "no")], [certain])).tables
    assert all(row["n"] == 0 and row["random"] != row["random"] for table in wrong.values() for row in table.values()), "NaN"
    assert not examine(toy_exam([opened], [lambda s: "red"])).tables


def test_texts_are_attacked_without_gradients() -> None:
    def refuse(sample: Sample, answer: Sequence[float]) -> LinearPicture:
        raise DataError("There is no gradient.")

    found = examine(toy_exam([closed("a", picture(7), "a text")], [certain], live=refuse))
    assert found.unavailable == ["There is no gradient."]
    assert list(found.tables) == ["texts"]


def test_no_more_than_the_limit_are_attacked() -> None:
    samples = [closed(f"s{i:03}", picture(i, 1)) for i in range(LIMIT + 6)]
    exams = [replace(toy_exam(samples, [certain], patterns=("image",)), seed=seed) for seed in range(2)]
    found = [examine(exam).to_json() for exam in exams]
    assert found[0]["details"]["pictures"] == {"attacked": LIMIT, "of": LIMIT + 6}
    assert found[0]["tables"]["pictures"]["image, 1/255"]["n"] == LIMIT


# A real model


@pytest.fixture(scope="module")
def pocket() -> MLLM:
    return MLLM.load(ModelTable(name="pocket", precision="fp32"), seed=0)


def memes(model: MLLM, number: int) -> list[tuple[Any, int]]:
    """Encoded questions of pocket-memes with their pictures, and the right options."""
    samples = [s for s in tasks.build("pocket-memes", {"n": 2, "test": 60, "seed": 1}).load("test") if isinstance(s, Sample)]
    found = []
    for s in samples[:number]:
        talk = Conversation(f"{s.text}\n{s.question}", "", True, s.choices or (), True)
        found.append((model.encode_one(talk, s.image, 500, asks=True), (s.choices or ()).index(s.answer)))
    return found


def test_gradients_through_the_vision_tower(pocket: MLLM) -> None:
    """The gradients are the finite differences of the loss; without a change it is the plain test's; 8/255 along their sign do
    more than noise."""
    harm = []
    for question, right in memes(pocket, 3):
        live = LivePicture(pocket, question)
        (plain,) = option_scores(pocket, [question])
        assert live.scores(live.pixels[None])[0] == pytest.approx(plain, abs=1e-4), "the cache and the live tower agree"
        assert 0 <= live.pixels.min() < live.pixels.max() <= 1
        direction = np.sign(live.gradients(live.pixels[None], right)[0])
        inside = np.clip(live.pixels, 0.01, 0.99)
        gradient = live.gradients(inside[None], right)[0]
        h = 1e-3
        low, high = live.scores(np.stack([inside - h * direction, inside + h * direction]).astype(np.float32))[:, right]
        assert (low - high) / (2 * h) == pytest.approx(float((gradient * direction).sum()), rel=0.05)
        signs = stream(0, "test").choice((-1.0, 1.0), live.pixels.shape)
        attacked = np.concatenate([fgsm(live, right, ALL[-1:]), step(live, ALL[-1:], live.pixels, signs)])
        harm.append(-live.scores(attacked)[:, right] + plain[right])
    fast, noise = np.mean(harm, axis=0)
    assert fast > abs(noise)
    assert fast > 0.05


@pytest.mark.parametrize("options", [("red", "blue"), ("red", "red hat", "blue")])
def test_options_of_any_length_have_gradients(model: MLLM, options: tuple[str, ...]) -> None:
    """The second kind of options is scored whole."""
    live = LivePicture(model, model.encode_one(Conversation("what is it?", "", True, options), png(), 300, asks=True))
    gradients = live.gradients(np.stack([live.pixels] * 2), 1)
    assert gradients.shape == (2, *live.pixels.shape)
    assert np.abs(gradients).max(axis=tuple(range(1, gradients.ndim))).min() > 0
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-3, abs=1e-6)


def test_models_that_cannot_be_attacked(model: MLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    question = model.encode_one(Conversation("what is it?", "", True, ("red", "blue")), png(), 300, asks=True)
    live, tower = LivePicture(model, question), type(model.backbone.model.base_model).get_image_features
    with monkeypatch.context() as patch:
        patch.setattr(type(model.backbone.model.base_model), "get_image_features", torch.no_grad()(tower))
        with pytest.raises(DataError, match="gives no finite gradient with respect to its pixels"):
            live.gradients(live.pixels[None], 0)
    pixels = model.pictures.pixels
    for spoiled in (torch.square, torch.neg, lambda values: values - values.mean()):

        def spoil(
            image: Image.Image, of: int, change: Callable[[torch.Tensor], torch.Tensor] = spoiled
        ) -> dict[str, torch.Tensor]:
            return {k: change(v) if k == "pixel_values" else v for k, v in pixels(image, of).items()}

        monkeypatch.setattr(model.pictures, "pixels", spoil)
        with pytest.raises(DataError, match="does more to pixels than scale them"):
            LivePicture(model, question)


def test_runs_are_attacked(write_experiment: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ("--set", "task.test_samples=8", "--set", 'eval.suites=["adversarial"]', "--set", 'eval.patterns=["both"]')
    file = write_experiment(rounds=1)
    found = run("run", file, *settings, "--out", "a")["suites"]["adversarial"]
    assert {row for table in found["tables"].values() for row in table} == {
        *(f"both, {epsilon}/255" for epsilon in EPSILONS),
        *(f"both, {n} edit{'s' * (n > 1)}" for n in EDITS),
    }
    key_figures = KEY_FIGURES["adversarial"].values()
    assert all(column in found["tables"][table][row] for table, row, column in key_figures)
    again = run("eval", "a", "--trust-config", "--suite", "adversarial")["suites"]["adversarial"]
    assert again == found
    personal = run("run", file, *settings, "--set", "algorithm.name=fedsa-lora", "--set", "eval.clients=2", "--out", "b")
    assert personal["suites"]["adversarial"]["tables"].keys() == found["tables"].keys()
