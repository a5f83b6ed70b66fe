"""The shapes of a sweep's index and of a run's result, checked before anything in them is used: the folder or archive may come
from elsewhere. The models have what the commands rely on; further keys are ignored."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedmllm.kinds import RunKind
from fedmllm.storage.atomic import usable_as_folder

Model = TypeVar("Model", bound=BaseModel)


class _Shape(BaseModel):
    model_config = ConfigDict(strict=True)


class _Row(_Shape):
    axes: dict[str, str]
    seed: int
    kind: RunKind
    id: str
    replicate: int | None = None
    draw: int | None = None


class _Index(_Shape):
    name: str
    axes: list[str]
    cells: list[_Row]
    margin: float | None = Field(None, gt=0, allow_inf_nan=False)


_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Number = Annotated[float, Field(ge=-1e15, le=1e15)]
"""So that no sum of them overflows."""
_Interval = Annotated[list[float], Field(min_length=2, max_length=2)]
_Metrics = dict[str, dict[str, float | _Interval]]


class _Transfer(_Shape):
    primary_metric: str
    metrics: _Metrics


class _Shares(_Shape):
    both: _Number
    image: _Number
    text: _Number
    none: _Number


class _Modalities(_Shape):
    drawn: _Shares
    expected: _Shares | None


class _Kept(_Shape):
    group: str
    attacker: bool
    clients: _Count
    updates: _Count
    kept: _Number | None
    below_half: _Number | None


class _Spent(_Shape):
    epsilon: float | None


class _Asks(_Shape):
    question: str | None
    choices: list[str] | None
    lettered: bool


class _Result(_Shape):
    """No key is required, because earlier versions wrote fewer."""

    name: str = ""
    kind: RunKind = "federated"
    primary_metric: str = ""
    positive: str | None = None
    asks: _Asks | None = None
    algorithm: str = ""
    regularization: str = ""
    compression: str = ""
    secure: str = ""
    robust: str = ""
    privacy: str = ""
    attack: str = ""
    metrics: _Metrics = {}
    bootstrap_scores: dict[str, list[float]] = {}
    test_digest: str = ""
    transfer: dict[str, _Transfer] = {}
    per_client: list[dict[str, Any]] = []
    clients: dict[str, _Number | None] = {}
    modalities: _Modalities | None = None
    kept: list[_Kept] = []
    suites: dict[str, Any] = {}
    privacy_spent: _Spent | None = None
    rounds: _Count = 0
    keep: str = ""
    kept_rounds: list[_Count] = []
    stopped_early: bool = False
    bytes_up: dict[str, _Count] = {}
    bytes_down: dict[str, _Count] = {}
    bytes_by_part: dict[str, dict[str, _Count]] = {}
    seconds: dict[str, _Number] = {}
    simulated_seconds: _Number | None = None


def check_result(result: Any) -> None:
    """Raises ValueError if a value of `result.json`, with NaN in place of null, is of another type than a run writes."""
    _checked(_Result, result)


def _checked(shape: type[Model], value: Any) -> Model:
    try:
        return shape.model_validate(value)
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        where = ".".join(map(str, wrong["loc"]))
        raise ValueError(f"{where}: {wrong['msg']}" if where else wrong["msg"]) from None


def check_index(index: Any) -> None:
    """Raises ValueError if this is not an index, if a cell has other axes than the sweep, or if the name of the sweep or the id
    of a run, which are joined to paths, is not a plain file name."""
    checked = _checked(_Index, index)
    for row in checked.cells:
        if list(row.axes) != checked.axes:
            raise ValueError(f"the cell of {row.id[:100]!r} has other axes than the sweep")
    for name in (checked.name, *(row.id for row in checked.cells)):
        try:
            usable_as_folder(name)
        except ValueError:
            raise ValueError(f"{name[:100]!r} cannot be the name of a folder") from None
