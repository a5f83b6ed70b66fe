"""JSON without NaN and infinities: they are written as null, and null is read back as NaN where a number is expected."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

_LARGEST = 1e15


def strict(value: Any) -> Any:
    """A copy with null in place of NaN and infinities, which JSON cannot represent."""
    return _mapped(value, lambda leaf: None if isinstance(leaf, float) and not math.isfinite(leaf) else leaf)


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """A copy with `change(leaf)` in place of everything that is neither an object nor a list."""
    if isinstance(value, Mapping):
        return {key: _mapped(entry, change) for key, entry in value.items()}
    return [_mapped(entry, change) for entry in value] if isinstance(value, list | tuple) else change(value)


def dump(value: Any) -> bytes:
    """The value as indented JSON with a final newline."""
    # Written in pieces: `json.dumps` would hold the pieces of a hundred thousand rows in memory until it joins them.
    content = io.BytesIO()
    text = io.TextIOWrapper(content, encoding="utf-8", newline="\n")
    try:
        json.dump(value, text, indent=2, allow_nan=False)
    except ValueError:  # NaN is rare, and `strict` copies everything, so it is called only when needed
        return dump(strict(value))
    text.write("\n")
    text.flush()
    return content.getvalue()


def json_line(value: Mapping[str, Any]) -> str:
    """The value as one line of JSON."""
    try:
        return json.dumps(value, allow_nan=False) + "\n"
    except ValueError:
        return json.dumps(strict(value), allow_nan=False) + "\n"


def _with_nan(value: Any) -> Any:
    """The inverse of `strict` for a value that contains only numbers: NaN in place of null. Raises ValueError for anything
    else, and for numbers with which statistics would overflow."""

    def number(leaf: Any) -> Any:
        if leaf is None:
            return math.nan
        if type(leaf) not in (int, float) or abs(leaf) > _LARGEST:
            raise ValueError(f"{str(leaf)[:40]!r} is in the place of a score")
        return leaf

    return _mapped(value, number)


def parse_object(text: str) -> dict[str, Any]:
    """The inverse of `dump` and `json_line` for an object. Raises ValueError if the text is anything else."""
    try:
        content = json.loads(text)
        if isinstance(content, dict):
            return restored(content)
    except (AttributeError, RecursionError) as error:  # a list of rows that are no objects, or deep nesting
        raise ValueError(f"{type(error).__name__}: {error}") from None
    raise ValueError(f"it holds a {type(content).__name__} instead of an object")


def restored(record: dict[str, Any]) -> dict[str, Any]:
    """Turn null back into NaN in the scores and the loss of a result, a client's row or a round; changes `record`."""
    for key in ("metrics", "bootstrap_scores"):
        if isinstance(record.get(key), dict):
            record[key] = _with_nan(record[key])
    if record.get("loss", 0.0) is None:
        record["loss"] = math.nan
    for key in record.keys() & {"per_client", "rounds"}:
        if isinstance(record[key], list):
            record[key] = [restored(row) for row in record[key]]
    return record
