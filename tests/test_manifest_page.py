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
from fedmllm.data.scenarios import BOTH, IMAGE, NONE, TEXT, Change, Noise, scenarios
from fedmllm.data.schedule import Schedule
from helpers import mixed, sample

BAR = re.compile(r'width="([\d.]+)%" height="17" fill="(#\w+)"><title>client (\d+), (.+?): (\d+) samples</title>')
MISSED = re.compile(r'width="([\d.]+)%" height="8" fill="#\w+"><title>client (\d+) misses (.+?) of its (\w+)</title>')
SECTIONS = re.compile(r"<h2>(.+?)</h2>.*?<table>(.+?)</table>", re.DOTALL)


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


def tables(html: str) -> dict[str, dict[str, list[str]]]:
    """heading -> row -> its cells; the first row is that of the columns' names."""
    found = {}
    for heading, table in SECTIONS.findall(html):
        rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in table.split("<tr>")[1:]]
        found[heading] = {name: cells for name, *cells in rows}
    return found


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
    assert checker.seen["svg"] == checker.seen["table"] == 4
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


def test_every_chart_has_its_numbers_as_a_table() -> None:
    manifest, html = page(mixed(60))
    found = tables(html)
    assert found.keys() == {
        "What each client sees: samples by modality", "How much each client misses: the share of images and of texts",
        "What is seen of each class: samples by modality", "What each client holds: samples by label",
    }  # fmt: skip
    seen = found["What each client sees: samples by modality"]
    assert seen.pop("") == ["both", "image", "text", "neither", "samples"]
    assert [[int(cell) for cell in row[:4]] for row in seen.values()] == manifest.patterns().tolist()
    classes = found["What is seen of each class: samples by modality"]
    assert [row[-1] for row in classes.values()] == ["samples", "20", "20", "20"]
    assert re.findall(r"<g transform=.translate\((\d+) \d+\).>", html).count("84") == 3 * 3 + 3


def test_what_a_client_misses_is_a_share_of_what_its_samples_have() -> None:
    samples = [sample("a"), sample("b"), sample("c", "image"), sample("d", "text"), sample("e", "text")]
    held = [Holding("a", 0, IMAGE), Holding("b", 0, BOTH), Holding("c", 1, NONE), Holding("d", 1, TEXT), Holding("e", 2, TEXT)]
    html = draw_manifest(Manifest.of(held, 3), samples, "t")
    assert tables(html)["How much each client misses: the share of images and of texts"] == {
        "": ["images", "texts"], "client 0": ["0.0 %", "50.0 %"], "client 1": ["100.0 %", "0.0 %"], "client 2": ["–", "0.0 %"],
    }  # fmt: skip
    assert [(float(width), text) for width, client, text, of in MISSED.findall(html) if client == "0"] == [
        (0.0, "0.0 %"), (37.0, "50.0 %")
    ]  # fmt: skip
    assert "misses" not in draw_manifest(Manifest.of([Holding("a", 0, BOTH)], 1), samples[:1], "t")


def test_noise_is_drawn_by_kind_and_severity() -> None:
    noises: list[Noise] = [(("image", "blur", 3),), (("image", "blur", 5), ("text", "typos", 1)), (), (("image", "jpeg", 3),)]
    samples = [sample(name) for name in "abcd"]
    manifest = Manifest.of([Holding(s.id, i // 3, BOTH, noises[i]) for i, s in enumerate(samples)], 2)
    html = draw_manifest(manifest, samples, "t")
    found = tables(html)
    assert found["How bad the images are that each client sees: by kind and severity"] == {
        "": ["good", "blur 3", "blur 5", "jpeg 3", "samples"], "client 0": ["1", "1", "1", "0", "3"],
        "client 1": ["0", "0", "0", "1", "1"],
    }  # fmt: skip
    texts = found["How bad the texts are that each client sees: by kind and severity"]
    assert texts["client 0"] == ["2", "1", "3"]
    colors = {name: color for _, color, _, name, _ in BAR.findall(html)}
    assert colors["blur 3"].startswith(colors["blur 5"])
    assert colors["jpeg 3"][:7] != colors["blur 3"][:7]
    assert "How bad" not in draw_manifest(Manifest.of([Holding("a", 0, BOTH)], 1), samples[:1], "t")


def test_names_of_noise_and_notes_cannot_break_out_of_the_page() -> None:
    hostile = "<b>&\"'</title><script>"
    manifest = Manifest.of([Holding("a", 0, BOTH, (("image", hostile, 3),))], 1)
    html = draw_manifest(manifest, [sample("a")], "t", [hostile, "75.0 % < 80.0 %"])
    assert hostile not in html
    assert "<p>75.0 % &lt; 80.0 %</p>" in html
    checker = Checker()
    checker.feed(html)
    assert checker.open == []
    assert not checker.seen.keys() & {"b", "script"}
