"""JSON without NaN and infinities: they are written as null, and null is read back as NaN where a number is expected."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from typing import Any


def strict(value: Any) -> Any:
    """A copy with null in place of NaN and infinities, which JSON cannot represent."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: strict(entry) for key, entry in value.items()}
    return [strict(entry) for entry in value] if isinstance(value, list | tuple) else value


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
    """The inverse of `strict` for a value that contains only numbers: NaN in place of null."""
    if isinstance(value, dict):
        return {key: _with_nan(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_with_nan(entry) for entry in value]
    return math.nan if value is None else value


def restored(record: dict[str, Any]) -> dict[str, Any]:
    """Turn null back into NaN in the scores and the loss of a result, a client's row or a round; changes `record`."""
    for key in ("metrics", "bootstrap_scores"):
        if isinstance(record.get(key), dict):
            record[key] = _with_nan(record[key])
    if "loss" in record:
        record["loss"] = _with_nan(record["loss"])
    for key in record.keys() & {"per_client", "rounds"}:
        if isinstance(record[key], list):
            record[key] = [restored(row) for row in record[key]]
    return record
