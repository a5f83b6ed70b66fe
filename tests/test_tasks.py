from __future__ import annotations

import re
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import easy_vqa
import pytest

from fedmllm.data.samples import Problem, Sample, Split
from fedmllm.data.tasks import tasks
from fedmllm.errors import ConfigError, DataError
from helpers import load_samples

# Two phrases, "a red circle" and "a blue square", of a shapes-qa text.
OBJECT = re.compile(r"[Aa] (\w+) (circle|rectangle|triangle)\b")


def samples(name: str, split: Split, **options: Any) -> list[Sample]:
    return [entry for entry in tasks.build(name, options).load(split) if isinstance(entry, Sample)]


def answer_to(text: str, question: str) -> str:
    """The answer to a shapes-qa question, derived from its text."""
    objects = OBJECT.findall(text)
    if match := re.fullmatch(r"what color is the (\w+)\?", question):
        (answer,) = [color for color, shape in objects if shape == match[1]]
        return str(answer)
    if match := re.fullmatch(r"what is the (\w+) shape\?", question):
        (answer,) = [shape for color, shape in objects if color == match[1]]
        return str(answer)
    match = re.fullmatch(r"is there (not )?a (\w+) (\w+)\?", question)
    assert match
    exists = any(color == match[2] and match[3] in (shape, "shape") for color, shape in objects)
    return "yes" if exists != bool(match[1]) else "no"


@pytest.mark.parametrize(("split", "questions", "pictures"), [("train", 38575, 4000), ("test", 9673, 1000)])
def test_easy_vqa_is_complete(split: Split, questions: int, pictures: int) -> None:
    loaded = samples("easy-vqa", split)
    assert len({s.id for s in loaded}) == len(loaded) == questions
    paths = {s.image for s in loaded}
    assert len(paths) == pictures
    assert all(isinstance(path, Path) and path.is_file() for path in paths)
    assert {s.answer for s in loaded} == set(easy_vqa.get_answers())
    assert all(s.choices == (("yes", "no") if s.answer in ("yes", "no") else None) for s in loaded)
    assert all(s.text is None and not s.lettered and s.label == s.answer for s in loaded)


def test_easy_vqa_keeps_question_answer_and_picture_together() -> None:
    questions, answers, pictures = easy_vqa.get_train_questions()
    loaded = samples("easy-vqa", "train")
    for index in (0, 1, 20000, 38574):
        assert (loaded[index].question, loaded[index].answer) == (questions[index], answers[index])
        assert loaded[index].image == Path(easy_vqa.get_train_image_paths()[pictures[index]])


def test_a_picture_that_the_package_lacks_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(easy_vqa, "get_test_image_paths", dict)
    monkeypatch.setattr(easy_vqa, "get_test_questions", lambda: (["what?"], ["red"], [7]))
    with pytest.raises(DataError, match=r"^easy-vqa test question 0, id 'easy-vqa/test/00000': the picture 7\.png is missing"):
        load_samples(tasks.build("easy-vqa", {}), "test", "error")


@pytest.mark.parametrize("split", ["train", "test"])
def test_shapes_qa_answers_are_true_of_its_texts(split: Split) -> None:
    for s in samples("shapes-qa", split, train=600, test=600):
        assert s.text is not None
        objects = OBJECT.findall(s.text)
        assert len({color for color, _ in objects}) == len({shape for _, shape in objects}) == 2
        assert s.answer == answer_to(s.text, s.question), (s.text, s.question)


def test_shapes_qa_has_the_answers_of_easy_vqa() -> None:
    loaded = samples("shapes-qa", "train", train=2000)
    assert {s.answer for s in loaded} == set(easy_vqa.get_answers())
    assert all(s.choices == (("yes", "no") if s.answer in ("yes", "no") else None) for s in loaded)
    assert all(s.modalities == {"text"} for s in loaded)


def test_shapes_qa_is_half_closed_and_its_closed_half_is_balanced() -> None:
    counts = Counter(s.answer if s.choices else "open" for s in samples("shapes-qa", "train", train=4000))
    assert counts["open"] / 4000 == pytest.approx(0.5, abs=0.03)
    assert counts["yes"] / (counts["yes"] + counts["no"]) == pytest.approx(0.5, abs=0.04)


def test_shapes_qa_is_a_function_of_its_seed() -> None:
    assert samples("shapes-qa", "train", train=20) == samples("shapes-qa", "train", train=50)[:20]
    assert samples("shapes-qa", "train", train=20) != samples("shapes-qa", "train", train=20, seed=1)
    both = [[(s.text, s.question) for s in samples("shapes-qa", split, train=20, test=20)] for split in ("train", "test")]
    assert both[0] != both[1]
    assert [s.id for s in islice(samples("shapes-qa", "test"), 2)] == ["shapes-qa/test/00000", "shapes-qa/test/00001"]


@pytest.mark.parametrize("option", ["train", "test"])
def test_shapes_qa_needs_samples(option: str) -> None:
    with pytest.raises(ConfigError, match=rf"^task: {option} = 0 must be at least 1"):
        tasks.build("shapes-qa", {option: 0})


@pytest.mark.parametrize("name", ["easy-vqa", "shapes-qa"])
def test_the_included_tasks_have_no_bad_sample(name: str) -> None:
    loaded = load_samples(tasks.build(name, {}), "test", "error")
    assert loaded.samples == sorted(loaded.samples, key=lambda s: s.id)
    assert not any(isinstance(entry, Problem) for entry in tasks.build(name, {}).load("train"))
