"""What is said about how clients differ: by hand, against a count round by round, and for each scenario."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedmllm.config import validate
from fedmllm.data.dealing import draw
from fedmllm.data.differences import difference_lines, noise_rows, noise_shares, presence, rounds_shown, schedule_counts
from fedmllm.data.manifest import Holding, Manifest
from fedmllm.data.partitions import partitions
from fedmllm.data.scenarios import BOTH, IMAGE, NONE, TEXT, Change, Noise, Scenario
from fedmllm.data.schedule import Schedule
from fedmllm.data.summary import absence, modality_shares, shares_lines
from fedmllm.experiment.parts import build_scenario
from helpers import mixed, sample

BLUR: Noise = (("image", "blur", 3),)
BAD: Noise = (("image", "blur", 1), ("text", "typos", 3))


def table(name: str, **options: Any) -> Scenario:
    return build_scenario(validate({"task": {"name": "shapes-qa"}, "scenario": {"name": name, **options}}).scenario)


def said(manifest: Manifest) -> list[str]:
    shown = rounds_shown(manifest)
    return list(
        difference_lines(
            {
                "presence": presence(manifest, shown),
                "changes": schedule_counts(manifest),
                "noise": noise_shares(manifest, shown),
            }
        )
    )


@pytest.mark.parametrize("how", ["step", "markov"])
@pytest.mark.parametrize("first", ["aligned", "hybrid", "missing"])
def test_what_is_shown_over_the_rounds_is_the_sum_of_the_rounds(first: str, how: str) -> None:
    scenario = table(first, then=[{"name": "drift", "how": how, "modality": "either"}])
    manifest = draw(mixed(60), partitions.build("iid", {}), scenario, 6, 0, 1, rounds=9)
    by_round = np.zeros((60, 4), dtype=np.int64)
    for number in range(9):
        for row, holding in enumerate(manifest.at(number)):
            by_round[row, (BOTH, IMAGE, TEXT, NONE).index(holding.visible)] += 1
    assert rounds_shown(manifest).tolist() == by_round.tolist()


def test_clients_are_told_apart_by_hand() -> None:
    held = [
        *(Holding(f"pair{i}", 0, BOTH if i else TEXT) for i in range(4)),
        *(Holding(f"coin{i}", 1, IMAGE if i else TEXT) for i in range(4)),
        Holding("image", 2, IMAGE),
        Holding("text", 3, TEXT),
        Holding("nothing", 4, NONE),
    ]
    manifest = Manifest.of(held, 6)  # the last holds nothing and is not counted
    assert presence(manifest, rounds_shown(manifest)) == {
        "clients": {"both": 1, "either": 1, "image": 1, "text": 1, "none": 1},
        "image": {"least": 0.0, "median": 0.75, "most": 1.0},
        "text": {"least": 0.0, "median": 0.25, "most": 1.0},
    }
    assert said(manifest) == [
        "clients: 1 with pairs, 1 with images and texts but no pairs, 1 with images only, 1 with texts only, 1 with neither",
        "a client sees the image of 0.0 to 100.0 % (median 75.0 %) and the text of 0.0 to 100.0 % (median 25.0 %) of its "
        "samples",
    ]
    assert said(Manifest.of([Holding("a", 0, BOTH), Holding("b", 1, BOTH)], 2)) == []
    assert said(Manifest.of([], 2)) == [
        "a client sees the image of 0.0 to 0.0 % (median 0.0 %) and the text of 0.0 to 0.0 % (median 0.0 %) of its samples"
    ]


def test_noise_is_counted_by_kind_and_severity_of_what_is_seen() -> None:
    held = [Holding("a", 0, BOTH, BLUR), Holding("b", 0, BOTH, BAD), Holding("c", 1, BOTH), Holding("d", 1, TEXT)]
    manifest = Manifest.of(held, 2)
    rows = {modality: {name: rows.tolist() for name, rows in kinds.items()} for modality, kinds in noise_rows(manifest).items()}
    assert rows == {
        "image": {"blur 1": [False, True, False, False], "blur 3": [True, False, False, False]},
        "text": {"typos 3": [False, True, False, False]},
    }
    assert said(manifest)[1:] == [
        "corrupted images: 66.7 % of those seen (kind and severity: blur 1 in 33.3 %, blur 3 in 33.3 %)",
        "corrupted texts: 25.0 % of those seen (kind and severity: typos 3 in 25.0 %)",
    ]
    hidden = replace(manifest, schedule=Schedule.of([Change(0, 1, TEXT)], 4))  # both blurred pictures are seen in one round
    assert noise_shares(hidden, rounds_shown(hidden))["image"] == {"blur 1": round(1 / 6, 6), "blur 3": round(1 / 6, 6)}
    unseen = replace(manifest, schedule=Schedule.of([Change(0, 0, TEXT), Change(1, 0, TEXT)], 4))
    assert noise_shares(unseen, rounds_shown(unseen))["image"] == {"blur 1": 0.0, "blur 3": 0.0}


def test_changes_after_the_first_round_are_counted() -> None:
    still = Manifest.of([Holding("a", 0, BOTH), Holding("b", 1, BOTH)], 2)
    assert schedule_counts(still) is None
    assert schedule_counts(replace(still, schedule=Schedule.of([Change(0, 0, TEXT)], 8))) is None
    drifting = replace(still, schedule=Schedule.of([Change(1, 6, TEXT), Change(1, 7, BOTH), Change(0, 0, IMAGE)], 8))
    assert schedule_counts(drifting) == {"rounds": 8, "clients": 1, "changes": 2, "first": 6}
    assert "what clients see changes over 8 rounds: 2 changes, clients affected: 1, first change in round 6" in said(drifting)


def test_absence_is_that_of_all_rounds() -> None:
    """The client with the samples of one class loses its pictures for half of the rounds, in which absence tells the class."""
    samples = [replace(sample(f"{i}"), label="ab"[i % 2]) for i in range(8)]
    manifest = Manifest.of((Holding(s.id, i % 2, BOTH) for i, s in enumerate(samples)), 2)
    assert absence(manifest, samples) == {"majority": 0.5, "accuracy": 0.5, "information": 0.0}
    drifting = absence(replace(manifest, schedule=Schedule.of([Change(0, 2, TEXT)], 4)), samples)
    assert drifting is not None
    assert (drifting["majority"], drifting["accuracy"]) == (0.5, 0.75)
    assert drifting["information"] == pytest.approx(1 - 0.75 * (np.log2(3) - 2 / 3), abs=1e-6)


@pytest.mark.parametrize(
    ("scenario", "starts"),
    [
        (table("aligned"), []),
        (table("graded", image=0.5), ["a client sees the image of "]),
        (table("label-dependent", slope=0.6), ["a client sees", "which modalities are there predicts the class of "]),
        (table("paired-few"), ["clients: 1 with pairs, 2 with images only, 1 with texts only", "a client sees"]),
        (
            table("drift"),
            [
                "a client sees",
                "what clients see changes over 10 rounds: 2 changes, clients affected: 2, first change in round 5",
            ],
        ),
        (table("noisy", image=["blur"], text=[]), ["corrupted images: "]),
        (table("missing", then=[{"name": "noisy"}]), ["a client sees", "corrupted images: ", "corrupted texts: "]),
    ],
    ids=["aligned", "graded", "label-dependent", "paired-few", "drift", "noisy", "missing+noisy"],
)
def test_the_summary_says_what_the_scenario_does(scenario: Scenario, starts: list[str]) -> None:
    samples = [replace(sample(f"{i:04d}"), label="ab"[i % 2]) for i in range(1600)]
    manifest = draw(samples, partitions.build("iid", {}), scenario, 4, 1, 0, rounds=10)
    shares = modality_shares(manifest, samples, scenario)
    lines = [line for line in shares_lines(shares) if not line.startswith("clients' samples")]
    assert len(lines) == len(starts), lines
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True)), lines
