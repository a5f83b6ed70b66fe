"""Names, labels and answers from elsewhere in every output: Markdown, SVG, HTML, and the terminal show them and obey none."""

from __future__ import annotations

import html
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

from commands import call, run
from fedmllm.cli.output import print_table, say, show
from fedmllm.data.manifest import Holding, Manifest
from fedmllm.data.manifest_page import draw_manifest
from fedmllm.data.summary import summarise, summary_lines
from fedmllm.errors import printable, xml_text
from fedmllm.report.page import Markdown, Page, escaped
from fedmllm.report.radar import radar
from fedmllm.report.writeup import page
from fedmllm.runs.progress import ProgressBars
from helpers import sample
from made_runs import make_sweep

HOSTILE = {
    "script": "<script>alert(1)</script>",
    "picture": "<img src=x onerror=alert(1)>",
    "end of a title": "</title><b>",
    "comment": "<!--",
    "entity": "&lt;b&gt; &#60;i>",
    "rich closes": "[/red]",
    "rich opens": "[bold red]x[/]",
    "rich link": "[link=http://x.example]y[/link]",
    "emoji code": ":skull:",
    "link": "[a](javascript:alert(1))",
    "tracking picture": "![a](http://x.example/p.png)",
    "reference": "[a]: http://x.example",
    "cell": "a | b",
    "escaped cell": "a \\| b",
    "code": "`a",
    "fence": "```sh",
    "heading": "# a",
    "emphasis": "**a** _b_ ~~c~~",
    "attributes": "a {: onclick=alert(1)}",
    "formula": "$\\href{javascript:x}{y}$",
    "two lines": "a\n## b",
    "table row": "a |\n| b",
    "carriage return": "good\rbad",
    "clears the screen": "\x1b[2J\x1b[1;1Ha",
    "sets the title": "\x1b]0;a\x07",
    "C1 control": "\x9b31ma",
    "null": "a\x00b",
    "backspaces": "bad\x08\x08\x08ok",
    "turned around": "a\u202eb",
    "other line ends": "a\u2028b\u0085c",
    "lone surrogate": "a\ud800b",
    "not a character": "a\ufffeb",
    "quotes": "\"'><i>",
}
FORBIDDEN = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
"""What no output may hold; a line feed ends a line."""
every = pytest.mark.parametrize("text", HOSTILE.values(), ids=list(HOSTILE))
WORST = ["script", "rich closes", "tracking picture", "table row", "clears the screen", "lone surrogate"]
one_of_each_kind = pytest.mark.parametrize("text", [HOSTILE[name] for name in WORST], ids=WORST)
"""For whole commands, which pass everything through the functions that are tested with every text."""


class Tags(HTMLParser):
    """The tags and attributes that a browser would see, and the text between them."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag: str) -> None:
        self.tags.add(tag)

    def handle_comment(self, data: str) -> None:
        self.tags.add("!--")

    def handle_data(self, data: str) -> None:
        self.text += data


def hostile_sweep(folder: Path, text: str) -> Path:
    """A sweep whose axes, cells, metric, tasks and patterns have this text in their names; only its files' names are plain."""
    axes = {f"s {text}": [f"{text} {i}" for i in range(3)], f"m {text}": ["zero-shot", f"A {text}", f"{text} B"]}
    make_sweep(folder, axes, lambda cell, seed, pattern: 0.5 + 0.1 * seed, kinds={"zero-shot": "zero-shot"})
    for file in folder.glob("*/result.json"):
        result = json.loads(file.read_text())
        metrics = {
            f"{text} {pattern}" if pattern == "image" else pattern: {
                "accuracy": values["accuracy"], "accuracy_ci": values["accuracy_ci"], f"{text}_ci": [0, 1], text: 0.5,
                "n": 40, "parse_failures": 0, "ceiling": 0.9,
            }
            for pattern, values in result["metrics"].items()
        }  # fmt: skip
        transfer = {text: {"primary_metric": text, "metrics": {"both": {text: 0.5}}}}
        suites = {text: {"tables": {text: {text: {text: 0.5}}}, "unavailable": [text], "details": {text: text}}}
        result |= {"name": text, "algorithm": text, "metrics": metrics, "transfer": transfer, "suites": suites}
        file.write_text(json.dumps(result))
    return folder


# Each output's function


@every
def test_markdown_shows_the_text_and_nothing_arises_from_it(text: str) -> None:
    line = escaped(text)
    assert not FORBIDDEN.search(line)
    assert "\n" not in line
    assert Tags(line).tags == set()
    assert not re.search(r"[\\`|{}$]|\]\(|\]\[|\]:", line)
    assert html.unescape(line) == printable(text).strip()
    assert escaped(Markdown("a `{x}` [b](c.md)").filled(x=text)) == f"a `{line}` [b](c.md)"


@pytest.mark.parametrize(
    "text",
    [
        "+3.2 [+1.0, +5.4]",
        "71.3 ± 0.8*",
        "< 0.001",
        "α = 0.5 · 8 clients",
        "macro_f1",
        "p < 1",
        "I:T = 3:7",
        "- 3",
        "–",
        "-1.5",
    ],
)
def test_markdown_leaves_figures_and_common_names_as_they_are(text: str) -> None:
    assert escaped(text) == text or text == "- 3"


@given(st.text())
def test_any_text_survives_every_format(text: str) -> None:
    assert html.unescape(escaped(text)) == printable(text).strip()
    assert Tags(escaped(text)).tags == set()
    assert ElementTree.fromstring(f'<a b="{xml_text(text)}">{xml_text(text)}</a>').text or not text
    assert not FORBIDDEN.search(xml_text(text))


@every
def test_a_picture_is_well_formed_and_shows_the_text(text: str) -> None:
    drawn = radar(text, [text, "b", "c"], {text: [1.0, 2.0, None]})
    root = ElementTree.fromstring(drawn)
    assert {tag.tag.rpartition("}")[2] for tag in root.iter()} <= {
        "svg", "title", "rect", "text", "polygon", "polyline", "line", "circle"
    }  # fmt: skip
    assert [element.text for element in root.iter()].count(printable(text)) == 4
    assert not FORBIDDEN.search(drawn)


@every
def test_the_page_of_a_manifest_shows_the_text(text: str) -> None:
    samples = [sample(f"{i}", label=text) for i in range(3)]
    drawn = draw_manifest(Manifest.of((Holding(s.id, 0, s.modalities) for s in samples), 1), samples, text)
    seen, plain = Tags(drawn), Tags(drawn.replace(xml_text(text), "x"))
    assert (seen.tags, seen.attributes) == (plain.tags, plain.attributes)
    assert printable(text) in seen.text
    assert not FORBIDDEN.search(drawn)


@every
def test_a_table_in_the_terminal_shows_the_text(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(title=text, title_justify="left", caption=text)
    table.add_column(text)
    table.add_row(text)
    print_table(table)
    printed = capsys.readouterr().out
    assert printed.count(printable(text)) == 4
    assert not FORBIDDEN.search(printed)


@every
@pytest.mark.parametrize(
    "function", [show, say, lambda text: ProgressBars()("stage", 1, 2, text)], ids=["show", "say", "progress"]
)
def test_a_line_in_the_terminal_is_one_line(
    function: Callable[[str], None], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    function(text)
    printed = "".join(capsys.readouterr())
    assert printed.endswith(f"{printable(text)}\n")
    assert printed.count("\n") == 1
    assert not FORBIDDEN.search(printed)


@every
def test_a_progress_bar_shows_the_text(text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    bars = ProgressBars()
    bars(text, 1, 2, text)
    bars("loading", 0, 0, text)
    for column in bars._bars.columns:
        for task in bars._bars.tasks:
            assert column(task) is not None
    assert not re.search("[\x00\x07\x08\x9b]", capsys.readouterr().err)


# The commands


@one_of_each_kind
def test_a_page_of_results_shows_the_text(text: str, tmp_path: Path) -> None:
    document: Page = page([hostile_sweep(tmp_path / "grid", text)])
    written = "\n".join(document.lines)
    assert set(document.pictures) == {"figures/made.svg"}
    ElementTree.fromstring(document.pictures["figures/made.svg"])
    assert not FORBIDDEN.search(written)
    assert Tags(written).tags == set()
    # The page's own links and picture, and nothing else that could be one.
    assert set(re.findall(r"\]\(([^)]*)\)", written)) == {"statistics.md", "figures/made.svg"}
    assert html.unescape(written).count(printable(text)) > 20
    widths = [[line.count("|") for line in block.splitlines()] for block in written.split("\n\n") if block.startswith("|")]
    assert len(widths) >= 5
    assert all(len(set(block)) == 1 for block in widths), "every row of a table has its columns"
    plain = page([hostile_sweep(tmp_path / "plain", "plain")])
    assert [line.partition(" ")[0] for line in document.lines if line.startswith("#")] == [
        line.partition(" ")[0] for line in plain.lines if line.startswith("#")
    ]
    assert len(document.lines) == len(plain.lines)


@one_of_each_kind
def test_compare_shows_the_text(text: str, tmp_path: Path) -> None:
    folder = hostile_sweep(tmp_path / "grid", text)
    runs = [folder / "zero-shot", next(folder.glob("federated-*"))]
    for arguments in ([folder], [folder, "--by-pattern"], [folder, "--baseline", "zero-shot"], [*runs, "--baseline", runs[0]]):
        done = call("compare", *arguments)
        assert done.exit_code == 0, done.output
        assert not FORBIDDEN.search(done.output)
    assert run("compare", folder)["axes"][0] == f"s {text}"


@every
def test_a_summary_of_data_shows_the_text_on_one_line(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    from fedmllm.data.samples import Loaded

    lines = list(summary_lines(summarise([("train", Loaded([sample("a", label=text)], []))])))
    for line in lines:
        show(line)
    printed = capsys.readouterr().out
    assert printable(text) in printed
    assert len(printed.splitlines()) == len(lines)
    assert not FORBIDDEN.search(printed)
