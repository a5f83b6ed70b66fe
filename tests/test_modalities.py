"""The effective rates: which modalities the clients' samples show, as drawn and as expected, wherever they are said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from commands import call, run
from fedmllm.data import manifest as manifests
from fedmllm.data.dealing import draw
from fedmllm.data.differences import difference_lines
from fedmllm.data.manifest import Holding, Manifest
from fedmllm.data.partitions import partitions
from fedmllm.data.samples import Sample
from fedmllm.data.scenarios import BOTH, IMAGE, NONE, TEXT, Scenario, scenarios
from fedmllm.data.summary import modality_shares, shares_lines
from fedmllm.report.writeup import page
from fedmllm.storage.run_dir import RunDir
from helpers import sample
from made_runs import make_sweep

Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def shares(both: float = 0, image: float = 0, text: float = 0, none: float = 0) -> dict[str, float]:
    return {"both": both, "image": image, "text": text, "none": none}


PAIRED = [sample(f"{i:04d}") for i in range(2000)]
SOURCES = [sample(f"{i:04d}", "image" if i % 4 else "text") for i in range(2000)]
"""Three pictures for every text, as when a task has a companion."""

EXPECTED: list[tuple[list[Sample], str, dict[str, Any], dict[str, float]]] = [
    (PAIRED, "aligned", {}, shares(both=1)),
    (SOURCES, "aligned", {}, shares(image=0.75, text=0.25)),
    (PAIRED, "missing", {"rate": 0.5}, shares(0.25, 0.25, 0.25, 0.25)),
    (PAIRED, "missing", {"rate": 0.3}, shares(0.49, 0.21, 0.21, 0.09)),
    (PAIRED, "missing", {"rate": 0.5, "empty": "redraw"}, shares(1 / 3, 1 / 3, 1 / 3)),
    (PAIRED, "missing", {"rate": 0.4, "empty": "drop"}, shares(0.36 / 0.84, 0.24 / 0.84, 0.24 / 0.84)),
    (SOURCES, "missing", {"rate": 0.4}, shares(image=0.45, text=0.15, none=0.4)),
    (SOURCES, "missing", {"rate": 0.4, "empty": "redraw"}, shares(image=0.75, text=0.25)),
    # Every kind loses two samples in five, so the sources keep their proportion.
    (SOURCES, "missing", {"rate": 0.4, "empty": "drop"}, shares(image=0.75, text=0.25)),
    # A half keeps 1 − 0.4² = 0.84 of its samples, the other half 0.6.
    (PAIRED[:1000] + SOURCES[1000:], "missing", {"rate": 0.4, "empty": "drop"},
     shares(0.36 / 1.44, (0.24 + 0.45) / 1.44, (0.24 + 0.15) / 1.44)),
    (PAIRED, "cross", {"image_clients": 3}, shares(image=0.3, text=0.7)),
    (SOURCES, "cross", {"image_clients": 3}, shares(image=0.75, text=0.25)),
    (PAIRED, "cross", {"image_clients": 0.5}, shares(image=0.5, text=0.5)),
    (PAIRED, "hybrid", {"presence": 0.6}, shares(0.36, 0.32, 0.32)),
    (PAIRED, "hybrid", {"presence": 0.6, "coin": "client"}, shares(0.36, 0.32, 0.32)),
    (PAIRED, "hybrid", {"presence": 0.0}, shares(image=0.5, text=0.5)),
    (SOURCES, "hybrid", {"presence": 0.8}, shares(image=0.75, text=0.25)),
]  # fmt: skip


@pytest.mark.parametrize(("samples", "name", "options", "expected"), EXPECTED)
def test_the_drawn_shares_are_as_expected_over_many_draws(
    samples: list[Sample], name: str, options: dict[str, Any], expected: dict[str, float]
) -> None:
    scenario = scenarios.build(name, options)
    # `hybrid` draws clients, so its shares vary with the seed unless there are many clients.
    clients = 10 if name != "hybrid" else 800
    manifest = draw(samples, partitions.build("iid", {}), scenario, clients, 0, seed=3)
    found = modality_shares(manifest, samples, scenario)
    assert found["expected"] == pytest.approx(expected, abs=1e-6)
    assert found["drawn"] == pytest.approx(expected, abs=0.04)
    assert sum(found["drawn"].values()) == pytest.approx(1, abs=1e-5)
    assert found["dropped"] == len(samples) - len(manifest)
    assert (found["dropped"] > 0) == (options.get("empty") == "drop")


def rates(found: dict[str, Any]) -> dict[str, Any]:
    return {key: found[key] for key in ("drawn", "expected", "dropped")}


def test_shares_by_hand() -> None:
    held = [Holding("a", 0, BOTH), Holding("b", 0, NONE), Holding("c", 1, IMAGE), Holding("d", 2, TEXT), Holding("e", 2, TEXT)]
    samples = [sample(sample_id) for sample_id in "abcdefg"]
    unknown = Scenario(clients=lambda number, rng: [BOTH] * number)
    found = modality_shares(Manifest.of(held, 3), samples, unknown)
    assert rates(found) == {"drawn": shares(0.2, 0.2, 0.4, 0.2), "expected": None, "dropped": 2}
    assert found["absence"] is None
    assert list(shares_lines(found)) == [
        "clients' samples, as drawn: 20.0 % with image and text, 20.0 % with image only, 40.0 % with text only, "
        "20.0 % with neither",
        "2 samples that lost all they had are dropped",
        *difference_lines(found),
    ]


def test_samples_that_are_elsewhere_are_not_missed() -> None:
    found = modality_shares(Manifest.of([Holding("site/0", 0, IMAGE)], 1), [], scenarios.build("missing", {}))
    assert rates(found) == {"drawn": shares(image=1), "expected": None, "dropped": 0}
    assert found["absence"] is None


def test_check_and_partition_say_the_rates(write_experiment: Write) -> None:
    file = write_experiment()
    missing = ("--set", "scenario.name=missing", "--set", "scenario.rate=0.5")
    made = run("partition", file, *missing, "--out", "m.parquet")["modalities"]
    columns = pq.read_table("m.parquet").to_pydict()
    both = sum(image and text for image, text in zip(columns["has_image"], columns["has_text"], strict=True))
    assert made["drawn"]["both"] == pytest.approx(both / 30, abs=1e-6)
    # Of 30 samples 18 have both modalities, 6 an image alone and 6 a text alone.
    assert made["expected"] == pytest.approx(shares(0.15, 0.25, 0.25, 0.35))
    line = "clients' samples, expected: 15.0 % with image and text, 25.0 % with image only, 25.0 % with text only, 35.0 % with"
    assert line in call("partition", file, *missing, "--out", "m.parquet").stdout
    assert run("check", file, *missing)["modalities"] == made
    assert line in call("check", file, *missing).stdout
    dropped = run("partition", file, *missing, "--set", "scenario.empty=drop", "--out", "d.parquet")["modalities"]
    assert dropped["dropped"] == 30 - pq.read_table("d.parquet").num_rows > 0
    assert dropped["drawn"]["none"] == 0


def test_the_result_has_the_rates_and_an_older_version_is_understood(write_experiment: Write) -> None:
    file = write_experiment(rounds=1)
    file.write_text(file.read_text().replace('"hybrid"\npresence = 0.7', '"missing"\nrate = 0.5'))
    result = run("run", file, "--out", "a")
    assert result["modalities"] == run("partition", file, "--out", "m.parquet")["modalities"]
    centralised = run("baseline", "centralised", file, "--out", "c")
    absence = {"majority": 1 / 3, "accuracy": 1 / 3, "information": 0.0}
    assert centralised["modalities"].pop("absence") == pytest.approx(absence, abs=1e-6)
    assert rates(centralised["modalities"]) == {"drawn": shares(0.6, 0.2, 0.2), "expected": shares(0.6, 0.2, 0.2), "dropped": 0}

    folder = RunDir(Path("a"))
    # As a version wrote it that had another option, and that drew in another way than its settings mean today.
    text = folder.config.read_text()
    assert 'empty = "keep"' in text
    folder.config.write_text(text.replace('empty = "keep"', "never_empty = false"))
    assert run("eval", "a", "--trust-config")["metrics"] == result["metrics"]
    manifest = manifests.read(folder.manifest)
    Manifest.of([Holding(h.sample_id, 0, h.visible) for h in manifest], 4).write(folder.manifest)
    assert run("eval", "a", "--trust-config")["metrics"] == result["metrics"]
    folder.config.write_text(text)
    assert "the data changed since this run" in call("eval", "a", "--trust-config").stderr

    # Its digest is another, because what its settings left open meant something else.
    for record, key in (("result.json", "config_digest"), ("meta.json", "config_digest")):
        content = json.loads((folder.path / record).read_text())
        (folder.path / record).write_text(json.dumps(content | {key: "of another version"}))
    refused = call("run", file, "--out", "a", "--resume")
    assert refused.exit_code == 2
    assert refused.stderr.splitlines()[-1] == (
        "error: a was begun by an earlier version of fedmllm, whose defaults were others; finish it with that version, or give "
        "another --out."
    )
    (folder.path / "result.json").unlink()
    assert "a was begun by an earlier version" in call("run", file, "--out", "a", "--resume").stderr


def test_the_report_lists_the_rates_per_setting(tmp_path: Path) -> None:
    axes = {"setting": ["α = 5", "β = 0.3", "α = 1"], "method": ["zero-shot", "FedAvg", "FedYogi"]}
    folder = make_sweep(tmp_path / "grid", axes, lambda cell, seed, pattern: 0.5, kinds={"zero-shot": "zero-shot"})
    assert "### What the clients see" not in page([folder]).lines  # made by a version that did not record them
    for cell in json.loads((folder / "sweep.json").read_text())["cells"]:
        file = folder / cell["id"] / "result.json"
        missing = cell["axes"]["setting"] == "β = 0.3"
        drawn = shares(0.5 + 0.02 * cell["seed"], 0.2, 0.2, 0.1 - 0.02 * cell["seed"]) if missing else shares(both=1)
        expected = shares(0.49, 0.21, 0.21, 0.09) if missing else None
        seen = {"modalities": {"drawn": drawn, "expected": expected, "dropped": 0}}
        file.write_text(json.dumps(json.loads(file.read_text()) | seen))
    lines = page([folder]).lines
    start = lines.index("### What the clients see")
    assert lines[start + 4 : start + 8] == [
        "| clients of | both | image only | text only | neither |",
        "|---|---:|---:|---:|---:|",
        "| α = 5, α = 1 | 100.0 (–) | 0.0 (–) | 0.0 (–) | 0.0 (–) |",
        "| β = 0.3 | 51.0 (49.0) | 20.0 (21.0) | 20.0 (21.0) | 9.0 (9.0) |",
    ]
