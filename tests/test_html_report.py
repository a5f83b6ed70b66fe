"""`fedmllm report --out page.html`: what is on the page, that nothing in it can be markup, and what it opens."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import math
import re
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from commands import call
from fedmllm.errors import DataError, printable
from fedmllm.report.clients import expected_scores, tenths
from fedmllm.report.gallery import thumbnail
from fedmllm.report.html_page import HtmlPage, inline
from fedmllm.report.html_report import html_report
from fedmllm.report.page import Markdown
from helpers import png
from made_runs import make_run, make_sweep
from test_hostile_text import FORBIDDEN, Tags, every, hostile_sweep, one_of_each_kind

AXES = {"setting": ["α = 5", "β = 0.3", "p < 1"], "method": ["zero-shot", "FedAvg", "Broken"]}
SHARES = {"zero-shot": 0.5, "FedAvg": 0.9, "Broken": 0.3}
CLIENTS = [
    {"client": i, "samples": 10, "image": i, "text": 10, "gap": (10 - i) / 20, "rounds": 2, "score": 0.4 + i / 100}
    for i in range(10)
]
TAGS = set(
    "html head meta title style body a header h1 h2 h3 button nav details summary ul li main p code div table thead "
    "tbody tr th td figure figcaption svg rect text polygon polyline line circle form label select option input "
    "output article strong b span small script img".split()
)


def hits(cell: Mapping[str, str], seed: int, pattern: str) -> float:
    return SHARES[cell["method"]] + 0.05 * seed - (0.1 if pattern != "both" else 0)


def change(run: Path, **values: Any) -> None:
    file = run / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    folder = make_sweep(tmp_path / "grid", AXES, hits, kinds={"zero-shot": "zero-shot"})
    for run in folder.glob("federated-*"):
        change(run, per_client=CLIENTS)
    return folder


def record(number: int, both: float, image: float, text: float, loss: float) -> str:
    metrics = {name: {"accuracy": score} for name, score in {"both": both, "image": image, "text": text}.items()}
    sums = {"bytes_up": {"adapter": 1}, "bytes_down": {"adapter": 1}}
    return json.dumps({"round": number, "metrics": metrics, "loss": loss, **sums}) + "\n"


SHOWN = {"drawn": {"both": 1.0, "image": 0.0, "text": 0.0, "none": 0.0}, "expected": None}
"""A result's `modalities`: no sample shows neither."""


class Outline(HTMLParser):
    """Fails on a closing tag without an opening one; `ids` and `names` are those of anchors and of what needs a name."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.targets: set[str] = set()
        self.nameless: list[str] = []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids += [values["id"] or ""] if "id" in values else []
        self.targets |= {values["href"] or ""} if "href" in values else set()
        named = {"svg": "aria-label", "img": "alt", "nav": "aria-label"}
        if (tag in named and not values.get(named[tag])) or (values.get("role") == "region" and not values.get("aria-label")):
            self.nameless.append(tag)
        if tag not in ("meta", "img", "input", "rect", "line", "circle", "polygon", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("rect", "line", "circle", "polygon", "polyline"):
            assert self.open.pop() == tag


def rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table after a heading."""
    table = page.partition(f">{heading}</h")[2].partition("<table>")[2].partition("</table>")[0]
    lines = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in table.split("<tr")[1:]]
    return [[html.unescape(re.sub("<[^>]*>", "", cell)) for cell in line] for line in lines]


def test_a_sweep_is_one_file_that_asks_for_nothing(sweep: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "page.html"
    done = call("report", sweep, "--out", out)
    assert done.exit_code == 0, done.output
    page = out.read_text()
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]
    assert done.stdout.startswith(f"{out}: {len(page.encode()):,} bytes")
    assert rows(page, "made")[2][1:] == ["92.5 ± 3.5"] * 3 + ["92.5"]
    assert "FedAvg is above zero-shot by" in page
    worst = rows(page, "Clients from the worst to the best")
    assert worst[0] == ["setting", "method", "worst", *(f"{i}." for i in range(2, 10)), "best"]
    assert worst[1] == ["α = 5", "FedAvg", *(f"{40 + i}.0" for i in range(10))]
    assert rows(page, "Who holds what")[1] == ["0", "40.0", "10", "0", "10", "50", "2"]
    outline = Outline(page)
    assert len(outline.ids) == len(set(outline.ids))
    assert outline.targets <= {f"#{name}" for name in outline.ids}
    assert outline.nameless == []
    assert not re.search(r"https?:(?!//www\.w3\.org/2000/svg)|url\(|@import|<link|\son\w+=", page)
    script = page.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline';" in page
    assert f"script-src 'sha256-{digest}'" in page
    assert page == html_report([sweep]), "the same folders give the same bytes"


def test_single_runs(tmp_path: Path) -> None:
    for name, share in {"first": 0.9, "second": 0.5}.items():
        make_run(tmp_path / name, {"both": share, "image": 0.5, "text": 0.5})
        change(tmp_path / name, per_client=CLIENTS, test_digest="x", modalities=SHOWN)
    (tmp_path / "first" / "rounds.jsonl").write_text(record(0, 0.5, 0.4, 0.6, 2.0) + record(1, 0.9, 0.5, 0.8, 1.0))
    page = html_report([tmp_path / "first", tmp_path / "second"])
    assert [row[0] for row in rows(page, "Single runs")] == ["folder", "first", "second"]
    assert rows(page, "Single runs")[1][2] == "90.0 [90.0, 90.0]"
    assert "second against first: -40.0 points in 1 replicate; no test: a test needs two replicates at each place." in page
    against = html_report([tmp_path / "first", tmp_path / "second"], "second")
    assert "first against second: +40.0 points in 1 replicate" in against
    clients = rows(page, "Clients of first")
    assert clients[0] == ["client", "score, %", "samples", "image", "text", "missing, %", "rounds"]
    assert clients[1][:2] == ["0", "40.0"]
    assert "<tr class=marked><th" in page
    for line in (
        "both",
        "image",
        "text",
        "worst tenth of clients",
        "best tenth of clients",
        "loss, % of the first round&#x27;s",
    ):
        assert f">{line}</text>" in page
    assert Outline(page).nameless == []


def test_several_folders_of_one_name_and_incomplete_runs(tmp_path: Path) -> None:
    for parent in "ab":
        make_run(tmp_path / parent / "run", {"both": 0.5})
    page = html_report([tmp_path / "a" / "run", tmp_path / "b" / "run"])
    assert [row[0] for row in rows(page, "Single runs")][1:] == [str(tmp_path / parent / "run") for parent in "ab"]
    done = call("report", tmp_path / "a", "--out", tmp_path / "page.html")
    assert done.exit_code == 2
    assert "a is not a run directory." in done.stderr
    done = call("report", tmp_path / "a" / "run", "--samples", "--out", tmp_path / "page.md")
    assert done.exit_code == 2
    assert "--samples is for a page in HTML; give --out a name that ends in .html." in done.stderr


def test_a_score_out_of_range_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "run", {"both": 0.5})
    (tmp_path / "run" / "rounds.jsonl").write_text(record(0, 2.0, 0.4, 0.6, 2.0) + record(1, 0.9, 0.5, 0.8, 1.0))
    done = call("report", tmp_path / "run", "--out", tmp_path / "page.html")
    assert done.exit_code == 2
    assert "a file is not as a run writes it" in done.stderr


# How clients differ


def test_what_clients_can_expect_by_hand() -> None:
    rows = [
        {"client": 0, "samples": 10, "image": 6, "text": 8, "gap": 0.3},  # four show both, two the image, four the text
        {"client": 1, "samples": 5, "image": 5, "text": 0, "gap": 0.5},
    ]
    metrics = {name: {"auc": score} for name, score in {"both": 0.9, "image": 0.6, "text": 0.3}.items()}
    result = {"primary_metric": "auc", "per_client": rows, "modalities": {"drawn": {"none": 0.0}}}
    assert expected_scores(result, metrics) == pytest.approx([(4 * 0.9 + 2 * 0.6 + 4 * 0.3) / 10, 0.6])
    assert expected_scores(result | {"modalities": {"drawn": {"none": 0.1}}}, metrics) == [], "how many show both is unknown"
    assert expected_scores(result | {"modalities": {}, "per_client": rows[1:]}, metrics) == [0.6]
    assert expected_scores(result, {"both": {"auc": 0.9}}) == [], "a pattern was not tested"


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60))
def test_the_first_tenth_is_the_worst_decile(scores: list[float]) -> None:
    parts = tenths(scores)
    lowest = sorted(scores)[: math.ceil(len(scores) / 10)]
    assert parts[0] == pytest.approx(sum(lowest) / len(lowest))
    assert len(parts) == min(10, len(scores))
    assert parts == pytest.approx(sorted(parts))


# Text from elsewhere


@every
def test_a_paragraph_shows_the_text_and_nothing_arises_from_it(text: str) -> None:
    check_text(text)


@given(st.text(max_size=60))
def test_no_text_is_markup(text: str) -> None:
    check_text(text)


def check_text(text: str) -> None:
    template = Markdown("a `{x}` {x} [{x}](#b) [c](d.md)")
    for line, tags in ((inline(text), set()), (inline(template.filled(x=text)), {"code", "a"})):
        seen = Tags(line)
        assert seen.tags == tags
        assert seen.attributes <= {"href"}
        assert not FORBIDDEN.search(line)
        assert printable(text).strip() in seen.text
    page = HtmlPage()
    page.heading(2, text)
    page.heading(2, text)
    page.table([text], [[text]], shade="heat")
    page.picture(text, text, '<svg viewBox="0 0 9 9"></svg>')
    whole = page.html(text)
    assert Tags(whole).tags <= TAGS
    assert whole.count("<script>") == 1
    assert len({name for _, name, _ in page.contents}) == 2
    Outline(whole)


@one_of_each_kind
def test_a_page_of_hostile_runs_has_only_its_own_tags(text: str, tmp_path: Path) -> None:
    folder = hostile_sweep(tmp_path / "grid", text)
    for run in folder.glob("*/predictions.jsonl"):
        lines = [json.loads(line) for line in run.read_text().splitlines()][:5]
        lines = [line | {"id": f"{line['id']}{text}", "predicted": text, "answer": text} for line in lines]
        run.write_text("".join(json.dumps(line) + "\n" for line in lines))
        change(run.parent, positive=text, per_client=[CLIENTS[0] | {"site": text}])
    page = html_report([folder, next(folder.glob("federated-*"))])
    assert not FORBIDDEN.search(page)
    seen = Tags(page)
    assert seen.tags <= TAGS
    assert not any(name.startswith("on") or name in ("src", "srcdoc", "action") for name in seen.attributes)
    assert page.count("<script>") == 1
    assert printable(text) in seen.text
    Outline(page)


# Samples


def test_samples_are_opened_only_if_asked(write_experiment: Callable[..., Path], tmp_path: Path) -> None:
    make_run(tmp_path / "run", {"both": 0.5})
    (tmp_path / "run" / "config.toml").write_text(write_experiment().read_text())
    line = {"pattern": "both", "answer": "red", "correct": False, "closed": True, "failed": False, "score": None}
    lines = [
        line | {"id": "test-00", "predicted": "blue", "probability": 0.875},
        line | {"id": "test-01", "predicted": "blue", "correct": True, "probability": 0.5},
        line | {"id": "test-01", "predicted": "blue", "pattern": "image"},
    ]
    (tmp_path / "run" / "predictions.jsonl").write_text("".join(json.dumps(item) + "\n" for item in lines))
    out = tmp_path / "page.html"
    assert call("report", tmp_path / "run", "--out", out).exit_code == 0
    closed = out.read_text()
    assert "<img" not in closed
    assert "a red thing" not in closed
    assert "are shown with <code>--samples</code>" in closed
    assert "All 2 test samples" in closed
    assert closed.index("test-00") < closed.index("test-01"), "the wrong ones come first"
    assert 'class="wrong" data-run="0" data-pattern="both"' in closed
    assert "<small>88 %</small>" in closed
    assert call("report", tmp_path / "run", "--samples", "--out", out).exit_code == 0
    page = out.read_text()
    cards = page.split('<article class="sample">')[1:]
    assert len(cards) == 2
    assert "name the color." in cards[0]
    assert "a red thing" in cards[0]
    address = re.findall(r'<img src="data:image/webp;base64,([^"]+)" alt="the picture of sample test-00">', cards[0])
    assert Image.open(io.BytesIO(base64.b64decode(address[0]))).size == (64, 64)
    assert "Choices: red, blue, green" in cards[1]
    Outline(page)


def test_data_that_is_not_here_is_said_on_the_page(write_experiment: Callable[..., Path], tmp_path: Path) -> None:
    make_run(tmp_path / "run", {"both": 0.5})
    settings = write_experiment().read_text()
    (tmp_path / "run" / "config.toml").write_text(settings)
    assert "60 of these samples" not in (page := html_report([tmp_path / "run"], None, True))
    assert "40 of these samples are not in the data as it is here." in page
    (tmp_path / "run" / "config.toml").write_text(re.sub('test = "[^"]*"', 'test = "nowhere.jsonl"', settings))
    assert "The data cannot be opened: " in html_report([tmp_path / "run"], None, True)


def test_only_some_samples_are_shown(tmp_path: Path) -> None:
    make_run(tmp_path / "run", {"both": 0.5})
    file = tmp_path / "run" / "predictions.jsonl"
    lines = [json.loads(file.read_text().splitlines()[0]) | {"id": f"s{i:03d}", "correct": i >= 50} for i in range(100)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = html_report([tmp_path / "run"])
    assert page.count('<article class="sample">') == 60
    assert "Of 100 test samples, the 40 that most models get wrong and the 20 that most get right." in page


def test_runs_on_other_data_are_left_out_of_the_gallery(tmp_path: Path) -> None:
    for draw in (0, 1):
        make_run(tmp_path / f"run-{draw}", {"both": 0.5}, config={"task": {"name": "jsonl", "draw": draw}})
    page = html_report([tmp_path / "run-0", tmp_path / "run-1"])
    assert "Left out here: 1, on other data or beyond the 8 that are shown." in page
    assert '<th scope="row">run-0</th><td class="right"' in page
    assert '<th scope="row">run-1</th><td class="right"' not in page


def test_clients_own_models_share_a_cell(tmp_path: Path) -> None:
    make_run(tmp_path / "run", {"both": 0.5})
    line = {"pattern": "both", "id": "s", "answer": "a", "closed": True, "failed": False}
    said = [line | {"client": i, "predicted": "a" if i else "b", "correct": bool(i)} for i in range(3)]
    (tmp_path / "run" / "predictions.jsonl").write_text("".join(json.dumps(item) + "\n" for item in said))
    assert 'a<span class="hint"> right</span> <small>2 of 3 right</small>' in html_report([tmp_path / "run"])


def test_a_picture_that_cannot_be_decoded() -> None:
    with pytest.raises(DataError, match="a picture cannot be decoded"):
        thumbnail(b"no picture")
    assert thumbnail(png()).startswith("data:image/webp;base64,")
