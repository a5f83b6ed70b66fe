from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser

import pytest

from fedmllm.data.manifest import Holding, Manifest, draw
from fedmllm.data.partition import partitions
from fedmllm.data.picture import draw_manifest
from fedmllm.data.samples import Sample
from fedmllm.data.scenarios import scenarios
from helpers import mixed, sample

BAR = re.compile(r'width="([\d.]+)" height="17" fill="(#\w+)"><title>client (\d+), (.+?): (\d+) samples</title>')


class Checker(HTMLParser):
    """Remembers all tags, and fails on one that is closed without having been opened."""

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
    made = draw(samples, partitions.build("dirichlet", {}), scenarios.build("missing", {"never_empty": False}), clients, 1, 0)
    return made, draw_manifest(made, samples, "a title")


def bars(html: str) -> dict[tuple[int, str], int]:
    return {(int(client), name): int(count) for _, _, client, name, count in BAR.findall(html)}


def test_the_bars_are_the_counts() -> None:
    samples = mixed(60)
    made, html = page(samples)
    labels = {s.id: s.label for s in samples}
    expected: Counter[tuple[int, str]] = Counter()
    for h in made:
        expected[h.client, "both" if len(h.visible) == 2 else "".join(h.visible) or "neither"] += 1
        expected[h.client, labels[h.sample_id]] += 1
    assert bars(html) == dict(expected)
    assert f"60 samples on 3 clients; manifest {made.digest()[:12]}" in html


def test_a_bars_length_is_its_count() -> None:
    _, html = page(mixed(60))
    per_sample = {round(float(width) / int(count), 1) for width, _, _, _, count in BAR.findall(html)}
    assert max(per_sample) - min(per_sample) <= 0.2


def test_it_is_one_page_that_loads_nothing_and_runs_nothing() -> None:
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
    made = Manifest.of((Holding(s.id, 0, s.modalities) for s in samples), 1)
    html = draw_manifest(made, samples, name)
    assert name not in html
    checker = Checker()
    checker.feed(html)
    assert checker.open == []
    assert not checker.seen["script"]
    assert not checker.seen["b"]


def test_rare_labels_are_drawn_together_and_common_ones_each_in_its_own_colour() -> None:
    samples = [sample(f"{i}", label=f"l{min(i % 20, 15):02d}") for i in range(200)]
    made = Manifest.of((Holding(s.id, 0, s.modalities) for s in samples), 1)
    drawn = [(name, color, int(count)) for _, color, _, name, count in BAR.findall(draw_manifest(made, samples, "t"))][1:]
    assert len(drawn) == 13
    assert len({color for _, color, _ in drawn}) == 13
    assert drawn[-1] == ("other", "#dddddd", 40)
    assert sum(count for _, _, count in drawn) == 200
    assert ("l15", 50) in [(name, count) for name, _, count in drawn]
