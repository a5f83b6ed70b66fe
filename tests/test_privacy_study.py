"""The study of what privacy costs: its file, its table and its curve."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from fedmllm.experiment.sweep import plan_sweep
from privacy_curve import curve, score_of, shown, table

STUDY = Path(__file__).parents[1] / "experiments" / "studies" / "privacy.sweep.toml"
SCORES = {
    "zero-shot": {"": (75.0, 2.0)},
    "FedAvg": {"0.1": (60.0, 3.0), "1": (88.0, 2.0), "∞": (94.0, 1.0)},
    "FedSVD": {"0.1": (62.0, 3.0), "∞": (95.0, 1.0)},
}


def test_the_study_compares_methods_on_the_same_data() -> None:
    _, planned = plan_sweep(STUDY)
    replicates = {run.replicate for run in planned}
    assert len(replicates) >= 5
    for replicate in replicates:
        assert len({run.experiment.task.draw for run in planned if run.replicate == replicate}) == 1
    private = [run for run in planned if run.kind == "federated"]
    assert {run.experiment.algorithm.name for run in private} == {"fedavg", "ffa-lora", "fedsvd"}
    assert {run.experiment.partition.clients for run in private} == {1000}
    for run in private:
        name, options = run.axes["method"], run.experiment.privacy.options
        assert run.experiment.privacy.name == "user-level"
        assert options["delta"] < 1 / 1000
        epsilon = name.partition(", ε = ")[2]
        assert (options.get("noise") == 0) if epsilon == "∞" else (options["epsilon"] == float(epsilon))


def test_a_score_has_students_interval() -> None:
    # s = 0.1, t₀.₉₇₅(2) = 4.3027
    assert score_of([0.7, 0.8, 0.9]) == pytest.approx((80.0, 100 * 4.3027 * 0.1 / 3**0.5), rel=1e-4)
    assert shown((80.0, 2.5)) == "80.0 [77.5, 82.5]"
    assert shown(None) == "–"


def test_the_table_has_a_row_a_method_and_a_column_an_epsilon() -> None:
    assert table(SCORES).splitlines() == [
        "| method | ε = 0.1 | ε = 1 | ε = ∞ |",
        "|---|---|---|---|",
        "| zero-shot | 75.0 [73.0, 77.0] | 75.0 [73.0, 77.0] | 75.0 [73.0, 77.0] |",
        "| FedAvg | 60.0 [57.0, 63.0] | 88.0 [86.0, 90.0] | 94.0 [93.0, 95.0] |",
        "| FedSVD | 62.0 [59.0, 65.0] | – | 95.0 [94.0, 96.0] |",
    ]


def test_the_curve_falls_from_right_to_left() -> None:
    picture = ET.fromstring(curve("a <title>", SCORES))
    tag = "{http://www.w3.org/2000/svg}"
    lines = [
        [tuple(map(float, p.split(","))) for p in line.get("points", "").split()] for line in picture.iter(f"{tag}polyline")
    ]
    assert [len(points) for points in lines] == [3, 2]
    for points in lines:
        assert [x for x, _ in points] == sorted(x for x, _ in points), "ε grows to the right"
        assert [y for _, y in points] == sorted((y for _, y in points), reverse=True), "a higher score is higher up"
    texts = [element.text for element in picture.iter(f"{tag}text")]
    assert {"a <title>", "0.1", "1", "∞", "FedAvg", "FedSVD", "zero-shot"} <= set(texts)
