"""The page of `fedmllm report` in a browser: at three widths, in both themes, with the keyboard, on paper."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from browser import CHROMIUM, Browser, browser
from fedmllm.report.html_report import html_report
from made_runs import make_run, make_sweep
from test_html_report import AXES, CLIENTS, SHOWN, change, hits, record

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here"),
]
WIDTHS = (360, 768, 1280)
CONTRAST = """(() => {
  const channels = (color) => color.match(/[\\d.]+/g).slice(0, 3).map((c) => c / 255);
  const light = (color) => channels(color).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    const color = getComputedStyle(element).backgroundColor;
    return color === "rgba(0, 0, 0, 0)" ? behind(element.parentElement) : color;
  };
  const seen = {};
  const names = "p, thead th, nav a, main a, .right b, .wrong b, figcaption, tr.marked td, label, .id";
  for (const name of names.split(", ")) {
    const element = document.querySelector(name);
    const [a, b] = [light(getComputedStyle(element).color), light(behind(element))].sort((x, y) => y - x);
    seen[name] = (a + 0.05) / (b + 0.05);
  }
  return seen;
})()"""
HIDDEN_SHARE = """[...document.querySelectorAll("svg text")].filter((text) => {
  const [inner, outer] = [text.getBoundingClientRect(), text.ownerSVGElement.getBoundingClientRect()];
  return inner.left < outer.left - 1 || inner.right > outer.right + 1 || inner.bottom > outer.bottom + 1;
}).map((text) => text.textContent)"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep, another one for the links between them, and two runs whose client names and answers are long."""
    root = tmp_path_factory.mktemp("page")
    sweep = make_sweep(root / "grid", AXES, hits, kinds={"zero-shot": "zero-shot"})
    other = make_sweep(root / "other", {"setting": ["a", "b"], "method": ["FedAvg", "Broken"]}, hits)
    index = other / "sweep.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"name": "other"}))
    for name in ("run", f"a-run-with-a-name-that-is-{'very-' * 12}long"):
        make_run(root / name, {"both": 0.5, "image": 0.9, "text": 0.25})
        change(root / name, per_client=CLIENTS, modalities=SHOWN, test_digest="x")
        (root / name / "rounds.jsonl").write_text(record(0, 0.5, 0.4, 0.6, 2.0) + record(1, 0.9, 0.5, 0.8, 1.0))
    for run in [*sweep.glob("federated-*"), *other.glob("federated-*")]:
        change(run, per_client=CLIENTS)
    for file in root.rglob("predictions.jsonl"):  # every fourth of forty samples, for a page that is quickly drawn
        lines = [
            line.replace('"predicted": "b"', f'"predicted": "{"unbroken" * 20}"') for line in file.read_text().splitlines()
        ]
        file.write_text("".join(f"{line}\n" for number, line in enumerate(lines) if number % 4 == 0))
    file = root / "page.html"
    file.write_text(html_report([sweep, other, *(path.parent for path in root.glob("*/result.json"))]))
    return file


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_overflows_and_nothing_is_wrong(tab: Browser, page: Path, width: int, dark: bool) -> None:
    tab.problems.clear()
    tab.open(page, width, dark)
    assert tab.problems == []
    assert tab.run("document.documentElement.scrollWidth") == width
    assert tab.run(HIDDEN_SHARE) == [], "no label of a picture is cut"
    low, high = (0, 60) if dark else (240, 255)
    assert all(low <= int(c) <= high for c in tab.run("getComputedStyle(document.body).backgroundColor")[4:-1].split(", "))
    contrasts = tab.run(CONTRAST)
    assert all(contrast >= 4.5 for contrast in contrasts.values()), contrasts


def test_what_can_scroll_does_so_by_itself(tab: Browser, page: Path) -> None:
    tab.open(page, 360)
    assert tab.run("[...document.querySelectorAll('.scroll')].some((box) => box.scrollWidth > box.clientWidth)")
    assert tab.run("[...document.querySelectorAll('main > .scroll, figure > .scroll')].every((box) => box.tabIndex === 0)")


def shown(tab: Browser) -> int:
    count = tab.run("[...document.querySelector('.gallery').children].filter((card) => card.checkVisibility()).length")
    assert tab.run("document.querySelector('.filters output').textContent") == f"{count} of 10 samples"
    return int(count)


def choose(tab: Browser, name: str, value: str) -> None:
    tab.run(
        f"{{const field = document.querySelector('.filters').elements['{name}']; field.value = '{value}';"
        "field.dispatchEvent(new Event('input', {bubbles: true}))}"
    )


def test_filters(tab: Browser, page: Path) -> None:
    """Two runs with the same answers: of 10 samples, 20 are right with both, 36 with the image and 10 with the text."""
    tab.open(page, 1280)
    assert shown(tab) == 10
    for pattern, right in {"both": 5, "image": 9, "text": 3}.items():
        choose(tab, "pattern", pattern)
        choose(tab, "outcome", "right")
        assert shown(tab) == right
        choose(tab, "outcome", "wrong")
        assert shown(tab) == 10 - right
        choose(tab, "outcome", "both")
        assert shown(tab) == 0, "the runs agree"
    choose(tab, "pattern", "")
    assert shown(tab) == 6, "right with the image and wrong with the text"
    choose(tab, "outcome", "")
    choose(tab, "words", "S08")
    assert shown(tab) == 1
    choose(tab, "run", "1")
    assert shown(tab) == 1


def test_the_theme_is_changed_with_the_keyboard(tab: Browser, page: Path) -> None:
    tab.open(page, 768, dark=True)
    color = "getComputedStyle(document.body).backgroundColor"
    before = tab.run(color)
    reached = []
    for _ in range(2):
        tab.press("Tab")
        reached.append(tab.run("document.activeElement.id || document.activeElement.className"))
    assert reached == ["skip", "theme"]
    assert tab.run("document.activeElement.getAttribute('aria-label')") == "switch to light colours"
    assert tab.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    tab.press("Enter")
    assert tab.run(color) != before
    assert tab.run("document.activeElement.getAttribute('aria-label')") == "switch to dark colours"
    tab.press("Enter")
    assert tab.run(color) == before


def test_filters_and_boxes_are_reached_with_the_keyboard(tab: Browser, page: Path) -> None:
    tab.open(page, 1280)
    tab.run("document.querySelector('.filters select').focus()")
    names = []
    for _ in range(4):
        names.append(tab.run("document.activeElement.name"))
        tab.press("Tab")
    assert names == ["outcome", "pattern", "run", "words"]


def test_a_script_in_the_page_is_not_executed(tab: Browser, page: Path, tmp_path: Path) -> None:
    """The policy permits the page's own script alone, also if a mark of the data were not escaped."""
    hostile = tmp_path / "page.html"
    text = "<img src=x onerror='window.hacked = 1'><script>window.hacked = 1</script>"
    hostile.write_text(page.read_text().replace('<main id="main">', f'<main id="main">{text}'))
    tab.open(hostile, 1280)
    assert tab.run("window.hacked") is None
    assert any("Content Security Policy" in problem for problem in tab.problems)
    tab.problems.clear()


def test_on_paper(tab: Browser, page: Path) -> None:
    tab.open(page, 768, dark=True)
    tab.call("Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert tab.run("getComputedStyle(document.body).backgroundColor") == "rgb(251, 251, 250)"
    for part in ("nav", ".filters", "#theme"):
        assert not tab.run(f"document.querySelector('{part}').checkVisibility()")
    assert tab.run("[...document.querySelectorAll('main details table')].every((table) => table.offsetHeight > 0)")
    tab.call("Emulation.setEmulatedMedia", media="", features=[])
