"""A page of Markdown with its pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import quote

from fedmllm.errors import printable

_MARKS = re.compile(
    r"<(?! )|(?<! )>|&(?=[#\w])"  # tags and entities
    r"|[\\`|{}$]|\](?=[(\[:])"  # escapes, code, cells, attributes, formulas, links
    r"|(?<![^\W_])[*_~](?=\S)"  # emphasis; not the star behind a score, or the line inside a name
    r"|\A[#>+=-](?!\d)"  # headings, quotes, lists
)
Shade = Literal["", "heat", "bars"]
_NAMED = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}


class Markdown(str):
    """Text that is Markdown already. Any other string is data: it is escaped when it is put on a page."""

    def filled(self, **data: object) -> Markdown:
        """The text with data, escaped, in place of each `{name}`."""
        return Markdown(
            self.format_map({name: escaped(value if isinstance(value, str) else str(value)) for name, value in data.items()})
        )


def escaped(text: str) -> str:
    """The text as Markdown that shows it on one line: no tag, link, picture, code or cell arises from it, also inside code."""
    if isinstance(text, Markdown):
        return text
    # Entities, unlike backslashes, hold in every dialect and in tables, and cannot be undone by what stands before them.
    return _MARKS.sub(lambda match: _NAMED.get(match[0], f"&#{ord(match[0])};"), printable(text).strip())


@dataclass
class Page:
    """Lines of Markdown, and the SVG pictures that they show, by file name."""

    lines: list[str] = field(default_factory=list)
    pictures: dict[str, str] = field(default_factory=dict)

    def heading(self, level: int, text: str, *paragraph: str) -> None:
        """A heading, and the paragraph below it."""
        self.lines += ["", f"{'#' * level} {escaped(text)}", *([""] if paragraph else []), *map(escaped, paragraph)]

    def paragraph(self, text: str) -> None:
        self.lines += ["", escaped(text)]

    def continued(self, text: str) -> None:
        """A line that belongs to the paragraph before it."""
        self.lines.append(escaped(text))

    def items(self, texts: Sequence[str]) -> None:
        """A list with a point for each text."""
        self.lines += ["", *(f"- {escaped(text)}" for text in texts)]

    def picture(self, caption: str, file: str, svg: str) -> None:
        """A picture; `file` is relative to the page."""
        self.pictures[file] = svg
        self.paragraph(Markdown("![{caption}]({file})").filled(caption=caption, file=Markdown(quote(file))))

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1, shade: Shade = "") -> None:
        """A table whose first `left` columns are text and whose other columns are numbers. Where the page has colours, `shade`
        says how numbers are drawn: as "heat" on one scale, or as "bars", from 0 to the largest of their column."""
        below_heading = bool(self.lines) and self.lines[-1].startswith("#")
        self.lines += [*([] if below_heading else [""]), _table_row(head)]
        self.lines.append("|" + "|".join("---" if i < left else "---:" for i in range(len(head))) + "|")
        self.lines += [_table_row(row) for row in rows]


def anchor(heading: str) -> str:
    """The anchor that Markdown renderers give to a heading of plain letters, as nearly all sweeps' names are."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()))


def _table_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(escaped, cells)) + " |"
