"""A page of Markdown with its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Page:
    """Lines of Markdown, and the SVG pictures that they show, by file name."""

    lines: list[str] = field(default_factory=list)
    pictures: dict[str, str] = field(default_factory=dict)

    def heading(self, text: str, *paragraph: str) -> None:
        """A heading with its marks (`### …`), and the paragraph below it."""
        self.lines += ["", text, "", *paragraph]

    def paragraph(self, text: str) -> None:
        self.lines += ["", text]

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
        """A table whose first `left` columns are text and whose other columns are numbers."""
        self.lines += ["", _table_row(head)]
        self.lines.append("|" + "|".join("---" if i < left else "---:" for i in range(len(head))) + "|")
        self.lines += [_table_row(row) for row in rows]


def _table_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
