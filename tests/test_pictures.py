"""The pictures of docs/ are those that its scripts draw, and those of scenarios show the manifests."""

from __future__ import annotations

import importlib.util
import re
import sys
from types import ModuleType
from xml.etree import ElementTree

import pytest

from fedmllm.data.scenarios import scenarios
from test_docs import DOCS


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[f"docs_{name}"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pictures = script("scenarios")
PAGE = (DOCS / "scenarios.md").read_text()
every = pytest.mark.parametrize("name", pictures.SCENARIOS)


@pytest.fixture(scope="module")
def samples() -> object:
    return pictures.load_samples()


@every
def test_the_pictures_are_fresh(name: str, samples: object) -> None:
    drawn, path = pictures.picture(name, samples), DOCS / "figures" / f"scenario-{name}.svg"
    assert path.read_text() == drawn, f"docs/figures/{path.name} is stale; run `make tables`"


def test_the_picture_of_fairness_is_fresh() -> None:
    fairness = script("fairness")
    assert fairness.FIGURE.read_text() == fairness.picture(), "docs/figures/fairness.svg is stale; run `make tables`"


@every
def test_a_picture_is_one_file_that_is_legible_on_any_page(name: str) -> None:
    text = (DOCS / "figures" / f"scenario-{name}.svg").read_text()
    root = ElementTree.fromstring(text)
    assert [element.text for element in root.iter() if element.tag.endswith("title")]
    assert set(re.findall(r'(?:fill|stroke)="(#\w+)"', text)) <= {"#7a7a7a", "#dd8452", "#55a868"}
    assert not re.search(r"href|<image|<script|<style", text)
    width = int(root.attrib["width"])
    assert max(int(x) for x in re.findall(r"M(\d+) ", text)) + pictures.CELL < width
    for element in root.iter():
        if element.tag.endswith("text") and element.attrib["text-anchor"] == "start":
            assert int(element.attrib["x"]) + 6 * len(element.text or "") <= width


def test_every_scenario_has_a_picture_with_a_text_and_no_picture_is_left_over() -> None:
    shown = {name: alt for alt, name in re.findall(r"^!\[(.+)\]\(figures/scenario-(.+)\.svg\)$", PAGE, re.MULTILINE)}
    assert shown.keys() == pictures.SCENARIOS.keys() == {
        path.stem.removeprefix("scenario-") for path in (DOCS / "figures").glob("scenario-*.svg")
    }  # fmt: skip
    assert all(len(alt) > 40 for alt in shown.values())
    assert {table["name"] for table in pictures.SCENARIOS.values()} == set(scenarios.names())
    assert re.findall(r"^## `(.+)`$", PAGE, re.MULTILINE) == [
        name for name, table in pictures.SCENARIOS.items() if name == table["name"]
    ]  # fmt: skip


@every
def test_there_are_as_many_halves_of_each_look_as_the_manifest_has(name: str, samples: object) -> None:
    manifest = pictures.drawn(pictures.SCENARIOS[name], samples)
    if manifest.schedule.changes:
        rounds = [manifest.at(number).counts() for number in range(pictures.ROUNDS)]
        image, text = (sum(int((counts[:, column] > 0).sum()) for counts in rounds) for column in (1, 2))
        bad, halves = [0, 0], 2 * pictures.CLIENTS * pictures.ROUNDS
    else:
        noise = [modality for noise in manifest.noise.values() for modality, _, _ in noise]
        bad, halves = [noise.count("image"), noise.count("text")], 2 * len(manifest)
        image, text = (int(column.sum()) for column in (manifest.image, manifest.text))
    expected = [image - bad[0], text - bad[1], halves - image - text, *bad]
    drawn = dict.fromkeys(pictures.LEGEND, 0)
    for path in ElementTree.fromstring(pictures.picture(name, samples)).iter("{http://www.w3.org/2000/svg}path"):
        look = next(k for k, v in pictures.LOOKS.items() if f'fill="{path.attrib["fill"]}"' in v)
        drawn[look] = path.attrib["d"].count("M") - 1  # one is in the legend
    assert [drawn[look] for look in pictures.LEGEND] == expected
