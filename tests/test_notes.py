"""What `check` and `run` say about data that can be used and may be a mistake."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from commands import call, run
from fedmllm.data.images import Picture
from fedmllm.data.notes import near_equal, notes, shared_rows
from fedmllm.data.samples import Loaded, Sample
from fedmllm.data.summary import summarise, summary_lines
from helpers import png, sample

Write = Callable[..., Path]
RED, BLUE = png((200, 0, 0)), png((0, 0, 200))


@pytest.mark.parametrize(
    ("texts", "groups"),
    [
        (["yes", "Yes", "no"], [["Yes", "yes"]]),
        (["a  b", "a b", "A B", "ab"], [["A B", "a  b", "a b", "ab"]]),
        (["Straße", "STRASSE", "strasse"], [["STRASSE", "Straße", "strasse"]]),
        (["1", "-1", "1.5", "15", "C", "C++"], []),
        (["yes", "yes"], []),
        ([], []),
    ],
)
def test_texts_that_differ_only_in_case_or_white_space(texts: list[str], groups: list[list[str]]) -> None:
    assert near_equal(texts) == groups


def shown(image: Picture | None = RED, **fields: Any) -> Sample:
    return replace(sample("s", "text"), image=image, **fields)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    for name, content in {"red": RED, "copy": RED, "blue": BLUE, "other": RED[:-1] + b"x"}.items():
        (tmp_path / name).write_bytes(content)
    return {path.name: path for path in tmp_path.iterdir()}


def test_rows_are_shared_if_picture_text_question_and_answer_are(files: dict[str, Path]) -> None:
    train = [shown(), shown(None), shown(files["red"], text="on disk"), shown(BLUE, answer="no")]
    shared = [shown(), shown(id="another", label="l", source="s", where="w"), shown(None), shown(BLUE, answer="no")]
    shared += [shown(files[name], text="on disk") for name in ("red", "copy")]
    other = [shown(BLUE), shown(text="other"), shown(question="other"), shown(answer="no"), shown(None, text="on disk")]
    other += [shown(files[name], text="on disk") for name in ("blue", "other")]
    cases = [(row, 1) for row in shared] + [(row, 0) for row in other]
    for row, expected in cases:
        assert shared_rows(train, [row]) == expected, row
    assert shared_rows(train, [row for row, _ in cases]) == sum(expected for _, expected in cases)
    assert shared_rows([], [shown()]) == shared_rows([shown()], []) == 0


def test_pictures_are_read_only_where_words_and_sizes_agree(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Picture] = []
    monkeypatch.setattr("fedmllm.data.notes.image_key", lambda image: read.append(image) or str(image))
    files["other"].write_bytes(RED + b"longer")
    rows = [shown(files["red"], text=text) for text in ("a", "b", "c")]
    assert shared_rows(rows, [shown(files["red"], text="other"), shown(files["other"], text="a")]) == 0
    assert read == []
    assert shared_rows(rows, rows[:2]) == 2
    assert read == [files["red"]], "once, however many samples show it"


def test_sentences() -> None:
    train = [shown(answer="yes", label="l"), shown(answer="Yes", label="L"), shown(None, answer="no", label="m")]
    assert list(notes(train, train[2:])) == [
        "answers that differ only in case or white space are different answers: 'Yes'/'yes'",
        "labels that differ only in case or white space are different labels: 'L'/'l'",
        "1 of 1 test samples are also training samples: the same picture, text, question and answer, whatever their ids; "
        "their score shows memory",
    ]
    many = [shown(answer=f"{letter}{i}") for i in range(5) for letter in "xX"]
    (sentence,) = notes([replace(s, label=s.answer) for s in many], [])
    assert sentence.endswith("'X0'/'x0', 'X1'/'x1', 'X2'/'x2' and 2 more")
    assert list(notes([shown(answer="a", label="a")], [shown(answer="b", label="b")])) == []


def test_the_share_of_the_most_frequent_answer_is_shown() -> None:
    answers = ["yes"] * 5 + ["no"] * 2 + ["maybe"]
    split = Loaded([sample(str(i), "text", answer=answer) for i, answer in enumerate(answers)], stretched=2)
    summary = summarise([("train", split), ("test", Loaded([])), ("train", Loaded([sample("x", answer="no")] * 2))])
    assert summary["train"]["majority"] == {"answer": "yes", "share": 0.5}
    assert summary["test"]["majority"] == {"answer": "", "share": 0.0}
    assert summary["train"]["stretched"] == 2
    lines = list(summary_lines(summary))
    assert "  most frequent answer: 'yes', that of 50.0 % of the samples" in lines
    assert "  pictures of 16-bit grey, each stretched by its own range: 2" in lines
    assert sum("most frequent" in line for line in lines) == 1


# Through the command line


@pytest.fixture
def file(write_experiment: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_experiment(rounds=1)


def sets(*words: str) -> list[str]:
    return [part for word in words for part in ("--set", word)]


def test_a_test_file_that_is_the_train_file_is_said(file: Path, dataset: Path) -> None:
    same = sets(f"task.test={dataset / 'train.jsonl'}")
    sentence = "30 of 30 test samples are also training samples"
    for command in (["check"], ["baseline", "zero-shot"]):
        done = call(*command, file, *same)
        assert done.exit_code == 0, done.output
        assert f"note: {sentence}" in done.stderr
    assert any(note.startswith(sentence) for note in run("check", file, *same)["notes"])


def changed(dataset: Path, **values: object) -> list[str]:
    """The settings for the data set with these values in every line."""
    folder = Path("changed").absolute()
    shutil.copytree(dataset, folder)
    for split in ("train", "test"):
        lines = [json.loads(line) | values for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return sets(f"task.train={folder}/train.jsonl", f"task.test={folder}/test.jsonl")


@pytest.mark.parametrize("source", [None, "", " "])
def test_a_partition_by_source_needs_sources(file: Path, dataset: Path, source: str | None) -> None:
    words = [*changed(dataset, source=source), *sets("partition.name=by-source")]
    for command in ("check", "run", "partition"):
        refused = call(command, file, *words)
        assert refused.exit_code == 2
        assert "error: partition.name = 'by-source' keeps the samples of one source together, and no " in refused.stderr
    assert call("partition", file, *sets("partition.name=by-source")).exit_code == 0


@pytest.mark.parametrize(("modality", "other"), [("text", "image"), ("image", "text")])
def test_a_task_of_one_modality_does_not_suit_clients_of_the_other(
    file: Path, dataset: Path, modality: str, other: str
) -> None:
    values = {"image": None, "text": "a red thing"} if modality == "text" else {"image": "red.png", "text": None}
    words = [*changed(dataset, **values), *sets("partition.name=iid", 'eval.patterns=["both"]')]
    refused = call("partition", file, *words, *sets("scenario.name=cross"))
    assert refused.exit_code == 2
    assert f"error: under this scenario, 2 of 4 clients have only {other} (client " in refused.stderr
    assert f"and the samples have only {modality}; " in refused.stderr
    count = 4 if modality == "image" else 0
    for fine in (["scenario.name=aligned"], ["scenario.name=cross", f"scenario.image_clients={count}"]):
        assert call("partition", file, *words, *sets(*fine)).exit_code == 0


def test_a_cache_that_cannot_be_written_is_named_by_check(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("a-file").write_text("")
    monkeypatch.setenv("FEDMLLM_CACHE", "a-file/cache")
    for command in ("check", "run"):
        refused = call(command, file)
        assert refused.exit_code == 2, refused.output
        assert "error: the cache of vision features cannot be written to a-file/cache/features (" in refused.stderr
        assert "FEDMLLM_CACHE to a folder" in refused.stderr
        assert refused.stderr.endswith("or set model.cache_features = false.\n")
    assert not Path("runs").exists()
    assert call("check", file, *sets("model.cache_features=false")).exit_code == 0
