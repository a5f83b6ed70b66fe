"""Any data set of the Hugging Face hub, or a folder in one of its formats, with options that map its columns to samples.

Data sets are loaded with the `datasets` library (`pip install "fedmllm[hub]"`), which does not run code of a data set's
author. A folder can have any format that the hub reads (Parquet files, an image folder, …) or be written by `save_to_disk`.
Images stay in the library's files and are read when they are decoded.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fedmllm.data.files import Entry, EntryError, is_folder, parse_choices, path_inside, samples_of
from fedmllm.data.images import Picture, StoredPicture
from fedmllm.data.samples import LETTERS, Problem, Sample, Split, Task, clean
from fedmllm.data.tasks import check_positive, tasks
from fedmllm.errors import ConfigError, DataError, suggest


@dataclass(frozen=True)
class Columns:
    """The column for each part of a sample; None if the data set has none."""

    answer: str
    question: str | None
    pictures: dict[str, str]
    """The name "image", or one "images.NAME" for each column of several, and the column."""
    text: str | None
    choices: str | list[str] | None
    id: str | None
    label: str | None
    source: str | None
    answer_is_index: bool
    ask: str

    def named(self) -> Iterator[tuple[str, str]]:
        """(option, column) of each option that names a column."""
        for option in ("answer", "question", "text", "choices", "id", "label", "source"):
            if isinstance(column := getattr(self, option), str):
                yield option, column
        yield from self.pictures.items()


def _library() -> Any:
    try:
        library = importlib.import_module("datasets")
    except ImportError as error:
        raise ConfigError(
            f"task 'hub': the library datasets cannot be imported ({error}); install it with pip install \"fedmllm[hub]\"."
        ) from None
    library.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs every retry; a failure is reported once, below
    return library


def _open(library: Any, dataset: str, subset: str | None, revision: str | None, split: str) -> Any:
    """The rows of one split. Raises DataError with the library's own reason if they cannot be loaded."""
    folder = Path(dataset)
    try:
        if (folder / "dataset_dict.json").is_file():
            return library.load_from_disk(dataset)[split]
        if (folder / "state.json").is_file():
            raise DataError(f"task 'hub': {dataset!r} is a single split; save a DatasetDict with the splits train and test.")
        return library.load_dataset(dataset, subset, split=split, revision=revision)
    except DataError:
        raise
    except Exception as error:  # the library's many errors have no common class, and all concern the requested data
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"task 'hub': the split {split!r} of {dataset!r} cannot be loaded ({type(error).__name__}: {reason}); check the "
            "name or folder, task.subset, task.train_split and task.test_split, or download it first where there is a network."
        ) from None


def _image_folder(library: Any, dataset: str) -> Path:
    """The folder that images given by path must be in: the data set's own folder, or the library's download cache."""
    return Path(dataset) if is_folder(Path(dataset)) else Path(library.config.HF_CACHE_HOME)


def _bytes_or_path(value: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
        return value["bytes"] if value["bytes"] is not None else value["path"]
    return value


def _cells(row: Mapping[str, Any], columns: Iterable[str]) -> list[Any]:
    """The bytes or paths of the pictures in these columns, each of which has one picture, a list of them, or none."""
    cells = [row[column] if isinstance(row[column], list) else [row[column]] for column in columns]
    return [_bytes_or_path(value) for cell in cells for value in cell if value is not None]


def _picture(value: Any, folder: Path, read: Callable[[], bytes]) -> Picture:
    """The picture of a cell; `read` reads the bytes again later."""
    if isinstance(value, bytes):
        return StoredPicture(hashlib.sha256(value).hexdigest(), read)
    if not isinstance(value, str):
        raise EntryError(f"the picture is of type {type(value).__name__}, neither bytes nor a path")
    return path_inside(folder, value, absolute=True)  # the library gives absolute paths for the images of an image folder


def _images(entry: Entry, columns: Columns, folder: Path, stored: Any) -> tuple[Picture, ...]:
    """The pictures of an entry. `stored` has the same rows with the columns of pictures only."""
    index = entry.index  # a function that refers to the entry would keep all its bytes

    def read(number: int) -> bytes:
        return bytes(_cells(stored[index], columns.pictures.values())[number])

    cells = _cells(entry.values, columns.pictures)
    return tuple(_picture(value, folder, partial(read, number)) for number, value in enumerate(cells))


def _answer(entry: Entry, columns: Columns, choices: tuple[str, ...] | None) -> str:
    answer = entry.text("answer")
    if not columns.answer_is_index:
        return answer
    if choices is None or not answer.isdecimal() or int(answer) >= len(choices):
        raise EntryError(f"the answer {answer!r} is not an index into {len(choices or ())} choices")
    return choices[int(answer)]


def _choices(entry: Entry, columns: Columns, classes: tuple[str, ...] | None) -> tuple[str, ...] | None:
    if columns.choices is None:
        return classes
    choices = columns.choices if isinstance(columns.choices, list) else entry.values.get("choices")
    return parse_choices(choices, "the choices") if choices else None


def _name(dataset: str, subset: str | None) -> str:
    """What the ids of samples begin with: owner and name of a data set of the hub, or the folder's own name, and the subset."""
    return "/".join(filter(None, (Path(dataset).absolute().name if is_folder(Path(dataset)) else dataset, subset)))


def _reader(rows: Any, columns: Columns, name: str, folder: Path, split: Split, lettered: bool) -> Callable[[Entry], Sample]:
    """A function from an entry to its sample. If the answers are class labels, at most 26 class names become the choices."""
    names = tuple(getattr(rows.features[columns.answer], "names", None) or ())
    stored = rows.select_columns(list(columns.pictures.values()))
    classes = names if 1 < len(names) <= len(LETTERS) else None

    def read(entry: Entry) -> Sample:
        choices = _choices(entry, columns, classes)
        answer = _answer(entry, columns, choices)
        question = entry.text("question") if columns.question else columns.ask
        if not question and not (lettered and choices):
            raise EntryError("there is no question: set task.question to a column, or task.ask to one question for all rows")
        return Sample(
            id=entry.text("id") if columns.id else f"{name}/{split}/{entry.index:06d}",
            question=question,
            answer=answer,
            image=_images(entry, columns, folder, stored),
            text=entry.text("text", required=False) or None,
            choices=choices,
            lettered=lettered and choices is not None,
            label=entry.text("label", required=False) or answer,
            source=entry.text("source", required=False),
            where=entry.where,
        )

    return read


def _undecoded(library: Any, rows: Any, columns: Columns, dataset: str) -> Any:
    """The rows with images as bytes or paths. Raises ConfigError for a column that does not exist."""
    for option, column in columns.named():
        if column not in rows.column_names:
            raise ConfigError(
                f"task.{option.partition('.')[0]}: {dataset!r} has no column {column!r}; {suggest(column, rows.column_names)}"
            )
        feature, undecoded = rows.features[column], library.Image(decode=False)
        if isinstance(feature, library.Image):
            rows = rows.cast_column(column, undecoded)
        elif isinstance(getattr(feature, "feature", None), library.Image):
            rows = rows.cast_column(column, replace(feature, feature=undecoded))
    return rows


def _entries(rows: Any, columns: Columns, dataset: str, split: str) -> Iterator[Entry]:
    """The rows with option names as keys and the names of class labels as values."""
    named = [(option, column, getattr(rows.features[column], "int2str", None)) for option, column in columns.named()]
    for index, row in enumerate(rows):
        values = {}
        for option, column, name_of in named:
            value = row[column]
            if name_of and value is not None:
                value = name_of(value) if value >= 0 else None  # on the hub, −1 marks the hidden labels of a test split
            values[option] = value
        yield Entry(f"{dataset}, split {split!r}, row {index}", values, index)


@tasks.register("hub")
def hub(
    *,
    dataset: str,
    answer: str = "answer",
    question: str | None = None,
    image: str | None = None,
    images: str | list[str] | None = None,
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
    """A data set of the Hugging Face hub, or a folder in one of its formats; options name the columns to use."""
    check_positive(metric, positive)
    if image and images:
        raise ValueError("image and images both name columns of pictures; set one of them")
    several = [images] if isinstance(images, str) else images or []
    pictures = {"image": image} if image else {f"images.{column}": column for column in several}
    columns = Columns(answer, question, pictures, text, choices, id, label, source, answer_is_index, ask)
    named: dict[Split, str] = {"train": train_split, "test": test_split}

    def load(split: Split) -> Iterator[Sample | Problem]:
        library = _library()
        rows = _undecoded(library, _open(library, dataset, subset, revision, named[split]), columns, dataset)
        read = _reader(rows, columns, _name(dataset, subset), _image_folder(library, dataset), split, lettered)
        return samples_of(_entries(rows, columns, dataset, named[split]), read)

    return Task("hub", metric, load, positive and clean(positive), splits=("train", "test") if test_split else ("train",))
