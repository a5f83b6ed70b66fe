"""What the suites find about models whose answers are known."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fedmllm.data.corruptions import KINDS, SEVERITIES, OtherTexts, corrupted
from fedmllm.data.samples import Sample
from fedmllm.data.tasks import tasks
from fedmllm.evaluation.predictions import PATTERNS
from fedmllm.evaluation.suites import suites
from fedmllm.evaluation.suites.cross_modal import contrast_pairs
from fedmllm.kinds import Pattern
from fedmllm.testing.suites import ToyModel, check_suite, toy_exam
from helpers import png

CHOICES = ("no", "yes")
RED, BLUE = png(), png((20, 30, 220))


def closed(
    id: str, answer: str, image: bytes | None = RED, text: str | None = "a red thing in the sun", **fields: Any
) -> Sample:
    return Sample(id, "is it?", answer, image, text, CHOICES, **fields)


def examine(name: str, samples: Sequence[Sample], *models: ToyModel, **options: Any) -> dict[str, Any]:
    return suites.build(name, {})(toy_exam(samples, models, **options)).to_json()


# Corruption


def reads(sample: Sample) -> Sequence[float]:
    """Yes if it sees the whole text, or a picture as bright as RED."""
    whole = "red thing in the" in (sample.text or "") or sample.image == RED
    return [0.2, 0.8] if whole else [0.7, 0.3]


@pytest.mark.parametrize("positive", [None, "yes"])
def test_corruption_is_the_score_on_corrupted_samples(positive: str | None) -> None:
    samples = [closed(f"s{i}", CHOICES[i % 3 > 0]) for i in range(6)] + [
        closed("t", "yes", None),
        closed("u", "no", BLUE, None),
    ]
    found = examine("corruption", samples, reads, positive=positive)
    plain = toy_exam(samples, [reads], positive=positive)
    texts = [s.text for s in samples if s.text]
    for pattern, visible in PATTERNS.items():
        curves = found["details"]["scores"][pattern]
        assert list(curves) == [kind for modality in ("image", "text") if modality in visible for kind in KINDS[modality]]
        for modality in sorted(visible):
            for kind in KINDS[modality]:
                for severity in (0, 2, 5):
                    worse = [corrupted(s, modality, kind, severity, 0, OtherTexts(texts)) for s in samples]
                    expected = plain.score(plain.ask(worse, [pattern])[pattern])
                    assert curves[kind][severity] == pytest.approx(expected, abs=1e-6), (pattern, kind, severity)
        row, clean = found["tables"]["robustness"][pattern], plain.score(plain.ask(samples, [pattern])[pattern])
        assert {curve[0] for curve in curves.values()} == {round(clean, 6)}, "severity 0 is the plain test"
        assert row["clean"] == pytest.approx(clean, abs=1e-6)
        ratios = [score / clean for curve in curves.values() for score in curve[1:]]
        assert row["robustness"] == pytest.approx(sum(ratios) / len(ratios), abs=1e-5)
        means = [sum(curve[severity] for curve in curves.values()) / len(curves) for severity in SEVERITIES]
        assert [row[f"severity_{severity}"] for severity in SEVERITIES] == pytest.approx(means, abs=1e-6)
    assert min(min(curve) for curve in found["details"]["scores"]["text"].values()) < 1, "some corruption does harm"


def test_corruption_says_what_there_is_none_of() -> None:
    found = examine("corruption", [closed("a", "yes", None), closed("b", "no", None)], reads, patterns=("both", "text"))
    assert found["unavailable"] == ["No test sample has a picture, so that there is none to corrupt."]
    assert list(found["details"]["scores"]["both"]) == list(KINDS["text"])
    wrong = examine("corruption", [closed("a", "no", None)], lambda sample: [0.1, 0.9], patterns=("text",))
    assert wrong["tables"]["robustness"]["text"]["robustness"] != wrong["tables"]["robustness"]["text"]["robustness"], "NaN"


# Attribution


def of_view(none: float, image: float, text: float, both: float) -> ToyModel:
    """A model that gives the right answer, which the id begins with, these probabilities."""

    def answer(sample: Sample) -> Sequence[float]:
        shown = {"": none, "image": image, "text": text, "imagetext": both}["".join(sorted(sample.modalities))]
        return [shown, 1 - shown] if sample.id.startswith("no") else [1 - shown, shown]

    return answer


PAIRED = [closed(f"{CHOICES[i % 2]}{i}", CHOICES[i % 2], label=f"class {i % 2}") for i in range(4)]

SHAPLEY: list[tuple[tuple[float, float, float, float], dict[str, float]]] = [
    ((0.4, 0.6, 0.7, 0.9), {"none": 0, "image": 1, "text": 1, "both": 1, "shapley_image": 0.5, "shapley_text": 0.5}),
    ((0.4, 0.6, 0.3, 0.9), {"none": 0, "image": 1, "text": 0, "both": 1, "shapley_image": 1, "shapley_text": 0}),
    ((0.4, 0.3, 0.3, 0.9), {"none": 0, "image": 0, "text": 0, "both": 1, "shapley_image": 0.5, "shapley_text": 0.5}),
    ((0.4, 0.6, 0.7, 0.2), {"none": 0, "image": 1, "text": 1, "both": 0, "shapley_image": 0, "shapley_text": 0}),
    ((0.8, 0.3, 0.7, 0.2), {"none": 1, "image": 0, "text": 1, "both": 0, "shapley_image": -1, "shapley_text": 0}),
]


@pytest.mark.parametrize(("views", "expected"), SHAPLEY)
def test_shapley_by_hand(views: tuple[float, float, float, float], expected: dict[str, float]) -> None:
    found = examine("attribution", PAIRED, of_view(*views))
    row = found["tables"]["shapley"]["score"]
    assert row == {"n": 4, **expected}
    assert row["shapley_image"] + row["shapley_text"] == row["both"] - row["none"]
    _, image, text, both = views
    assert found["tables"]["gains"] == {
        "image": {"n": 4, "gain": pytest.approx(both - text), "helped": float(both > text), "harmed": float(both < text)},
        "text": {"n": 4, "gain": pytest.approx(both - image), "helped": float(both > image), "harmed": float(both < image)},
    }
    assert found["tables"]["classes"]["class 1"] == {
        "n": 2,
        "image": pytest.approx(both - text),
        "text": pytest.approx(both - image),
    }
    calibrated = found["tables"]["calibration"]["text"]
    assert calibrated == {
        "n": 4,
        "ece": pytest.approx(max(text, 1 - text) if text < 0.5 else 1 - text),
        "brier": pytest.approx(2 * (1 - text) ** 2),
    }


COUNTS = [(30, 10, 0, 5), (0, 0, 4, 0), (0, 0, 0, 3), (1, 0, 3, 0)]


def test_gains_of_clients_are_weighted_by_what_they_see() -> None:
    found = examine("attribution", PAIRED, of_view(0.4, 0.5, 0.7, 0.95), counts=COUNTS)
    assert found["details"]["clients"] == [
        {"client": 0, "image": pytest.approx((30 * 0.25 + 10 * 0.1) / 40), "text": pytest.approx(30 * 0.45 / 40)},
        {"client": 1, "image": 0.0, "text": pytest.approx(0.3)},
        {"client": 3, "image": pytest.approx(0.25 / 4), "text": pytest.approx((0.45 + 3 * 0.3) / 4)},
    ]
    row = found["tables"]["clients"]["text"]
    assert (row["n"], row["lowest"], row["highest"]) == (3, pytest.approx(0.3), pytest.approx(0.3375))


def test_each_client_with_a_model_of_its_own() -> None:
    models = of_view(0.4, 0.5, 0.7, 0.9), of_view(0.4, 0.4, 0.5, 0.6)
    found = examine("attribution", PAIRED, *models, counts=COUNTS, owners=(1, 3))
    assert found["details"]["clients"] == [
        {"client": 1, "image": 0.0, "text": pytest.approx(0.3)},
        {"client": 3, "image": pytest.approx(0.1 / 4), "text": pytest.approx((0.2 + 3 * 0.1) / 4)},
    ]
    assert found["tables"]["gains"]["image"]["gain"] == pytest.approx((0.2 + 0.1) / 2)


def test_attribution_of_what_is_not_paired_or_not_closed() -> None:
    alone = [closed("yes1", "yes", None), closed("no1", "no", RED, None), Sample("open", "what?", "red", None, "a red thing")]
    model = of_view(0.4, 0.5, 0.7, 0.9)
    found = examine(
        "attribution", alone, lambda s: ("red" if s.text else "") if s.id == "open" else model(s), counts=[(1, 1, 0, 0)]
    )
    assert "No test sample has both a picture and a text, so that there are no Shapley values." in found["unavailable"]
    assert found["tables"]["gains"]["text"] == {"n": 2, "gain": pytest.approx((0.3 + 1) / 2), "helped": 1.0, "harmed": 0.0}
    assert found["tables"]["gains"]["image"]["gain"] == pytest.approx(0.1)
    client = found["details"]["clients"][0]
    assert client["image"] != client["image"], "the client has paired samples, and no test sample is paired"
    assert (
        "No client holds data of this task, so that there is no gain by client."
        in examine("attribution", alone[:2], model, counts=[])["unavailable"]
    )


# Cross-modal


def named(sample: Sample, image: str, text: str) -> bool:
    """Whether the picture has this colour and the text names this one."""
    return sample.image == {"red": RED, "blue": BLUE}[image] and text in (sample.text or "")


def combines(sample: Sample) -> Sequence[float]:
    return [0.1, 0.9] if named(sample, "red", "red") or named(sample, "blue", "blue") else [0.9, 0.1]


def looks(sample: Sample) -> Sequence[float]:
    return [0.1, 0.9] if sample.image == RED else [0.9, 0.1]


def listens(sample: Sample) -> Sequence[float]:
    return [0.1, 0.9] if "red" in (sample.text or "") else [0.9, 0.1]


MATCHING = [
    closed(f"{image}-{text}", CHOICES[image == text], {"red": RED, "blue": BLUE}[image], f"a {text} thing")
    for image in ("red", "blue")
    for text in ("red", "blue")
]
"""Yes if picture and text have the same colour: neither says anything alone."""


@pytest.mark.parametrize(
    ("model", "same_text", "same_picture"),
    [
        (combines, (1, 1, 0), (1, 1, 0)),
        (looks, (0.5, 0.5, 0), (0, 0.5, 1)),
        (listens, (0, 0.5, 1), (0.5, 0.5, 0)),
        (lambda sample: [0.9, 0.1], (0, 0.5, 1), (0, 0.5, 1)),
    ],
    ids=["combines", "looks", "listens", "always no"],
)
def test_only_a_model_that_combines_gets_pairs_right(model: ToyModel, same_text: Any, same_picture: Any) -> None:
    table = examine("cross-modal", MATCHING, model)["tables"]["contrast"]
    names = ("both_right", "half_right", "same_answer")
    assert table["same_text"] == {"pairs": 2, **dict(zip(names, map(float, same_text), strict=True))}
    assert table["same_picture"] == {"pairs": 2, **dict(zip(names, map(float, same_picture), strict=True))}


AGREEING = [closed("a", "yes"), closed("b", "no", BLUE, "a blue thing"), closed("c", "no", BLUE, "blue")]
"""Picture and text both say the answer."""


@pytest.mark.parametrize(
    ("model", "follows_picture", "alone"),
    [(looks, 1.0, 1), (listens, 0.0, 2), (combines, 2 / 3, 0)],
    ids=["looks", "listens", "combines"],
)
def test_whose_answer_is_given_if_they_contradict(model: ToyModel, follows_picture: float, alone: int) -> None:
    """Of mixed pairs none has one colour, so that `combines` always says no: the picture's own answer where it is blue."""
    found = examine("cross-modal", AGREEING, model)["tables"]["contradiction"]
    shares = {
        "follows_picture": pytest.approx(follows_picture, abs=1e-6),
        "follows_text": pytest.approx(1 - follows_picture, abs=1e-6),
    }
    assert found["all"] == {"n": 3, **shares}
    assert found["each_right_alone"]["n"] == alone, "without the modality that it needs, a model says no"


def either(sample: Sample) -> Sequence[float]:
    """Believes its picture, and its text where there is no picture."""
    return looks(sample) if sample.image is not None else listens(sample)


def test_contradictions_of_what_each_says_alone() -> None:
    found = examine("cross-modal", AGREEING, either)["tables"]["contradiction"]
    assert found["all"] == found["each_right_alone"] == {"n": 3, "follows_picture": 1.0, "follows_text": 0.0}


def test_an_irrelevant_modality() -> None:
    def distracted(sample: Sample) -> Sequence[float]:
        yes = 0.4 + 0.3 * (sample.image is not None) - 0.1 * (sample.image is not None and sample.text is not None)
        return [1 - yes, yes]

    samples = [closed("t1", "yes", None), closed("t2", "no", None), closed("p", "no", RED, None), closed("n", "no", None, None)]
    table = examine("cross-modal", samples, distracted)["tables"]["irrelevant"]
    assert table["picture_beside_text"] == {
        "n": 3,
        "changed": 1.0,
        "total_variation": pytest.approx((0.2 + 0.2 + 0.3) / 3, abs=1e-6),
    }
    assert table["text_beside_picture"] == {"n": 1, "changed": 0.0, "total_variation": pytest.approx(0.1)}
    assert examine("cross-modal", samples, listens)["tables"]["irrelevant"]["picture_beside_text"]["total_variation"] == 0
    opened = Sample("open", "what?", "red", None, "a red thing")
    moved = examine("cross-modal", [opened], lambda sample: "blue" if sample.image else "Red.")["tables"]["irrelevant"]
    assert moved["picture_beside_text"]["changed"] == 1, "a task without pictures gets one of noise"


def pair_ids(samples: Sequence[Sample], same: Callable[[Sample], Any], other: Callable[[Sample], Any]) -> list[tuple[str, str]]:
    return [(a.id, b.id) for a, b in contrast_pairs(samples, same, other, "exact")]


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([closed("a", "yes"), closed("b", "no", BLUE)], [("b", "a")]),
        ([closed("a", "yes"), closed("b", "yes", BLUE)], []),  # the same answer
        ([closed("a", "yes"), closed("b", "no")], []),  # the same picture: a label is wrong
        ([closed("a", "yes"), closed("b", "no", BLUE, "another")], []),
        ([closed("a", "yes"), Sample("b", "is it not?", "no", BLUE, "a red thing in the sun", CHOICES)], []),
        ([closed(i, CHOICES[i > "b"], png((ord(i), 0, 0))) for i in "abcde"], [("c", "a"), ("d", "b")]),
        ([Sample(a, "what?", a, png((len(a), ord(a[0]), 0)), "t") for a in ("Red", "blue", "red.")], [("Red", "blue")]),
        ([Sample(i, "what?", i, png((ord(i), 0, 0)), "t") for i in "abcd"], [("a", "b"), ("c", "d")]),
    ],
)  # fmt: skip
def test_contrast_pairs(samples: list[Sample], expected: list[tuple[str, str]]) -> None:
    assert pair_ids(samples, lambda s: s.text, lambda s: s.image) == expected


def test_what_the_embedded_tasks_offer() -> None:
    memes = list(tasks.build("pocket-memes", {"n": 2, "test": 60, "seed": 1}).load("test"))
    found = examine("cross-modal", [s for s in memes if isinstance(s, Sample)], lambda sample: [0.3, 0.7])
    assert found["tables"]["contrast"]["same_text"]["pairs"] > 10, "every colour is named with yes and with no"
    assert found["tables"]["contrast"]["same_text"]["both_right"] == 0
    assert [text.split(",")[0] for text in found["unavailable"]] == [
        "No two test samples share a question and a picture and differ in text and answer",
        "No test sample is without a picture",
        "No test sample has a picture alone while others have a text",
    ]
    shapes = [s for s in tasks.build("shapes-qa", {"train": 1, "test": 8}).load("test") if isinstance(s, Sample)]
    model: ToyModel = lambda sample: [0.4, 0.6] if sample.choices else "red"  # noqa: E731
    patterns: tuple[Pattern, ...] = ("both", "text")
    found = examine("cross-modal", shapes, model, patterns=patterns)
    assert list(found["tables"]["irrelevant"]) == ["picture_beside_text"]
    assert examine("attribution", shapes, model, patterns=patterns)["tables"]["gains"]["text"]["n"] == 8


def test_the_suite_of_the_documentation(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[1] / "docs" / "suites.md").read_text()
    (code,) = re.findall("```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.setattr(suites, "_discovered", dict(suites._discovered))
    monkeypatch.setattr(suites, "_factories", suites._discovered)
    exec(code, {"__name__": "shouting"})
    check_suite("shouting")
    loud = examine(
        "shouting", [closed("a", "yes")], lambda sample: [0.1, 0.9] if sample.text == "A RED THING IN THE SUN" else [0.9, 0.1]
    )
    assert loud["tables"]["capitals"] == {"both": {"score": 1.0}, "image": {"score": 0.0}, "text": {"score": 1.0}}
