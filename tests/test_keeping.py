"""Which model a run ends with, what early stopping cuts off, and that neither depends on an interruption."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from commands import call, run
from fedmllm.algorithms.asynchronous import asynchronies
from fedmllm.algorithms.toy_federation import ToyFleet
from fedmllm.config import TrainTable
from fedmllm.federation import FederationPlan
from fedmllm.fleets.base import FleetBackend
from fedmllm.report.convergence import curve
from fedmllm.runs.evaluator import Evaluator
from fedmllm.runs.keeping import Keeping, best_round, kept_rounds
from fedmllm.runs.rounds import Run, train_rounds
from fedmllm.simulation.clock import Simulation
from fedmllm.simulation.devices import Device
from fedmllm.storage.run_dir import RunDir
from fedmllm.tensors import State
from helpers import ADAPTER_INFO, built, lora_adapter, quick, same

Write = Callable[..., Path]
SCORED = 'every = 1\nevery_split = "validation"\nvalidation_share = 0.2\n'


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def setting(*values: str) -> list[str]:
    return [word for value in values for word in ("--set", value)]


class Trained:
    """A federation of toy clients whose rounds get these scores. `before` is the evaluation before which the process ends.

    `state` is None if it ended so.
    """

    def __init__(
        self,
        path: Path,
        scores: Sequence[float],
        algorithm: str = "fedavg",
        before: int | None = None,
        plan: FederationPlan | None = None,
        **train: Any,
    ) -> None:
        made, self.notes, self.asked = built(algorithm), list[str](), 0
        self.state: State | None = None
        table = TrainTable(schedule="constant", rounds=6, clients_per_round=3, **train)
        plan = plan or FederationPlan.of(table, range(8), 0, ADAPTER_INFO)

        def score_round(states: Sequence[State]) -> dict[str, dict[str, float]]:
            if self.asked == before:
                raise KeyboardInterrupt
            self.asked += 1
            return {"both": {"accuracy": scores[self.asked - 1]}}

        def progress(stage: str, done: int, total: int, note: str) -> None:
            self.notes += [note] if stage == "note" else []

        config = SimpleNamespace(train=table, digest=lambda: "d", train_of=lambda client: table)
        session = SimpleNamespace(
            config=config, model=None, initial=lora_adapter(), gaps={}, parts=SimpleNamespace(secure=None, attack=None),
            progress=progress,
        )  # fmt: skip
        evaluator = SimpleNamespace(
            scores=lambda done, rounds: True, score_round=score_round, metric="accuracy",
            score=lambda metrics: metrics["both"]["accuracy"],
        )  # fmt: skip
        self.directory = RunDir(path)
        self.directory.begin("", {})
        backend = FleetBackend(lambda context: ToyFleet(made))
        parts: Any = ("federated", session, self.directory, backend, evaluator)
        with suppress(KeyboardInterrupt):
            clients: Any = SimpleNamespace(changing=None)
            self.state, self.records = train_rounds(Run(*parts), made, clients, plan, "rounds")
        self.directory.rounds()  # which waits until the checkpoint is written, as the end of a process does

    @property
    def model(self) -> State:
        assert self.state is not None
        return {group: self.state[group] for group in ("adapter", "fold") if group in self.state}

    @property
    def scores(self) -> list[float]:
        return [record["metrics"]["both"]["accuracy"] for record in self.records]


# The rule


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([0.1, 0.2, 0.3], 2), ([0.3, 0.2, 0.1], 0), ([0.1, 0.3, 0.3], 1), ([0.0], 0),
        ([math.nan, 0.0, 0.1], 2), ([0.2, math.nan], 0), ([math.nan, math.nan], 0),
    ],
)  # fmt: skip
def test_the_best_round_is_the_first_with_the_highest_score(scores: list[float], best: int) -> None:
    assert best_round(dict(enumerate(scores))) == best


@pytest.mark.parametrize(
    ("train", "rounds"),
    [
        ({}, [3]), ({"keep": "best"}, [1]), ({"keep": "mean"}, [0, 1, 2, 3]), ({"keep": "mean", "mean_of": 2}, [2, 3]),
        ({"keep": "mean", "mean_of": 1}, [3]), ({"keep": "mean", "mean_of": 100}, [0, 1, 2, 3]),
    ],
)  # fmt: skip
def test_which_rounds_are_kept(train: dict[str, Any], rounds: list[int]) -> None:
    records = [
        {"round": number, "metrics": {"both": {"x": score}} if score else {}} for number, score in enumerate((0.1, 0.9, 0, 0.5))
    ]
    assert kept_rounds(TrainTable(**train), records, lambda metrics: float(metrics["both"]["x"])) == rounds
    assert kept_rounds(TrainTable(**train), [], lambda metrics: 0.0) == []


def state_after(number: int) -> State:
    adapter = {"a": torch.tensor([float(number), 1.0 / (number + 3)]), "b": torch.full((2, 2), 0.1 * number)}
    return {"adapter": adapter, "fold": {"w": torch.tensor([number])}, "m": {"a": torch.tensor([-1.0 * number])}}


@quick
@given(
    st.lists(st.one_of(st.none(), st.sampled_from([0.0, 0.25, 0.5, math.nan])), min_size=1, max_size=9),
    st.sampled_from(["last", "best", "mean"]), st.integers(1, 4), st.one_of(st.none(), st.integers(1, 3)), st.data(),
)  # fmt: skip
def test_what_is_kept_and_when_to_stop(
    scores: list[float | None], keep: Any, count: int, patience: int | None, data: st.DataObject
) -> None:
    """Against the definition, and whatever round an interruption comes after."""
    if keep == "best":
        scores = [0.25, *scores]
    train, planned = TrainTable(keep=keep, mean_of=count, patience=patience), len(scores)
    interrupted = data.draw(st.sets(st.integers(0, planned - 1)))
    keeping, done = Keeping(train, planned, {}, {}), 0
    for number, score in enumerate(scores):
        keeping.add(number, score, state_after(number))
        done = number + 1
        if number in interrupted:
            saved = {**state_after(number), **keeping.groups}
            keeping, state = Keeping.resumed(train, planned, dict(keeping.scores), saved)
            assert same(state, state_after(number))
        evaluated = [-1.0 if math.isnan(score) else score for score in scores[:done] if score is not None]
        since = len(evaluated) - 1 - evaluated.index(max(evaluated)) if evaluated else 0
        assert keeping.exhausted == (patience is not None and since >= patience)
        if keeping.exhausted:
            break
    kept, last = keeping.model(state_after(done - 1)), state_after(done - 1)
    assert torch.equal(kept["m"]["a"], last["m"]["a"])
    if keep == "last":
        assert same(kept, last)
    if keep == "best":
        _, before = max((-1.0 if math.isnan(s) else s, -n) for n, s in enumerate(scores[:done]) if s is not None)
        assert same(kept, {**last, **{group: state_after(-before)[group] for group in ("adapter", "fold")}})
    if keep == "mean":
        window = [state_after(number)["adapter"] for number in range(max(0, done - count), done)]
        for name, tensor in kept["adapter"].items():
            mean = torch.stack([adapter[name].double() for adapter in window]).mean(0).float()
            assert torch.equal(tensor, mean) if len(window) == 1 else torch.allclose(tensor, mean, rtol=1e-6, atol=0)


def test_models_that_cannot_be_among_the_last_are_not_saved() -> None:
    keeping = Keeping(TrainTable(keep="mean", mean_of=2), 5, {}, {})
    for number in range(5):
        keeping.add(number, None, state_after(number))
        assert list(keeping.models) == [n for n in (3, 4) if n <= number]


# Federations of toy clients

STATELESS = ["fedavg", "fedadam", "rolora", "fedex-lora", "flora"]
RISING = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]


@pytest.mark.parametrize("algorithm", STATELESS)
def test_the_last_round_is_the_best(tmp_path: Path, algorithm: str) -> None:
    last = Trained(tmp_path / "last", RISING, algorithm)
    best = Trained(tmp_path / "best", RISING, algorithm, keep="best", patience=6)
    assert same(best.model, last.model)
    assert best.scores == last.scores == RISING
    assert best.notes == []


@pytest.mark.parametrize("algorithm", [*STATELESS, "scaffold"])
def test_the_best_round_is_the_last_of_a_shorter_run(tmp_path: Path, algorithm: str) -> None:
    best = Trained(tmp_path / "best", [0.1, 0.3, 0.2, 0.3, 0.2, 0.1], algorithm, keep="best")
    plan = FederationPlan.of(TrainTable(schedule="constant", rounds=2, clients_per_round=3), range(8), 0, ADAPTER_INFO)
    assert same(best.model, Trained(tmp_path / "shorter", RISING, algorithm, plan=plan).model)
    assert len(best.records) == 6


def test_patience_ends_a_run(tmp_path: Path) -> None:
    stopped = Trained(tmp_path / "stopped", [0.1, 0.3, 0.2, 0.3, 0.4], patience=2)
    assert stopped.notes == ["stopped after 4 of 6 rounds: 2 evaluations have not improved on 30.0 % after round 2"]
    assert [record["stopped"] for record in stopped.records] == [False, False, False, True]
    plan = FederationPlan.of(TrainTable(schedule="constant", rounds=4, clients_per_round=3), range(8), 0, ADAPTER_INFO)
    assert same(stopped.model, Trained(tmp_path / "shorter", RISING, plan=plan).model)
    at_the_end = Trained(tmp_path / "end", [0.1, 0.2, 0.3, 0.4, 0.3, 0.2], patience=2)
    assert (at_the_end.notes, at_the_end.records[-1]["stopped"]) == ([], False), "no round would have followed anyway"


def test_the_mean_of_one_is_the_last_and_of_more_their_mean(tmp_path: Path) -> None:
    each = []
    for rounds in (4, 5, 6):
        plan = FederationPlan.of(TrainTable(schedule="constant", rounds=rounds, clients_per_round=3), range(8), 0, ADAPTER_INFO)
        each.append(Trained(tmp_path / str(rounds), RISING, plan=plan).model["adapter"])
    assert same(Trained(tmp_path / "one", RISING, keep="mean", mean_of=1).model, {"adapter": each[-1]})
    kept = Trained(tmp_path / "three", RISING, keep="mean", mean_of=3).model["adapter"]
    for name, tensor in kept.items():
        torch.testing.assert_close(tensor, torch.stack([adapter[name] for adapter in each]).mean(0), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("algorithm", "train"),
    [
        ("fedavg", {"keep": "best"}), ("fedex-lora", {"keep": "best"}), ("asynchronous", {"keep": "best"}),
        ("rolora", {"keep": "mean", "mean_of": 3}), ("asynchronous", {"keep": "mean", "mean_of": 3}),
    ],
)  # fmt: skip
def test_interrupted_after_any_round_and_resumed(tmp_path: Path, algorithm: str, train: dict[str, Any]) -> None:
    scores, name = [0.1, 0.4, 0.3, 0.2], "fedavg" if algorithm == "asynchronous" else algorithm
    plan = FederationPlan.of(TrainTable(schedule="constant", rounds=6, clients_per_round=3), range(8), 0, ADAPTER_INFO)
    if algorithm == "asynchronous":
        devices = [Device(speed=1.0), Device(speed=3.0)]
        clock = Simulation(0, [devices[client % 2] for client in range(8)], [10] * 8)
        plan = replace(plan, asynchronous=asynchronies.build("fedbuff", {"buffer": 2}), simulation=clock)
    whole = Trained(tmp_path / "whole", scores, name, plan=plan, patience=2, **train)
    assert len(whole.records) == 4
    for before in range(4):
        path = tmp_path / f"part-{before}"
        assert Trained(path, scores, name, before=before, plan=plan, patience=2, **train).state is None
        resumed = Trained(path, scores[before:], name, plan=plan, patience=2, **train)
        assert whole.state is not None
        assert resumed.state is not None
        assert same(resumed.state, whole.state)
        assert [{**r, "seconds": 0} for r in resumed.records] == [{**r, "seconds": 0} for r in whole.records]
    again = Trained(tmp_path / "whole", [], name, plan=plan, patience=2, **train)
    assert again.asked == 0, "no further round after the stop"
    assert same(again.model, whole.model)


# Whole runs


def test_a_run_exports_and_reports_the_model_that_is_kept(write_experiment: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    file, score_round, scores = (
        write_experiment(SCORED + "every_samples = 4\n", rounds=9),
        Evaluator.score_round,
        iter(RISING[::-1]),
    )

    def falling(self: Evaluator, states: Sequence[State]) -> dict[str, dict[str, Any]]:
        metrics = score_round(self, states)
        assert metrics["both"]["n"] == 4
        return metrics | {"both": metrics["both"] | {"accuracy": next(scores)}}

    monkeypatch.setattr(Evaluator, "score_round", falling)
    options = [*setting("train.keep=best", "train.patience=2", "train.schedule=constant"), "--out"]
    result = run("run", file, *options, "best")
    assert (result["keep"], result["kept_rounds"], result["stopped_early"], result["rounds"]) == ("best", [0], True, 3)
    assert result["metrics"]["both"]["n"] == 12
    assert [point.score for point in curve(RunDir(Path("best")))] == RISING[:2:-1], "the test is no point of that curve"
    monkeypatch.setattr(Evaluator, "score_round", score_round)
    shorter = run("run", file, *options, "shorter", *setting("train.rounds=1"))
    for key in ("adapter_sha256", "metrics", "kept_rounds", "test_digest"):
        assert result[key] == shorter[key], key
    assert run("eval", "best", "--trust-config")["metrics"] == result["metrics"]


def test_the_other_kinds(write_experiment: Write) -> None:
    file, options = write_experiment(SCORED), [*setting("train.keep=best", "train.patience=1"), "--out"]
    pooled = run("baseline", "centralised", file, *options, "pooled")
    assert pooled["kept_rounds"] == [0]
    assert run("baseline", "zero-shot", file, *options, "untrained")["kept_rounds"] == []
    refused = call("baseline", "local", file, *options, "alone")
    assert refused.exit_code == 2
    assert "clients that train alone are tested at the end only" in " ".join(refused.stderr.split())
    assert not Path("alone").exists()
