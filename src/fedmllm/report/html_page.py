"""A page of HTML in one file, which opens without a network: the calls of `Page`, written as HTML."""

from __future__ import annotations

import base64
import hashlib
import html
import itertools
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fedmllm.errors import xml_text
from fedmllm.report.page import Markdown, Page, Shade, anchor

_LINK_OR_CODE = re.compile(r"\[(?P<label>.*?)\]\((?P<target>[^)]*)\)|`(?P<code>[^`]*)`")
_NUMBER = re.compile(r"[+-]?\d[\d,]*(\.\d+)?")


def inline(text: str) -> str:
    """A paragraph's text as HTML. Data is escaped; of Markdown, links inside the page and code become elements."""
    if not isinstance(text, Markdown):
        return xml_text(text).strip()
    parts, end = [], 0
    for match in _LINK_OR_CODE.finditer(text):  # data in it is escaped, so that it has neither
        parts.append(_unescaped(text[end : match.start()]))
        end = match.end()
        if match["code"] is not None:
            parts.append(f"<code>{_unescaped(match['code'])}</code>")
        elif match["target"].startswith("#"):
            parts.append(f'<a href="{_unescaped(match["target"])}">{_unescaped(match["label"])}</a>')
        else:  # a page of the documentation, which is not beside this one
            parts.append(f"{_unescaped(match['label'])} ({_unescaped(match['target'])})")
    return "".join([*parts, _unescaped(text[end:])])


def _unescaped(markdown: str) -> str:
    return xml_text(html.unescape(markdown))


@dataclass
class HtmlPage(Page):
    """`lines` are HTML, and pictures are among them."""

    contents: list[tuple[int, str, str]] = field(default_factory=list)
    """(level, anchor, text) of each heading."""

    def heading(self, level: int, text: str, *paragraph: str) -> None:
        stem, known = anchor(text) or "section", {other for _, other, _ in self.contents}
        names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
        name = next(name for name in names if name not in known)
        self.contents.append((level, name, text))
        self.lines.append(f'<h{level} id="{xml_text(name)}">{inline(text)}</h{level}>')
        for line in paragraph:
            self.paragraph(line)

    def paragraph(self, text: str) -> None:
        self.lines.append(f"<p>{inline(text)}</p>")

    def continued(self, text: str) -> None:
        self.paragraph(text)

    def items(self, texts: Sequence[str]) -> None:
        self.lines += ["<ul>", *(f"<li>{inline(text)}</li>" for text in texts), "</ul>"]

    def picture(self, caption: str, file: str, svg: str) -> None:
        """An SVG picture inside the page, with the caption as its text alternative."""
        width = re.search(r'viewBox="0 0 (\d+)', svg)
        size = f' style="max-width:{width[1]}px"' if width else ""
        drawn = svg.replace("<svg ", f'<svg role="img" aria-label="{xml_text(caption)}"{size} ', 1)
        self.lines.append(f"<figure>{_scrolling(drawn, caption)}<figcaption>{xml_text(caption)}</figcaption></figure>")

    def table(
        self,
        head: Sequence[str],
        rows: Sequence[Sequence[str]],
        left: int = 1,
        shade: Shade = "",
        marked: Collection[int] = (),
    ) -> None:
        """A table that scrolls by itself where it is wider than the page; the rows with an index in `marked` stand out."""
        numbers = [[_number(cell) if column >= left else None for column, cell in enumerate(row)] for row in rows]
        columns = list(zip(*numbers, strict=True))
        known = [value for row in numbers for value in row if value is not None]
        low, high = (min(known), max(known)) if known and shade == "heat" else (0.0, 0.0)
        names = "".join(f'<th scope="col"{_side(column, left)}>{inline(name)}</th>' for column, name in enumerate(head))
        body = []
        for index, row in enumerate(rows):
            cells = []
            for column, cell in enumerate(row):
                value = numbers[index][column]
                top = high - low if shade == "heat" else max((abs(v) for v in columns[column] if v is not None), default=0.0)
                drawn = (
                    f' class="{shade}" style="--v:{(abs(value) - low) / top:.3f}"'
                    if shade and value is not None and top
                    else ""
                )
                tag, scope = ("th", ' scope="row"') if not column else ("td", "")
                cells.append(f"<{tag}{scope}{drawn or _side(column, left)}>{inline(cell)}</{tag}>")
            body.append(f"<tr{' class=marked' if index in marked else ''}>{''.join(cells)}</tr>")
        whole = f"<table><thead><tr>{names}</tr></thead><tbody>{''.join(body)}</tbody></table>"
        self.lines.append(_scrolling(whole, f"table: {', '.join(head)}"))

    @contextmanager
    def folded(self, summary: str) -> Iterator[None]:
        """What is added inside the block is shown on demand."""
        self.lines.append(f"<details><summary>{inline(summary)}</summary>")
        yield
        self.lines.append("</details>")

    def html(self, title: str) -> str:
        """The whole file."""
        style, script = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy = (
            f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; "
            "form-action 'none'"
        )
        links = "".join(
            f'<li class="level-{level}"><a href="#{xml_text(name)}">{inline(text)}</a></li>'
            for level, name, text in self.contents
        )
        return "\n".join(
            [
                '<!doctype html><html lang="en"><head><meta charset="utf-8">',
                f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
                '<meta name="viewport" content="width=device-width, initial-scale=1">',
                f"<title>{xml_text(title)}</title><style>{style}</style></head><body>",
                '<a class="skip" href="#main">To the content</a>',
                f'<header><h1>{xml_text(title)}</h1><button id="theme" type="button" hidden>Dark</button></header>',
                f'<nav aria-label="Contents"><details open><summary>Contents</summary><ul>{links}</ul></details></nav>',
                '<main id="main">',
                *self.lines,
                f"</main><script>{script}</script></body></html>",
                "",
            ]
        )


def _side(column: int, left: int) -> str:
    return ' class="text"' if column < left else ""


def _number(cell: str) -> float | None:
    match = _NUMBER.match(cell.strip())
    return float(match[0].replace(",", "")) if match else None


def _scrolling(content: str, name: str) -> str:
    """Content that may be wider than the page; it can be scrolled with the keyboard."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{xml_text(name)}">{content}</div>'
