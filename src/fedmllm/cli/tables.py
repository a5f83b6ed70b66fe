"""Tables that are too wide for the terminal, in parts one below the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

_PROSE, _NARROW = 32, 20
"""A longer cell may be wrapped between words, to a width that is no less than the other; figures and names are shorter."""


def parts_that_fit(table: Table, console: Console) -> Iterator[Table]:
    """The table in parts that are no wider than the console, without title and caption. Each part has the columns that name the
    rows: the first ones that are aligned to the left, as far as there is room beside them, or else the very first."""
    columns, frame = table.columns, 3 if table.box else 2
    cells = [[console.measure(cell) for cell in (column.header, *column.cells)] for column in columns]
    # Wide enough that every name and figure is on one line and no word is broken; as wide as it would like to be.
    needed = [max([of_column[0].minimum, *map(_needed, of_column[1:])]) for of_column in cells]
    natural = [max(cell.maximum for cell in of_column) for of_column in cells]
    left = len(list(takewhile(lambda column: column.justify == "left", columns)))

    def fits(*numbers: int) -> bool:
        return sum(needed[i] + frame for i in numbers) < console.width

    names = next(
        (n for n in range(left, 1, -1) if fits(*range(n)) and all(fits(*range(n), i) for i in range(n, len(columns)))), 1
    )
    groups: list[list[int]] = [[]]
    for i in range(names, len(columns)):
        if groups[-1] and not fits(*range(names), *groups[-1], i):
            groups.append([])
        groups[-1].append(i)
    for group in groups:
        shown = [*range(names), *group]
        room = console.width - 1 - frame * len(shown)
        yield _part(table, shown, _widths([needed[i] for i in shown], [natural[i] for i in shown], room))


def _needed(cell: Measurement) -> int:
    return cell.maximum if cell.maximum <= _PROSE else max(cell.minimum, _NARROW)


def _widths(needed: Sequence[int], natural: Sequence[int], room: int) -> list[int]:
    """What each column needs, and what is left to those that would like more. Without room for that, the widest are cut."""
    widths = list(needed)
    while sum(widths) > max(room, len(widths)):
        widths[widths.index(max(widths))] -= 1
    for _ in range(room - sum(widths)):
        lack = [wanted - width for wanted, width in zip(natural, widths, strict=True)]
        widths[lack.index(max(lack))] += max(lack) > 0
    return widths


def _part(table: Table, numbers: Sequence[int], widths: Sequence[int]) -> Table:
    part = Table(box=table.box, show_header=table.show_header)
    for number, width in zip(numbers, widths, strict=True):
        part.add_column(table.columns[number].header, justify=table.columns[number].justify, overflow="fold", width=width)
    cells = [list(table.columns[number].cells) for number in numbers]
    for row, content in zip(table.rows, zip(*cells, strict=True), strict=True):
        part.add_row(*content, style=row.style)
    return part
