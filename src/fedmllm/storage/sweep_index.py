"""The shape of a sweep's index, checked before anything in it is used: the folder or archive may come from elsewhere."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedmllm.kinds import RunKind
from fedmllm.storage.atomic import usable_as_folder


class _Row(BaseModel):
    model_config = ConfigDict(strict=True)
    axes: dict[str, str]
    seed: int
    kind: RunKind
    id: str
    replicate: int | None = None
    draw: int | None = None


class _Index(BaseModel):
    """What the commands rely on; further keys are ignored."""

    model_config = ConfigDict(strict=True)
    name: str
    axes: list[str]
    cells: list[_Row]
    margin: float | None = Field(None, gt=0, allow_inf_nan=False)


def check_index(index: Any) -> None:
    """Raises ValueError if this is not an index, if a cell has other axes than the sweep, or if the name of the sweep or the id
    of a run, which are joined to paths, is not a plain file name."""
    try:
        checked = _Index.model_validate(index)
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        where = ".".join(map(str, wrong["loc"]))
        raise ValueError(f"{where}: {wrong['msg']}" if where else wrong["msg"]) from None
    for row in checked.cells:
        if list(row.axes) != checked.axes:
            raise ValueError(f"the cell of {row.id[:100]!r} has other axes than the sweep")
    for name in (checked.name, *(row.id for row in checked.cells)):
        try:
            usable_as_folder(name)
        except ValueError:
            raise ValueError(f"{name[:100]!r} cannot be the name of a folder") from None
