"""One's own data in other formats than one JSON object with our keys per line: tables (CSV) and chats (`messages`)."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedmllm.data.files import Entry, EntryError
from fedmllm.data.samples import Problem
from fedmllm.errors import DataError

SEPARATOR = "|"
"""Between the entries of a list in one cell of a table."""
_LISTS = ("choices", "images")


def csv_rows(path: Path) -> Iterator[Entry | Problem]:
    """The rows of a CSV file whose first line names the keys; an empty cell is a missing key, and lists are separated by "|".

    Raises DataError for a file without such a header, or that cannot be read.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = csv.reader(file, strict=True)
            header = [name.strip() for name in next(table, [])]
            if not all(header) or len(set(header)) < max(2, len(header)):
                raise DataError(
                    f"{path}, line 1: must name at least two columns, each once and separated by commas; it is "
                    f"{','.join(header)[:200]!r}."
                )
            number = table.line_num
            for row in table:
                first, number = number + 1, table.line_num
                where = f"{path}, line {first}"
                if len(row) != len(header) and row:
                    yield Problem(where, f"the line has {len(row)} cells, not {len(header)}", "unreadable entry")
                elif any(row):
                    yield Entry(where, _values(header, row, first), first)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(f"{path}: cannot be read as a table ({reason}); save it as CSV in UTF-8.") from None


def _values(header: list[str], row: list[str], number: int) -> dict[str, Any]:
    values: dict[str, Any] = {"id": str(number)}
    for key, cell in zip(header, row, strict=True):
        if cell:
            values[key] = [part.strip() for part in cell.split(SEPARATOR)] if key in _LISTS else cell
    return values


def from_chat(line: Mapping[str, Any], number: int) -> dict[str, Any]:
    """The keys of a sample for a line with `messages`: a user's turn, with pictures, and the assistant's answer.

    Of several texts of the user, the last one is the question and the others are the text modality. Other keys are kept; the
    id is by default the number of the line. Raises EntryError for another conversation than one question with one answer.
    """
    turns = line["messages"]
    roles = [turn.get("role") if isinstance(turn, dict) else None for turn in turns] if isinstance(turns, list) else []
    if roles != ["user", "assistant"]:
        given = ", ".join(map(str, roles)) or "none"
        raise EntryError(f"'messages' must be one turn of the user and one of the assistant, and they are {given}")
    texts, images = _content(turns[0])
    answers, drawn = _content(turns[1])
    if not texts or len(answers) != 1 or drawn:
        raise EntryError("'messages' must have a text of the user and one text of the assistant")
    sample: dict[str, Any] = {"id": str(number), "question": texts[-1], "answer": answers[0]}
    sample |= {"text": "\n".join(texts[:-1])} if texts[:-1] else {}
    sample |= {"images": images} if images else {}
    if shared := sample.keys() & line.keys() - {"id"}:
        raise EntryError(f"the key {min(shared)!r} is given beside 'messages', which have it already")
    return sample | {key: value for key, value in line.items() if key != "messages"}


def _content(turn: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(texts, paths of pictures) of a turn, whose content is a text or a list of parts."""
    content = turn.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    texts, images = list[str](), list[str]()
    for part in parts if isinstance(parts, list) else [None]:
        kind = part.get("type") if isinstance(part, dict) else None
        value = part.get(kind) if isinstance(part, dict) and kind in ("text", "image") else None
        if not isinstance(value, str) or not value.strip():
            raise EntryError(
                'a part of \'messages\' must be {"type": "text", "text": "…"} or {"type": "image", "image": "path"}'
            )
        (texts if kind == "text" else images).append(value)
    return texts, images
