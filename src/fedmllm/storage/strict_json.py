"""JSON without NaN and infinities: null on disk, NaN again when read."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from typing import Any


def strict(value: Any) -> Any:
    """A copy with null for every float that JSON has no sign for: NaN and the infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: strict(one) for key, one in value.items()}
    return [strict(one) for one in value] if isinstance(value, list | tuple) else value


def dump(value: Any) -> bytes:
    # Piece by piece: `json.dumps` keeps all pieces of a hundred thousand rows until it joins them.
    content = io.BytesIO()
    text = io.TextIOWrapper(content, encoding="utf-8", newline="\n")
    try:
        json.dump(value, text, indent=2, allow_nan=False)
    except ValueError:  # a NaN is rare, and looking for one copies everything
        return dump(strict(value))
    text.write("\n")
    text.flush()
    return content.getvalue()


def json_line(value: Mapping[str, Any]) -> str:
    try:
        return json.dumps(value, allow_nan=False) + "\n"
    except ValueError:
        return json.dumps(strict(value), allow_nan=False) + "\n"


def _with_nan(value: Any) -> Any:
    """The inverse of `strict` where all values are numbers: NaN for null."""
    if isinstance(value, dict):
        return {key: _with_nan(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_with_nan(one) for one in value]
    return math.nan if value is None else value


def restored(record: dict[str, Any]) -> dict[str, Any]:
    """A result, a client's row or a round as it was written: null is NaN among its metrics and in its loss."""
    if isinstance(record.get("metrics"), dict):
        record["metrics"] = _with_nan(record["metrics"])
    if "loss" in record:
        record["loss"] = _with_nan(record["loss"])
    for key in record.keys() & {"per_client", "rounds"}:
        if isinstance(record[key], list):
            record[key] = [restored(row) for row in record[key]]
    return record
