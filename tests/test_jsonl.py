from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fedmllm.data.images import decode
from fedmllm.data.samples import Loaded, Sample
from fedmllm.data.tasks import tasks
from fedmllm.errors import ConfigError, DataError
from helpers import load_samples, png

GOOD = {"id": "good", "text": "a text", "question": "what?", "answer": "yes"}


def write(folder: Path, *lines: dict[str, Any] | bytes) -> Path:
    path = folder / "data.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines) + b"\n")
    return path


def load(path: Path, on_bad_sample: Any = "error", **options: Any) -> Loaded:
    return load_samples(tasks.build("jsonl", {"train": str(path), "test": str(path), **options}), "train", on_bad_sample)


def only(folder: Path, line: dict[str, Any], **options: Any) -> Sample:
    (sample,) = load(write(folder, line), **options).samples
    return sample


def test_a_full_line_becomes_a_sample(tmp_path: Path) -> None:
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "1.png").write_bytes(png())
    line = {"id": 42953, "image": "img/1.png", "text": "its text", "question": "is it?", "choices": ["no", "yes"]}
    assert only(tmp_path, {**line, "answer": "yes", "label": 1, "source": "site-a"}) == Sample(
        id="42953",
        question="is it?",
        answer="yes",
        image=tmp_path / "img" / "1.png",
        text="its text",
        choices=("no", "yes"),
        lettered=True,
        label="1",
        source="site-a",
        where=f"{tmp_path / 'data.jsonl'}, line 1",
    )


def test_a_short_line_becomes_a_sample(tmp_path: Path) -> None:
    sample = only(tmp_path, {"id": "a", "question": "how many?", "answer": 3, "text": None, "image": "", "label": None})
    assert (sample.answer, sample.label, sample.source) == ("3", "3", "")
    assert (sample.text, sample.image, sample.choices, sample.lettered) == (None, None, None, False)


@pytest.mark.parametrize("label", [0, "0"])
def test_a_label_of_zero_is_a_label(tmp_path: Path, label: Any) -> None:
    assert only(tmp_path, {**GOOD, "label": label}).label == "0"


def test_lettered_choices_need_no_question(tmp_path: Path) -> None:
    line = {"id": "a", "choices": ["no", "yes"], "answer": "yes"}
    assert only(tmp_path, line).lettered
    with pytest.raises(DataError, match="a sample needs a 'question', or lettered 'choices'"):
        only(tmp_path, line, lettered=False)
    assert not only(tmp_path, {**line, "question": "is it?"}, lettered=False).lettered


def test_blank_lines_count_as_lines_but_not_as_samples(tmp_path: Path) -> None:
    (sample,) = load(write(tmp_path, b"", b"  \r", GOOD)).samples
    assert sample.where.endswith("line 3")


def test_a_byte_order_mark_and_other_scripts_are_read(tmp_path: Path) -> None:
    line = json.dumps({**GOOD, "text": "Zürich 東京\u2028🎉"}, ensure_ascii=False)
    (sample,) = load(write(tmp_path, b"\xef\xbb\xbf" + line.encode())).samples
    assert sample.text == "Zürich 東京\u2028🎉"


BAD: list[tuple[str, dict[str, Any] | bytes, str]] = [
    ("truncated", b'{"id": "x", "answer": "y', "the line is not valid JSON (Unterminated string"),
    ("no utf-8", b'{"id": "x", "answer": "\xff"}', "the line is not valid JSON ("),
    ("half a surrogate pair", b'{"id": "x", "answer": "\\ud83d", "question": "?"}', "the line is not valid JSON ("),
    ("nested too deep", b"[" * 200_000, "the line is not valid JSON ("),
    ("no object", b"[1, 2]", "the line is not a JSON object"),
    ("no id", {"question": "?", "answer": "y"}, "the key 'id' is missing"),
    ("empty id", {**GOOD, "id": ""}, ", id '': the key 'id' is missing"),
    ("boolean id", {**GOOD, "id": True}, ", id True: the key 'id' is missing or is neither text nor a whole number"),
    ("no answer", {"id": "x", "question": "?"}, ", id 'x': the key 'answer' is missing"),
    ("boolean answer", {**GOOD, "id": "x", "answer": False}, ", id 'x': the key 'answer' is missing or is neither"),
    ("answer is a list", {**GOOD, "id": "x", "answer": ["y"]}, ", id 'x': the key 'answer' is missing or is neither"),
    ("label is a list", {**GOOD, "id": "x", "label": ["y"]}, ", id 'x': the key 'label' is neither text nor a whole number"),
    ("unknown key", {**GOOD, "id": "x", "zz": 1}, ", id 'x': unknown key 'zz'; choose one of answer, choices, id, "),
    ("misspelt key", {**GOOD, "id": "x", "imagee": ""}, ", id 'x': unknown key 'imagee'; did you mean 'image'?"),
    ("text is a number", {**GOOD, "id": "x", "text": 3}, ", id 'x': the key 'text' must be text"),
    ("no question", {"id": "x", "answer": "y"}, ", id 'x': a sample needs a 'question'"),
    ("one choice", {**GOOD, "id": "x", "choices": ["yes"]}, ", id 'x': the key 'choices' must be a list of at least two"),
    ("the same choice twice", {**GOOD, "id": "x", "choices": ["yes", "yes"]}, ", id 'x': the key 'choices' must not"),
    ("choices that differ in white space", {**GOOD, "id": "x", "choices": [" yes", "yes", "no"]},
     ", id 'x': the key 'choices' must not contain the same text twice, and 'yes' is"),
    ("choices that differ in composition", {**GOOD, "id": "x", "choices": ["caf\u00e9", "cafe\u0301", "yes"]},
     "twice, and 'caf\u00e9' is"),
    ("a choice of white space", {**GOOD, "id": "x", "choices": ["yes", " \u3000"]},
     ", id 'x': the key 'choices' must be a list"),
    ("an answer of white space", {**GOOD, "id": "x", "answer": " \n\u00a0"}, ", id 'x': the answer is empty"),
    ("a key twice", b'{"id": "x", "answer": "yes", "question": "?", "answer": "no"}',
     "line 2: the line has the key 'answer' twice"),
    ("an unknown key twice", b'{"id": "x", "zz": 1, "zz": 1}', "line 2: the line has the key 'zz' twice"),
    ("label for answer", {"id": "x", "question": "?", "label": "y"},
     ", id 'x': the key 'answer' is missing or is neither text nor a whole number; if 'label' is meant, rename it"),
    ("output for answer", {"id": "x", "question": "?", "output": 3}, "whole number; if 'output' is meant, rename it"),
    ("qid for id", {"qid": 7, "question": "?", "answer": "y"}, ", id 7: the key 'id' is missing or is neither text"),
    ("answer no choice", {**GOOD, "id": "x", "choices": ["a", "b"]}, ", id 'x': the answer 'yes' is not among the choices"),
    ("too many choices", {**GOOD, "id": "x", "choices": ["yes", *map(str, range(26))]}, ", id 'x': 27 choices are more than"),
    ("duplicate id", GOOD, ", id 'good': the id 'good' is used twice"),
    ("missing picture", {**GOOD, "id": "x", "image": "no.png"}, ", id 'x': the picture "),
    ("a list as image", {**GOOD, "id": "x", "image": ["a.png"]}, "'image' must be text; write a list of pictures as 'images'"),
    ("images is text", {**GOOD, "id": "x", "images": "a.png"}, ", id 'x': the key 'images' must be a list of paths"),
    ("images is false", {**GOOD, "id": "x", "images": False}, ", id 'x': the key 'images' must be a list of paths"),
    ("an image without a name", {**GOOD, "id": "x", "images": ["a.png", ""]}, "the key 'images' must be a list of paths"),
    ("image and images", {**GOOD, "id": "x", "image": "a.png", "images": ["b.png"]}, "has 'image' or 'images', and not both"),
    ("a missing one of two", {**GOOD, "id": "x", "images": ["data.jsonl", "no.png"]}, ", id 'x': picture 1 of 2: the picture "),
    ("an image outside", {**GOOD, "id": "x", "images": ["a.png", "../b.png"]}, "the path '../b.png' leads out of"),
    ("folder as picture", {**GOOD, "id": "x", "image": "."}, ", id 'x': the picture "),
    ("undecodable picture", {**GOOD, "id": "x", "image": "data.jsonl"}, ", id 'x': the picture "),
]  # fmt: skip


@pytest.mark.parametrize(("line", "what"), [pytest.param(line, what, id=name) for name, line, what in BAD])
def test_a_bad_line_is_one_sentence_that_names_file_line_and_id(
    tmp_path: Path, line: dict[str, Any] | bytes, what: str
) -> None:
    path = write(tmp_path, GOOD, line)
    with pytest.raises(DataError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}, line 2")
    assert what in message
    assert message.endswith('; fix it, or set task.on_bad_sample = "skip" to continue without it.')
    assert "\n" not in message


@pytest.mark.parametrize(("line", "what"), [pytest.param(line, what, id=name) for name, line, what in BAD])
def test_a_bad_line_is_skipped_and_counted(tmp_path: Path, line: dict[str, Any] | bytes, what: str) -> None:
    loaded = load(write(tmp_path, GOOD, line, {**GOOD, "id": "other"}), "skip")
    assert [s.id for s in loaded.samples] == ["good", "other"]
    assert len(loaded.problems) == 1
    assert what in str(loaded.problems[0])


def test_images_are_shown_in_their_order(tmp_path: Path) -> None:
    a, b = tmp_path / "a.png", tmp_path / "b.png"
    a.write_bytes(png())
    b.write_bytes(png((1, 2, 3)))
    assert only(tmp_path, {**GOOD, "images": ["b.png", "a.png", "b.png"]}).pictures == (b, a, b)
    assert only(tmp_path, {**GOOD, "images": ["a.png"]}) == only(tmp_path, {**GOOD, "image": "a.png"})
    for without in ([], None):
        assert only(tmp_path, {**GOOD, "images": without}) == only(tmp_path, GOOD)
        assert only(tmp_path, {**GOOD, "images": without, "image": "a.png"}).image == a
    gif = tmp_path / "moving.gif"
    Image.new("RGB", (8, 8), "red").save(gif, save_all=True, append_images=[Image.new("RGB", (8, 8), "blue")])
    first = only(tmp_path, {**GOOD, "images": ["a.png", "moving.gif"]}).pictures[1]
    assert decode(first).getpixel((0, 0)) == (255, 0, 0), "the first frame"


def test_unusable_pictures_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no\.png is missing;"):
        load(write(tmp_path, {**GOOD, "image": "no.png"}))
    with pytest.raises(DataError, match=r"data\.jsonl cannot be decoded \("):
        load(write(tmp_path, {**GOOD, "image": "data.jsonl"}))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.jsonl", tmp_path):
        with pytest.raises(DataError) as caught:
            load(path, "skip")
        assert (
            str(caught.value) == f"task.jsonl: {path} is missing or cannot be read; give the path of a JSON-lines or CSV file."
        )


@pytest.mark.parametrize(
    ("answer", "choices", "cleaned"),
    [
        (" yes\n", ["no ", "\tyes"], ("yes", ("no", "yes"))),
        ("caf\u00e9", ["cafe\u0301", "bar"], ("café", ("café", "bar"))),
        ("a  b", [" a  b", "a b"], ("a  b", ("a  b", "a b"))),
        ("\u3000是的", ["是的", "不是 "], ("是的", ("是的", "不是"))),
        (" two\nlines ", None, ("two\nlines", None)),
        (3, None, ("3", None)),
    ],
)
def test_one_rule_cleans_answers_choices_and_labels(
    tmp_path: Path, answer: Any, choices: list[str] | None, cleaned: tuple[str, tuple[str, ...] | None]
) -> None:
    sample = only(tmp_path, {**GOOD, "answer": answer, "choices": choices, "label": f" {answer} "})
    assert (sample.answer, sample.choices) == cleaned
    assert sample.label == only(tmp_path, {**GOOD, "answer": answer, "label": "  "}).label == cleaned[0]


OTHER_FORMATS = {
    "an array": (b'[\n  {"id": "a", "answer": "y", "question": "?"},\n  {"id": "b"}\n]', "is a JSON array"),
    "an array on one line": (b'\n [{"id": "a", "answer": "y", "question": "?"}]', "is a JSON array"),
    "one object": (b'{\n  "data": [\n  {"id": "a"}\n]}', "holds an object that takes up several lines"),
    "a table": (b"id,answer,question\n1,yes,what?\n2,no,what?\n", "is no JSON, for its first line is 'id,answer,question'"),
    "tabs": (b"\xef\xbb\xbfid\tanswer\n1\tyes\n", "is no JSON, for its first line is 'id\\tanswer'"),
    "compressed": (b"\x1f\x8b\x08\x00abc", "is no JSON, for its first line is "),
}


@pytest.mark.parametrize("policy", ["error", "skip"])
@pytest.mark.parametrize(("content", "what"), OTHER_FORMATS.values(), ids=OTHER_FORMATS)
def test_a_file_of_another_format_is_one_sentence(tmp_path: Path, content: bytes, what: str, policy: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(DataError) as caught:
        load(path, policy)
    assert str(caught.value).startswith(f"{path}: {what}")
    assert str(caught.value).endswith('; write one object per line, such as {"id": "1", "question": "…", "answer": "…"}.')


def test_skipping_is_not_offered_if_it_would_leave_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, *({"id": i, "question": "?", "label": "y"} for i in range(3)))
    with pytest.raises(DataError) as caught:
        load(path)
    assert str(caught.value).startswith(f"3 bad samples, the first: {path}, line 1, id 0: the key 'answer' is missing")
    assert str(caught.value).endswith(
        "; if 'label' is meant, rename it; fix it, because task 'jsonl' has no usable sample in its train split otherwise."
    )
    with pytest.raises(DataError, match=r"^task 'jsonl' has no usable sample in its train split; the first problem: "):
        load(path, "skip")


def test_an_empty_file_has_no_usable_sample(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no usable sample in its train split"):
        load(write(tmp_path))


def test_auc_needs_the_positive_answer() -> None:
    options = {"train": "a", "test": "b", "metric": "auc"}
    with pytest.raises(ConfigError, match="positive"):
        tasks.build("jsonl", options)
    assert tasks.build("jsonl", {**options, "positive": "hateful"}).positive == "hateful"
