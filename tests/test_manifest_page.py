from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from fedmllm.data.dealing import draw
from fedmllm.data.manifest import Holding, Manifest
from fedmllm.data.manifest_page import draw_manifest
from fedmllm.data.partitions import partitions
from fedmllm.data.samples import Sample
from fedmllm.data.scenarios import BOTH, TEXT, Change, scenarios
from fedmllm.data.schedule import Schedule
from helpers import mixed, sample

BAR = re.compile(r'width="([\d.]+)%" height="17" fill="(#\w+)"><title>client (\d+), (.+?): (\d+) samples</title>')


class Checker(HTMLParser):
    """Records all tags and fails on a closing tag without an opening one."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: Counter[str] = Counter()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] += 1
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page(samples: list[Sample], clients: int = 3) -> tuple[Manifest, str]:
    manifest = draw(samples, partitions.build("dirichlet", {}), scenarios.build("missing", {}), clients, 1, 0)
    return manifest, draw_manifest(manifest, samples, "a title")


def bars(html: str) -> dict[tuple[int, str], int]:
    return {(int(client), name): int(count) for _, _, client, name, count in BAR.findall(html)}


def test_the_bars_are_the_counts() -> None:
    samples = mixed(60)
    manifest, html = page(samples)
    labels = {s.id: s.label for s in samples}
    expected: Counter[tuple[int, str]] = Counter()
    for h in manifest:
        expected[h.client, "both" if len(h.visible) == 2 else "".join(h.visible) or "neither"] += 1
        expected[h.client, labels[h.sample_id]] += 1
    assert bars(html) == dict(expected)
    assert f"60 samples on 3 clients; manifest {manifest.digest()[:12]}" in html


def test_a_bars_length_is_its_count() -> None:
    _, html = page(mixed(60))
    per_sample = {round(float(width) / int(count), 2) for width, _, _, _, count in BAR.findall(html)}
    assert max(per_sample) - min(per_sample) <= 0.01


def test_the_page_has_no_scripts_and_no_external_files() -> None:
    checker = Checker()
    html = page(mixed(30))[1]
    checker.feed(html)
    assert checker.open == []
    assert checker.seen["svg"] == 2
    assert not checker.seen.keys() & {"script", "link", "img", "iframe"}
    assert not re.search(r"https?:|url\(|@import", html)


@pytest.mark.parametrize("name", ["<b>&\"'", "</title><script>alert(1)</script>"])
def test_names_cannot_break_out_of_the_page(name: str) -> None:
    samples = [sample(f"{i}", label=name) for i in range(6)]
    manifest = Manifest.of((Holding(s.id, 0, s.modalities) for s in samples), 1)
    html = draw_manifest(manifest, samples, name)
    assert name not in html
    checker = Checker()
    checker.feed(html)
    assert checker.open == []
    assert not checker.seen["script"]
    assert not checker.seen["b"]


def test_rare_labels_are_merged_and_common_labels_have_distinct_colours() -> None:
    samples = [sample(f"{i}", label=f"l{min(i % 20, 15):02d}") for i in range(200)]
    manifest = Manifest.of((Holding(s.id, 0, s.modalities) for s in samples), 1)
    drawn = [(name, color, int(count)) for _, color, _, name, count in BAR.findall(draw_manifest(manifest, samples, "t"))][1:]
    assert len(drawn) == 13
    assert len({color for _, color, _ in drawn}) == 13
    assert drawn[-1] == ("other", "#dddddd", 40)
    assert sum(count for _, _, count in drawn) == 200
    assert ("l15", 50) in [(name, count) for name, _, count in drawn]


def test_a_label_that_names_a_colour_has_that_colour() -> None:
    names = ["Blue", "red", "yes", "no", "circle", "grey", "gray"]
    samples = [sample(f"{i}", label=name) for i, name in enumerate(names)]
    manifest = Manifest.of((Holding(s.id, 0, s.modalities) for s in samples), 1)
    colors = {name: color for _, color, _, name, _ in BAR.findall(draw_manifest(manifest, samples, "t"))[1:]}
    assert colors["Blue"] == "#2a52be"
    assert len(set(colors.values())) == len(names)


def test_the_legend_has_only_used_names_and_the_number_of_clients_is_limited() -> None:
    samples = [sample(f"{i:03d}", "image", label="l") for i in range(600)]
    manifest = Manifest.of((Holding(s.id, i, s.modalities) for i, s in enumerate(samples)), 600)
    html = draw_manifest(manifest, samples, "t")
    assert re.findall(r"</i>([^<]+)</span>", html) == ["image", "l"]
    assert "on 600 clients; the first 500 are drawn;" in html
    assert len(bars(html)) == 2 * 500


def test_drift_is_drawn_over_the_rounds() -> None:
    still = Manifest.of([Holding("a", 0, BOTH), Holding("b", 1, BOTH)], 2)
    drifting = replace(still, schedule=Schedule.of([Change(1, 3, TEXT), Change(1, 4, BOTH)], 8))
    samples = [sample("a", label="1"), sample("b", label="2")]
    page = draw_manifest(drifting, samples, "drift")
    for bar in (
        "client 0, rounds 0 to 7: both",
        "client 1, rounds 0 to 2: both",
        "client 1, round 3: text",
        "client 1, rounds 4 to 7: both",
    ):
        assert f"<title>{bar}</title>" in page
    assert "round by round" not in draw_manifest(still, samples, "still")
