"""The user's own data: one JSON object per line,
`{"id", "image"? or "images"?, "text"?, "question"?, "choices"?, "answer", "label"?, "source"?}`.

Image paths are relative to the folder of the file and must stay inside it; `images` is a list of them. A line that cannot be
parsed or lacks a key is a bad sample. Tables (CSV) with these columns and chats (`messages`) are read as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

from fedmllm.data.files import Entry, EntryError, is_file, json_lines, parse_choices, path_inside, samples_of
from fedmllm.data.other_formats import csv_rows, from_chat
from fedmllm.data.samples import Problem, Sample, Split, Task, clean
from fedmllm.data.tasks import check_positive, tasks
from fedmllm.errors import DataError, suggest

KEYS = ("id", "image", "images", "text", "question", "choices", "answer", "label", "source")
OTHER_NAMES = {
    "id": ("qid", "question_id", "image_id", "uid", "index", "key"),
    "answer": ("label", "answers", "output", "target", "response", "class"),
}
"""Required keys, and the names that other formats give them."""


def _is_text_or_number(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool) and value != ""


def _check_values(line: Mapping[str, Any]) -> None:
    """Raises EntryError for a missing key, an unknown key or a wrong type, except in `choices`."""
    for key, others in OTHER_NAMES.items():
        if not _is_text_or_number(line.get(key)):
            other = next((name for name in others if key not in line and _is_text_or_number(line.get(name))), None)
            hint = f"; if {other!r} is meant, rename it" if other else ""
            raise EntryError(f"the key {key!r} is missing or is neither text nor a whole number{hint}")
    if line.get("label") not in (None, "") and not _is_text_or_number(line["label"]):
        raise EntryError("the key 'label' is neither text nor a whole number")
    for key in line:
        if key not in KEYS:
            raise EntryError(f"unknown key {key!r}; {suggest(key, KEYS)}".rstrip("."))
    for key in ("image", "text", "question", "source"):
        if line.get(key) is not None and not isinstance(line[key], str):
            several = "; write a list of pictures as 'images'" if key == "image" and isinstance(line[key], list) else ""
            raise EntryError(f"the key {key!r} must be text{several}")


def _images(line: Mapping[str, Any], picture: Callable[[str], Path]) -> tuple[Path, ...]:
    names = line["images"] if line.get("images") is not None else []
    if not (isinstance(names, list) and all(isinstance(name, str) and name for name in names)):
        raise EntryError("the key 'images' must be a list of paths")
    if line.get("image"):
        if names:
            raise EntryError("a sample has 'image' or 'images', and not both")
        names = [line["image"]]
    return tuple(map(picture, names))


def sample_of(entry: Entry, picture: Callable[[str], Path], lettered: bool) -> Sample:
    """The sample of one line; `picture` has the path for the name of a picture. Raises EntryError."""
    line = from_chat(entry.values, entry.index) if "messages" in entry.values else entry.values
    _check_values(line)
    choices = parse_choices(line["choices"], "the key 'choices'") if line.get("choices") is not None else None
    if not line.get("question") and not (lettered and choices):
        raise EntryError("a sample needs a 'question', or lettered 'choices'")
    return Sample(
        id=str(line["id"]),
        question=line.get("question") or "",
        answer=str(line["answer"]),
        image=_images(line, picture),
        text=line.get("text") or None,
        choices=choices,
        lettered=lettered and choices is not None,
        label=clean(str(line["label"] if line.get("label") is not None else "")) or str(line["answer"]),
        source=line.get("source") or "",
        where=entry.where,
    )


def entries_of(path: Path) -> Iterator[Entry | Problem]:
    """The lines of a file, or the rows of one whose name ends in .csv. Raises DataError."""
    return csv_rows(path) if path.suffix.lower() == ".csv" else json_lines(path)


def read_lines(path: Path, lettered: bool) -> Iterator[Sample | Problem]:
    """The samples of one file. Raises DataError if there is no such file."""
    if not is_file(path):
        raise DataError(f"task.jsonl: {path} is missing or cannot be read; give the path of a JSON-lines or CSV file.")
    picture = lru_cache(1 << 12)(partial(path_inside, path.parent))  # many samples may show one
    return samples_of(entries_of(path), lambda entry: sample_of(entry, picture, lettered))


@tasks.register("jsonl")
def jsonl(
    *,
    train: str,
    test: str,
    metric: Literal["accuracy", "macro-f1", "auc"] = "accuracy",
    positive: str | None = None,
    lettered: bool = True,
) -> Task:
    """Your own data: one JSON object per line with id, image or images, text, question, choices and answer."""
    check_positive(metric, positive)
    files: dict[Split, Path] = {"train": Path(train), "test": Path(test)}
    return Task("jsonl", metric, lambda split: read_lines(files[split], lettered), positive and clean(positive))
