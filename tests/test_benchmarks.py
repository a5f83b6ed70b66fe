"""The benchmark that compares implementations: all contenders reach the same losses and the same adapter."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import peers
from contenders import bare, ours, ours_cohort, published
from contenders.experiment import make_workload
from contenders.workload import Outcome, Size, Workload, average

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp

RUNS = {"a": published.run, "c": bare.run, "d": ours.run, "e": ours_cohort.run}
pytestmark = [
    # PEFT uses an old name of a property of transformers.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]


@pytest.fixture(scope="module")
def workload(tiny: Path) -> Workload:
    return make_workload(Size(rounds=2, clients=2, samples=8, questions=6, model=str(tiny)))


@pytest.fixture(scope="module")
def outcomes(workload: Workload) -> peers.Repeat:
    with torch.random.fork_rng():  # because a Trainer seeds the global generator
        return {letter: run(workload) for letter, run in RUNS.items()}


def test_contenders_do_the_same_work(workload: Workload, outcomes: peers.Repeat) -> None:
    for letter, outcome in outcomes.items():
        losses, adapters = peers.disagreement(outcome, outcomes["d"], workload.initial)
        assert losses < 1e-5, letter
        assert adapters < 1e-3, letter
        assert len(outcome.losses) == 2
        # Training moves the adapter so far that an untrained one, or one trained on other samples, would fail the test above.
        assert peers.distance(outcome.adapter, workload.initial) > 0.1
    assert peers.check([outcomes], workload.initial)
    assert [outcomes[letter].cohort for letter in "de"] == [1, 2]


def test_different_order_of_samples_is_detected(workload: Workload, outcomes: peers.Repeat) -> None:
    reversed_steps = [[list(reversed(client)) for client in clients] for clients in workload.steps]
    other = bare.run(replace(workload, steps=reversed_steps))
    assert not peers.check([{"d": outcomes["d"], "c": other}], workload.initial)


def test_different_losses_are_detected(workload: Workload, outcomes: peers.Repeat) -> None:
    first, second = outcomes["d"].losses
    assert not peers.check(
        [{"d": outcomes["d"], "c": replace(outcomes["c"], losses=[first, second * 1.002])}], workload.initial
    )


def test_workload_and_outcome_are_saved_and_loaded(workload: Workload, outcomes: peers.Repeat, tmp_path: Path) -> None:
    workload.save(tmp_path)
    copy = Workload.load(tmp_path)
    assert (copy.steps, copy.train, copy.test, copy.size) == (workload.steps, workload.train, workload.test, workload.size)
    outcomes["a"].save(tmp_path)
    loaded = Outcome.load(tmp_path)
    assert loaded.losses == outcomes["a"].losses
    assert peers.distance(loaded.adapter, outcomes["a"].adapter) == 0


def test_average_is_weighted_by_samples() -> None:
    # (1 · 1 + 2 · 4) / 3
    assert average([{"w": torch.tensor(1.0)}, {"w": torch.tensor(4.0)}], [1, 2])["w"] == pytest.approx(3.0)


def test_ratios_are_computed_within_a_repeat(outcomes: peers.Repeat, capsys: pytest.CaptureFixture[str]) -> None:
    # The ratios do not change if a whole repeat takes twice as long.
    fast = {"a": replace(outcomes["a"], train_seconds=6.0), "d": replace(outcomes["d"], train_seconds=2.0)}
    slow = {"a": replace(outcomes["a"], train_seconds=12.0), "d": replace(outcomes["d"], train_seconds=4.0)}
    assert peers.paired([fast, slow], "a", "d", peers.training) == [3.0, 3.0]
    peers.print_table([fast, slow])
    assert "3.00 × (3.00–3.00)" in capsys.readouterr().out


def test_goals_are_printed_as_reached_or_missed(outcomes: peers.Repeat, capsys: pytest.CaptureFixture[str]) -> None:
    seconds = {"a": 32.0, "c": 2.5, "d": 2.25, "e": 2.0}  # (a)/(e) 16, goal 15; (d)/(c) 0.9, goal 0.8
    peers.print_table([{letter: replace(outcomes[letter], train_seconds=t) for letter, t in seconds.items()}])
    lines = [line for line in capsys.readouterr().out.splitlines() if "training  " in line]
    of = {line.split()[0]: line for line in lines}
    assert of["(a)/(e)"].endswith("goal at least 15: reached")
    assert of["(d)/(c)"].endswith("goal at most 0.8: MISSED")
    assert "goal" not in of["(a)/(d)"]


def test_flower_does_the_same_work_without_ray(
    workload: Workload, outcomes: peers.Repeat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower's messages and FedAvg and the app of the clients, called in this process."""
    pytest.importorskip("flwr")
    from flwr.app import Context, RecordDict

    from contenders import flowertune
    from grids import DirectGrid

    def simulate(server: ServerApp, client: ClientApp, count: int, backend_config: object) -> None:
        grid = DirectGrid(client, {1 + number: {"partition-id": number} for number in range(count)})
        server(grid, Context(0, 0, {}, RecordDict(), {}))

    monkeypatch.setattr(flowertune, "run_simulation", simulate)
    threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng():
            outcome = flowertune.run(workload)
    finally:
        torch.set_num_threads(threads)
    losses, adapters = peers.disagreement(outcome, outcomes["d"], workload.initial)
    assert losses < 1e-5
    assert adapters < 1e-3


@pytest.mark.slow
def test_flower_does_the_same_work(tmp_path: Path) -> None:
    pytest.importorskip("flwr")
    pytest.importorskip("ray")
    size = ["--rounds", "2", "--clients", "2", "--samples", "8", "--questions", "8", "--repeats", "1"]
    command = [sys.executable, peers.__file__, *size, "--only", "b,d", "--json", str(tmp_path / "peers.json")]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    written = json.loads((tmp_path / "peers.json").read_text())
    assert written["repeats"][0]["b"]["startup_seconds"] > 0
    assert written["disagreement"][0]["d"][0] < 1e-4
    assert "flwr" in written["versions"]
