"""The file of hypotheses: what is claimed of a sweep's cells, written down before its runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, ValidationError

from fedmllm import config as files
from fedmllm.config import FolderName, Table
from fedmllm.errors import ConfigError
from fedmllm.registry import explain
from fedmllm.report.contrasts import Contrast

Text = Annotated[str, Field(min_length=1)]
Cells = Annotated[tuple[Text, ...], Field(strict=False, min_length=1)]
Place = Mapping[str, str]
"""The cell of each axis but that whose cells are compared."""


def _equal(places: Mapping[str, Place]) -> dict[str, float]:
    return dict.fromkeys(places, 1 / len(places))


def _mean(cells: Cells) -> str:
    """How a label names the mean of cells."""
    return cells[0] if len(cells) == 1 else f"mean({', '.join(cells)})"


class Above(Table):
    """The mean of the cells `higher` of an axis is above that of the cells `lower`, on average over the places."""

    axis: Text
    higher: Cells
    lower: Cells

    @property
    def label(self) -> str:
        return f"{_mean(self.higher)} − {_mean(self.lower)}"

    @property
    def cells(self) -> dict[str, float]:
        """The weight of each cell of the axis."""
        weights = [dict.fromkeys(side, sign / len(side)) for side, sign in ((self.higher, 1), (self.lower, -1))]
        return weights[0] | weights[1]

    def contrasts(self, places: Mapping[str, Place]) -> list[Contrast]:
        return [Contrast(self.label, self.cells, _equal(places))]


class Trend(Above):
    """The same difference grows with a number that each place has.

    `values` has one table or several, from cells of the axis `over` to numbers: the slope is common to all tables and the level
    is each table's own. The effect is the change over the widest range of a table.
    """

    over: Text
    values: Annotated[tuple[dict[str, Annotated[float, Field(ge=-1e6, le=1e6)]], ...], Field(strict=False, min_length=1)]

    def contrasts(self, places: Mapping[str, Place]) -> list[Contrast]:
        span = max(max(table.values()) - min(table.values()) for table in self.values)
        steps: dict[str, float] = {}  # of the widest range, from the mean of the table
        for table in self.values:
            numbers = {name: table[place[self.over]] / span for name, place in places.items() if place[self.over] in table}
            steps |= {name: number - float(np.mean(list(numbers.values()))) for name, number in numbers.items()}
        squares = sum(step**2 for step in steps.values())
        weights = {name: step / squares for name, step in steps.items()}
        return [Contrast(f"growth of {self.label}", self.cells, weights)]


class Lowest(Table):
    """A cell of an axis is below each of the `others`."""

    axis: Text
    cell: Text
    others: Cells

    @property
    def cells(self) -> list[str]:
        return [self.cell, *self.others]

    def contrasts(self, places: Mapping[str, Place]) -> list[Contrast]:
        return [Contrast(f"{o} − {self.cell}", {o: 1.0, self.cell: -1.0}, _equal(places)) for o in self.others]


class Share(Table):
    """A cell has at least this share of the way from the cell `start` to the cell `end`."""

    axis: Text
    cell: Text
    start: Text
    end: Text
    at_least: Annotated[float, Field(gt=0, le=1)]

    @property
    def cells(self) -> list[str]:
        return [self.cell, self.start, self.end]

    def contrasts(self, places: Mapping[str, Place]) -> list[Contrast]:
        weights = {self.cell: 1.0, self.end: -self.at_least, self.start: self.at_least - 1}
        return [Contrast(f"{self.cell} − {100 * self.at_least:g} % of the way", weights, _equal(places))]

    def way(self, places: Mapping[str, Place]) -> Contrast:
        """A share of the way means nothing unless this is above zero."""
        return Contrast(f"{self.end} − {self.start}", {self.end: 1.0, self.start: -1.0}, _equal(places))


class Trimmed(Table):
    """Robust aggregation keeps less of the updates of honest clients with one modality than of those with both, on average over
    these cells of an axis."""

    axis: Text
    rules: Cells

    @property
    def cells(self) -> list[str]:
        return list(self.rules)

    def contrasts(self, places: Mapping[str, Place]) -> list[Contrast]:
        return [Contrast("kept of paired − of one modality", dict.fromkeys(self.rules, 1 / len(self.rules)), _equal(places))]


class Order(Table):
    """The mean score of each group of cells of an axis is above that of the group before it."""

    axis: Text
    ascending: Annotated[tuple[Cells, ...], Field(strict=False)]

    def contrasts(self, places: Mapping[str, Place]) -> list[Contrast]:
        groups = [[name for name, place in places.items() if place[self.axis] in group] for group in self.ascending]
        contrasts = []
        for number in range(1, len(groups)):
            signed = ((groups[number], 1), (groups[number - 1], -1))
            weights = {name: sign / len(group) for group, sign in signed for name in group}
            label = " − ".join(_mean(self.ascending[index]) for index in (number, number - 1))
            contrasts.append(Contrast(label, {"": 1.0}, weights))
        return contrasts


Kind = Above | Trend | Lowest | Share | Trimmed | Order
KINDS = ("above", "trend", "lowest", "share", "order", "trimmed")


class Hypothesis(Table):
    """A claim about the cells of each sweep in `margin`, which says from how many points on an effect matters there.

    `where` selects cells of the axes; without it all are read. Exactly one of the keys in KINDS says what is claimed.
    """

    name: Text
    claim: Text
    source: Text
    margin: Annotated[dict[FolderName, Annotated[float, Field(gt=0, le=100)]], Field(min_length=1)]
    where: dict[str, Cells] = Field(default_factory=dict)
    above: Above | None = None
    trend: Trend | None = None
    lowest: Lowest | None = None
    share: Share | None = None
    order: Order | None = None
    trimmed: Trimmed | None = None

    @property
    def contrast(self) -> Kind:
        kinds: list[Kind] = [kind for name in KINDS if (kind := getattr(self, name)) is not None]
        return kinds[0]

    @property
    def axis(self) -> str | None:
        """The axis whose cells are compared within a replicate; None if places are compared."""
        return None if isinstance(self.contrast, Order) else self.contrast.axis

    @property
    def selected(self) -> dict[str, Sequence[str]]:
        """axis -> the cells that the hypothesis reads, for the axes of which it does not read all."""
        contrast, selected = self.contrast, dict[str, Sequence[str]](self.where)
        if isinstance(contrast, Order):
            return selected | {contrast.axis: [cell for group in contrast.ascending for cell in group]}
        if isinstance(contrast, Trend):
            selected[contrast.over] = [cell for table in contrast.values for cell in table]
        return selected | {contrast.axis: list(contrast.cells)}


class Hypotheses(Table):
    hypotheses: Annotated[tuple[Hypothesis, ...], Field(strict=False, min_length=1)]


def read(path: Path) -> tuple[Hypothesis, ...]:
    """Raises ConfigError for the first thing that is wrong with the file."""
    try:
        hypotheses = Hypotheses.model_validate(files.read(path, "hypotheses")).hypotheses
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, '', lambda at: files.keys_at(at, Hypotheses))}") from None
    for number, hypothesis in enumerate(hypotheses):
        for problem in _problems(hypothesis):
            raise ConfigError(f"{path}: hypotheses.{number}.{problem}")
    for first, second in combinations(range(len(hypotheses)), 2):
        if hypotheses[first].name == hypotheses[second].name:
            name = hypotheses[second].name
            raise ConfigError(f"{path}: hypotheses.{first} and hypotheses.{second} are both named {name!r}; rename one.")
    return hypotheses


def _problems(hypothesis: Hypothesis) -> Iterator[str]:
    """What makes the contrast of a hypothesis impossible, without its place in the file."""
    kinds = [kind for kind in KINDS if getattr(hypothesis, kind) is not None]
    if len(kinds) != 1:
        given = f"it has {' and '.join(kinds)}" if kinds else "it has none"
        yield f"name = {hypothesis.name!r}: one key of {', '.join(KINDS)} must say what is claimed, and {given}."
        return
    contrast = hypothesis.contrast
    axes = [contrast.axis, *([contrast.over] if isinstance(contrast, Trend) else [])]
    if len(set(axes)) < len(axes):
        yield f"trend: over and axis are both {contrast.axis!r}; name the axis along which the difference grows."
    for axis in axes:
        if axis in hypothesis.where:
            yield f"where.{axis}: {kinds[0]} names the cells of this axis itself; leave it out."
    if isinstance(contrast, Order) and len(contrast.ascending) < 2:
        yield "order.ascending: needs two groups of cells or more."
    named: list[str] = []
    if isinstance(contrast, Above):
        named = [*contrast.higher, *contrast.lower]
    elif isinstance(contrast, Order):
        named = [cell for group in contrast.ascending for cell in group]
    else:
        named = list(contrast.cells)
    tables = contrast.values if isinstance(contrast, Trend) else ()
    for cells in (named, [cell for table in tables for cell in table]):
        for cell, times in Counter(cells).items():
            if times > 1:
                yield f"{kinds[0]}: names the cell {cell!r} {times} times; name each cell once."
    if not all(len(set(table.values())) > 1 for table in tables):
        yield "trend.values: each table needs two cells with different numbers."
