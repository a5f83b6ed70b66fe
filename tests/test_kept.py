"""The section of a report that says whose updates robust aggregation kept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import tomli_w
from scipy import stats

from fedmllm.report.hypotheses import answers
from fedmllm.report.hypothesis_file import read
from fedmllm.report.writeup import page, read_chapters
from made_runs import make_run

CLIENTS = [
    {"client": 0, "samples": 5, "image": 5, "text": 5},
    {"client": 1, "samples": 5, "image": 5, "text": 0},
    {"client": 2, "samples": 5, "image": 0, "text": 5},
    {"client": 3, "samples": 5, "image": 5, "text": 5, "attacker": True},
    {"client": 4, "samples": 5, "image": 5, "text": 3},
    {"client": 5, "samples": 5, "image": 0, "text": 0},
]
KEPT = [
    # (replicate, round) -> client -> the share kept; a client that was not sampled, or was refused, is not there
    [{"0": 1.0, "1": 0.4, "2": 0.5, "3": 0.0}, {"0": 0.8, "1": 0.2, "4": 1.0, "5": 0.6}],
    [{"0": 1.0, "1": 0.9, "2": 0.0, "3": 1.0, "4": 0.4}, {"1": 1.0}],
    [{"0": 1.0, "1": 0.5, "4": 1.0}],
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    cells = []
    for defence, replicates in (("plain", [[{}]] * 3), ("robust", KEPT)):
        for r, rounds in enumerate(replicates):
            name = f"{defence}-{r}"
            make_run(tmp_path / "grid" / name, {"both": 0.5 + 0.1 * r})
            result_file = tmp_path / "grid" / name / "result.json"
            result = json.loads(result_file.read_text()) | {"per_client": CLIENTS, "rounds": len(rounds)}
            result_file.write_text(json.dumps(result))
            write_rounds(tmp_path / "grid" / name, rounds)
            axes = {"attack": "sign-flip", "defence": defence}
            cells.append({"axes": axes, "seed": r, "kind": "federated", "id": name, "state": "complete"})
    index = {"schema": 1, "name": "made", "axes": ["attack", "defence"], "cells": cells}
    (tmp_path / "grid" / "sweep.json").write_text(json.dumps(index))
    return tmp_path / "grid"


def write_rounds(run: Path, rounds: list[dict[str, float]]) -> None:
    sums: Mapping[str, object] = {"sampled": [], "bytes_up": {}, "bytes_down": {}, "refused": [], "metrics": {}}
    lines = [json.dumps({"round": number, **sums, "kept": kept}) for number, kept in enumerate(rounds)]
    (run / "rounds.jsonl").write_text("\n".join(lines) + "\n")


def test_kept_shares_by_group(folder: Path) -> None:
    text = "\n".join(page([folder]).lines)
    table = text.partition("### Whose updates are kept")[2].partition("###")[0]
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]
    assert head == [
        "attack", "defence", "attackers", "paired", "image only", "text only", "mixed", "neither",
        "image only − paired", "text only − paired", "mixed − paired", "neither − paired",
    ]  # fmt: skip
    ((attack, defence, *cells),) = rows
    assert (attack, defence) == ("sign-flip", "robust"), "the plain mean keeps everything and is no row"
    assert cells[:5] == ["50 (1 of 2)", "97 (0 of 4)", "58 (2 of 5)", "25 (1 of 2)", "80 (1 of 3)"]
    assert (cells[5], cells[9]) == ("60 (0 of 1)", "-30.0"), "one replicate has no interval"
    # Replicate means: paired 0.9, 1 and 1; image only 0.3, 0.95 and 0.5; text only 0.5 and 0; mixed 1, 0.4 and 1.
    for cell, differences in zip(cells[6:9], ([-0.6, -0.05, -0.5], [-0.4, -1.0], [0.1, -0.6, 0.0]), strict=True):
        expected = stats.ttest_1samp(differences, 0)
        low, high = expected.confidence_interval()
        assert cell == f"{100 * sum(differences) / len(differences):+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def test_sweeps_that_choose_among_no_updates_have_no_such_section(folder: Path) -> None:
    for run in folder.glob("robust-*"):
        write_rounds(run, [{}, {}])
        (run / "result.json").write_text((run / "result.json").read_text().replace('"rounds": 1', '"rounds": 2'))
    assert "Whose updates are kept" not in "\n".join(page([folder]).lines)


@pytest.mark.parametrize("rule", ["robust", "plain"])
def test_a_claim_about_trimmed_updates(folder: Path, tmp_path: Path, rule: str) -> None:
    """One modality: (0.4, 0.5, 0.2), (0.9, 0, 1), 0.5; paired: (1, 0.8), 1, 1. A plain mean chooses among no updates."""
    file = tmp_path / "hypotheses.toml"
    claim = {"name": "h", "claim": "c", "source": "ours", "margin": {"made": 2.0}}
    file.write_text(tomli_w.dumps({"hypotheses": [claim | {"trimmed": {"axis": "defence", "rules": [rule]}}]}))
    (answer,) = answers(read(file), read_chapters([folder]))
    if rule == "plain":
        assert (answer.verdict, answer.notes) == ("not run", ["no replicate with the figures of all cells at all places."])
        return
    gaps = [0.9 - 1.1 / 3, 1 - 1.9 / 3, 0.5]
    assert answer.overall is not None
    assert (answer.overall.estimate, answer.overall.worst) == pytest.approx((sum(gaps) / 3, min(gaps)))
    assert (answer.overall.p, answer.overall.common) == (pytest.approx(stats.ttest_1samp(gaps, 0).pvalue), 0)
