"""What the tables of the experiment file are made of: strict frozen models, and numbers with limits."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from fedmllm.storage.atomic import usable_as_folder

_Number = TypeVar("_Number", int, float)


def at_most(limit: int, why: str) -> AfterValidator:
    """Refuse numbers above `limit`: after a slip of the pen such as `epochs = 1000000000`, a run would only seem to hang."""

    def check(value: _Number) -> _Number:
        if value > limit:
            raise ValueError(f"must be at most {limit}, {why}")
        return value

    return AfterValidator(check)


Positive = Annotated[int, Field(ge=1)]
most_rounds = at_most(1_000_000, "which take more than a week at a second each")
Seed = Annotated[int, Field(ge=0), at_most(2**63 - 1, "the largest integer of TOML")]
Epochs = Annotated[int, Field(ge=1), at_most(1000, "because a client repeats its data this often in every round")]
BatchSize = Annotated[int, Field(ge=1), at_most(65_536, "because a batch is in memory at once")]
PositiveNumbers = Annotated[
    tuple[Annotated[float, Field(gt=0), at_most(10**12, "which no device reaches")], ...], Field(strict=False)
]
FolderName = Annotated[str, AfterValidator(usable_as_folder)]


class Table(BaseModel):
    """A table with a fixed set of keys. The text under a key is its description in docs/experiments.md and in the JSON
    schema."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Named(BaseModel):
    """A table {name, …} that names a part: keys that are not fields of the table are options of that part."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, use_attribute_docstrings=True)
    name: str
    """The part; all other keys that are not listed here are its options."""

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})
