"""Any data set of the Hugging Face hub, or a folder in one of its formats, and a map from its columns to a sample's parts.

It goes through the `datasets` library (`pip install "fedmllm[hub]"`), which runs no code of a data set's author. A folder is
read as the hub would read it (Parquet files, an image folder, …) or as `save_to_disk` left it. Pictures stay where the library
has them, on disk, and are read when they are decoded.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedmllm.data.files import Entry, EntryError, inside, samples_of
from fedmllm.data.samples import LETTERS, Picture, Problem, Sample, Split, Stored, Task
from fedmllm.data.tasks import tasks
from fedmllm.errors import ConfigError, DataError, suggest


@dataclass(frozen=True)
class Columns:
    """Which column holds what; None where the data set has nothing of the kind."""

    answer: str
    question: str | None
    image: str | None
    text: str | None
    choices: str | list[str] | None
    id: str | None
    label: str | None
    source: str | None
    answer_is_index: bool
    ask: str

    def named(self) -> Iterator[tuple[str, str]]:
        """(option, column) of those that are given."""
        for option in ("answer", "question", "image", "text", "choices", "id", "label", "source"):
            if isinstance(column := getattr(self, option), str):
                yield option, column


def _library() -> Any:
    try:
        library = importlib.import_module("datasets")
    except ImportError as error:
        raise ConfigError(
            f"task 'hub': the library datasets cannot be imported ({error}); install it with pip install \"fedmllm[hub]\"."
        ) from None
    library.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of each retry; what comes of them is told once
    return library


def _open(library: Any, dataset: str, subset: str | None, revision: str | None, split: str) -> Any:
    """The rows of one split. Raises DataError with the library's own reason where there are none."""
    folder = Path(dataset)
    try:
        if (folder / "dataset_dict.json").is_file():
            return library.load_from_disk(dataset)[split]
        if (folder / "state.json").is_file():
            raise DataError(f"task 'hub': {dataset!r} is one split alone; save a DatasetDict that has train and test.")
        return library.load_dataset(dataset, subset, split=split, revision=revision)
    except DataError:
        raise
    except Exception as error:  # the library's many errors have no common class, and are all about what was asked for
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"task 'hub': the split {split!r} of {dataset!r} cannot be loaded ({type(error).__name__}: {reason}); check the "
            "name or folder, task.subset, task.train_split and task.test_split, or fetch it first where there is a network."
        ) from None


def _folder(library: Any, dataset: str) -> Path:
    """Where pictures that are paths may lie: in the folder itself, or where the library puts what it fetches."""
    return Path(dataset) if Path(dataset).is_dir() else Path(library.config.HF_CACHE_HOME)


def _bytes_or_path(value: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
        return value["bytes"] if value["bytes"] is not None else value["path"]
    return value


def _picture(entry: Entry, folder: Path, stored: Any) -> Picture | None:
    """`stored` has the same rows, and the column of pictures alone."""
    value, index = _bytes_or_path(entry.values.get("image")), entry.index
    if value is None:
        return None
    if isinstance(value, bytes):
        return Stored(hashlib.sha256(value).hexdigest(), lambda: bytes(_bytes_or_path(*stored[index].values())))
    if not isinstance(value, str):
        raise EntryError(f"the picture is of type {type(value).__name__}, neither bytes nor a path")
    return inside(folder, value, absolute=True)  # the pictures of an image folder come as absolute paths


def _answer(entry: Entry, columns: Columns, choices: tuple[str, ...] | None) -> str:
    answer = entry.text("answer")
    if not columns.answer_is_index:
        return answer
    if choices is None or not answer.isdecimal() or int(answer) >= len(choices):
        raise EntryError(f"the answer {answer!r} is no index of {len(choices or ())} choices")
    return choices[int(answer)]


def _choices(entry: Entry, columns: Columns, classes: tuple[str, ...] | None) -> tuple[str, ...] | None:
    if columns.choices is None:
        return classes
    found = columns.choices if isinstance(columns.choices, list) else entry.values.get("choices")
    if not found:
        return None
    if not (isinstance(found, list) and len(found) > 1 and all(isinstance(c, str) and c for c in found)):
        raise EntryError("the choices are no list of at least two texts")
    if len(set(found)) < len(found):
        raise EntryError("the choices hold the same text twice")
    return tuple(found)


def _reader(rows: Any, columns: Columns, dataset: str, folder: Path, split: Split, lettered: bool) -> Callable[[Entry], Sample]:
    """From an entry to its sample; the class names of the column of answers are choices where there are few."""
    names = tuple(getattr(rows.features[columns.answer], "names", None) or ())
    stored = rows.select_columns([columns.image] if columns.image else [])
    classes = names if 1 < len(names) <= len(LETTERS) else None

    def read(entry: Entry) -> Sample:
        choices = _choices(entry, columns, classes)
        answer = _answer(entry, columns, choices)
        asked = entry.text("question") if columns.question else columns.ask
        if not asked and not (lettered and choices):
            raise EntryError("nothing is asked: set task.question to a column, or task.ask to one question for all")
        return Sample(
            id=entry.text("id") if columns.id else f"{Path(dataset).name}/{split}/{entry.index:06d}",
            question=asked,
            answer=answer,
            image=_picture(entry, folder, stored),
            text=entry.text("text", required=False) or None,
            choices=choices,
            lettered=lettered and choices is not None,
            label=entry.text("label", required=False) or answer,
            source=entry.text("source", required=False),
            where=entry.where,
        )

    return read


def _undecoded(library: Any, rows: Any, columns: Columns, dataset: str) -> Any:
    """The rows with pictures as bytes or paths. Raises ConfigError for a column that is not there."""
    for option, column in columns.named():
        if column not in rows.column_names:
            raise ConfigError(f"task.{option}: {dataset!r} has no column {column!r}; {suggest(column, rows.column_names)}")
        if isinstance(rows.features[column], library.Image):
            rows = rows.cast_column(column, library.Image(decode=False))
    return rows


def _entries(rows: Any, columns: Columns, dataset: str, split: str) -> Iterator[Entry]:
    """Each row under the names of our options, class labels by their names."""
    named = [(option, column, getattr(rows.features[column], "int2str", None)) for option, column in columns.named()]
    for index, row in enumerate(rows):
        values = {}
        for option, column, name_of in named:
            value = row[column]
            if name_of and value is not None:
                value = name_of(value) if value >= 0 else None  # the hub hides the labels of a test split behind −1
            values[option] = value
        yield Entry(f"{dataset}, split {split!r}, row {index}", values, index)


@tasks.register("hub")
def hub(
    *,
    dataset: str,
    answer: str = "answer",
    question: str | None = None,
    image: str | None = None,
    text: str | None = None,
    choices: str | list[str] | None = None,
    id: str | None = None,
    label: str | None = None,
    source: str | None = None,
    ask: str = "",
    answer_is_index: bool = False,
    lettered: bool = True,
    subset: str | None = None,
    revision: str | None = None,
    train_split: str = "train",
    test_split: str = "test",
    metric: Literal["accuracy", "macro-f1", "auc"] = "accuracy",
    positive: str | None = None,
) -> Task:
    """A data set of the Hugging Face hub, or a folder in its format; options name the columns of a sample's parts."""
    if metric == "auc" and positive is None:
        raise ValueError('metric = "auc" needs positive = "…", the answer whose probability is the score')
    columns = Columns(answer, question, image, text, choices, id, label, source, answer_is_index, ask)
    named: dict[Split, str] = {"train": train_split, "test": test_split}

    def load(split: Split) -> Iterator[Sample | Problem]:
        library = _library()
        rows = _undecoded(library, _open(library, dataset, subset, revision, named[split]), columns, dataset)
        read = _reader(rows, columns, dataset, _folder(library, dataset), split, lettered)
        return samples_of(_entries(rows, columns, dataset, named[split]), read)

    return Task("hub", metric, load, positive, splits=("train", "test") if test_split else ("train",))
