"""What trackers are told: the same while a run goes on and afterwards, and nothing that the run depends on."""

from __future__ import annotations

import json
import math
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest

import fedmllm
from commands import call
from fedmllm import config
from fedmllm.config import TrackTable
from fedmllm.config import track as track_table
from fedmllm.errors import RunError
from fedmllm.runs import tracking
from fedmllm.storage.run_dir import RunDir
from made_runs import make_run

pytest.importorskip("accelerate")
pytest.importorskip("tensorboard")
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

Write = Callable[..., Path]


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """{tag: {step: value}} of TensorBoard's event files. Fails if a step was written twice."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    curves = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert all(len(dict(points)) == len(points) for points in curves.values())
    return {tag: dict(points) for tag, points in curves.items()}


def expected(run: RunDir) -> dict[str, dict[int, float]]:
    """What `scalars` should be, from the run's files: told step by step, without the mapping of the package."""
    curves: dict[str, dict[int, float]] = {}

    def tell(step: int, tag: str, value: Any) -> None:
        if value is not None and math.isfinite(value):
            curves.setdefault(tag, {})[step] = pytest.approx(value, rel=1e-6)

    for record in run.rounds():
        step = record["round"] + 1
        for key in ("loss", "lr", "examples", "steps", "padding", "seconds"):
            tell(step, f"train/{key}", record[key])
        tell(step, "clients/sampled", len(record["sampled"]))
        tell(step, "clients/refused", len(record["refused"]))
        tell(step, "bytes/up", sum(record["bytes_up"].values()))
        tell(step, "bytes/down", sum(record["bytes_down"].values()))
        for pattern, metrics in record["metrics"].items():
            tell_metrics(tell, step, f"eval/{pattern}", metrics)
    if run.complete:
        result = run.result()
        step = result["rounds"]
        for pattern, metrics in result["metrics"].items():
            tell_metrics(tell, step, f"final/{pattern}", metrics)
        for key, value in result["clients"].items():
            tell(step, f"clients/{key}", value)
        for key in ("bytes_up", "bytes_down"):
            tell(step, f"total/{key}", sum(result[key].values()))
        for key, value in result["seconds"].items():
            tell(step, f"total/seconds/{key}", value)
        for key in ("rounds", "refused_updates", "peak_memory_mb"):
            tell(step, f"total/{key}", result[key])
    return curves


def tell_metrics(tell: Callable[[int, str, Any], None], step: int, prefix: str, metrics: dict[str, Any]) -> None:
    for name, value in metrics.items():
        if name.endswith("_ci"):
            tell(step, f"{prefix}/{name}_low", value[0])
            tell(step, f"{prefix}/{name}_high", value[1])
        else:
            tell(step, f"{prefix}/{name}", value)


class FakeTracker:
    """A tracker of Accelerate that remembers what it was told, and raises in the method `breaks`."""

    breaks = ""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.arguments, self.options, self.calls = arguments, options, list[tuple[Any, ...]]()
        FAKES.append(self)

    def _note(self, method: str, *told: Any) -> None:
        print("what a tracker prints")
        self.calls.append((method, *told))
        if method == self.breaks:
            raise ConnectionError("no route\nto host")

    def start(self) -> None:
        self._note("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._note("configuration", values)

    def log(self, values: dict[str, Any], step: int) -> None:
        self._note("log", step, values)

    def finish(self) -> None:
        self._note("finish")


FAKES: list[FakeTracker] = []


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that puts the fake, which breaks in a method, in the place of wandb."""
    FAKES.clear()
    monkeypatch.setattr(track_table, "find_spec", lambda name: True)

    def install(breaks: str = "") -> None:
        monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", type("Fake", (FakeTracker,), {"breaks": breaks}))

    return install


def test_a_run_is_tracked_resumed_and_replayed(
    write_experiment: Write, tmp_path: Path, fake: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """One run with two trackers, of which one fails, is interrupted after its first round; the result is that of a run without
    any."""
    fake("log")
    file = write_experiment("every = 1\n", rounds=2)
    plain = fedmllm.run(fedmllm.load(file), out=tmp_path / "plain")
    experiment = fedmllm.load(file, track={"with": ["tensorboard", "wandb"]})
    notes: list[str] = []

    def interrupt(stage: str, done: int, total: int, note: str) -> None:
        notes.append(f"{stage}: {note}")
        if stage == "rounds" and done == 1 and note != "resumed":
            raise KeyboardInterrupt

    run = RunDir(tmp_path / "tracked")
    with pytest.raises(KeyboardInterrupt):
        fedmllm.run(experiment, out=run.path, progress=interrupt)
    failed = (
        f"note: wandb failed (ConnectionError: no route to host); the run goes on without it, and `fedmllm track {run.path} "
    )
    assert [note.startswith(failed) for note in notes if "wandb" in note] == [True], "it is said once"
    assert scalars(run.path / "tensorboard") == expected(run), "the first round"
    assert [call[0] for call in FAKES[0].calls] == ["start", "configuration", "log"]
    result = fedmllm.run(experiment, out=run.path, resume=True)
    assert result.json["adapter_sha256"] == plain.json["adapter_sha256"]
    assert result.json["metrics"] == plain.json["metrics"]
    assert result.json["config_digest"] == plain.json["config_digest"]
    assert (run.path / "config.toml").read_text() == (tmp_path / "plain" / "config.toml").read_text()
    told = scalars(run.path / "tensorboard-2")
    assert told == expected(run), "a resumed run is told from its beginning, in a folder of its own"
    assert told["eval/image/accuracy"].keys() == {1}, "the last round is scored by the final test"
    assert call("track", run.path, "--folder", tmp_path / "board").exit_code == 0
    assert scalars(tmp_path / "board" / "tracked") == told
    assert "what a tracker prints" not in capsys.readouterr().out


@pytest.mark.parametrize("breaks", ["start", "configuration", "log", "finish"])
def test_a_tracker_that_fails_is_told_nothing_more(tmp_path: Path, fake: Callable[..., None], breaks: str) -> None:
    fake(breaks)
    run = made(tmp_path)
    failures = []
    told = tracking.Tracking(TrackTable(**{"with": "wandb"}), lambda name, reason: failures.append((name, reason)))
    with told.following(run):
        told.round(RECORD)
        told.round({**RECORD, "round": 1})
        told.end(run.result())
    assert failures == [("wandb", "ConnectionError: no route to host")]
    assert [made[0] for made in FAKES[0].calls].count(breaks) == 1
    assert FAKES[0].calls[-1][0] == breaks
    fake(breaks)
    with pytest.raises(RunError, match=r"wandb failed \(ConnectionError: no route to host\); see to what the tracker needs"):
        tracking.replay(run, TrackTable(**{"with": "wandb"}))


RECORD = {
    "round": 0, "lr": 0.1, "sampled": [3, 1], "refused": [{"client": 1, "why": "NaN"}], "loss": math.nan, "examples": 5,
    "bytes_up": {"adapter": 7, "control": 5}, "bytes_down": {"adapter": 2}, "privacy": {"epsilon": 1.5},
    "clock": {"began": 2.0, "seconds": 3.5, "clients": {"3": 3.5}}, "kept": {"3": 0.5}, "stopped": False,
    "metrics": {"both": {"accuracy": 0.5, "accuracy_ci": [0.25, math.nan], "n": 4}},
}  # fmt: skip


def made(folder: Path) -> RunDir:
    make_run(folder / "run", {"both": 0.5}, config={"name": "made", "eval": {"patterns": ["both", "text"]}, "lists": [0.5]})
    return RunDir(folder / "run")


def test_a_round_and_a_result_as_figures() -> None:
    assert tracking.figures_of_round(RECORD) == {
        "train/lr": 0.1, "train/examples": 5, "clients/sampled": 2, "clients/refused": 1, "bytes/up": 12, "bytes/down": 2,
        "privacy/epsilon": 1.5, "simulated/seconds": 5.5, "eval/both/accuracy": 0.5, "eval/both/accuracy_ci_low": 0.25,
        "eval/both/n": 4,
    }  # fmt: skip
    result = {
        "metrics": {"text": {"auc": 0.75, "auc_ci": [0.5, 1.0]}}, "transfer": {"qa": {"metrics": {"both": {"accuracy": 1}}}},
        "clients": {"n": 2, "sd": 0.1, "mean": None}, "privacy_spent": {"epsilon": 3.0, "delta": 0.1}, "bytes_up": {"a": 1},
        "seconds": {"total": 4}, "rounds": 6, "simulated_seconds": None, "name": "x", "stopped_early": True,
        "per_client": [{"client": 0, "score": 0.9}], "asks": {"question": "who has the disease?"}, "suites": {"s": {"n": 1}},
    }  # fmt: skip
    assert tracking.figures_of_result(result) == {
        "final/text/auc": 0.75, "final/text/auc_ci_low": 0.5, "final/text/auc_ci_high": 1.0, "transfer/qa/both/accuracy": 1,
        "clients/n": 2, "clients/sd": 0.1, "total/bytes_up": 1, "total/bytes_down": 0, "total/seconds/total": 4,
        "total/epsilon": 3.0, "total/rounds": 6,
    }, "no single client, no text, no suite"  # fmt: skip


def test_all_settings_are_hyper_parameters(tmp_path: Path, fake: Callable[..., None]) -> None:
    fake()
    run = made(tmp_path)
    assert (
        tracking.replay(run, TrackTable(**{"with": "wandb", "project": "mine", "options": {"wandb": {"mode": "offline"}}})) == 0
    )
    assert FAKES[0].arguments == ("mine",)
    assert FAKES[0].options == {"name": "run", "mode": "offline"}
    assert [entry[0] for entry in FAKES[0].calls] == ["start", "configuration", "log", "finish"]
    parameters = FAKES[0].calls[1][1]
    assert {"run": "run", "kind": "federated", "partition.clients": 10}.items() <= parameters.items()
    assert (parameters["eval.patterns"], parameters["lists"]) == ('["both", "text"]', "[0.5]")
    assert FAKES[0].calls[2][1] == 2, "the result is logged at its last round"


@pytest.mark.parametrize(
    ("name", "begins", "arguments"),
    [
        ("wandb", "init", {"project": "made", "name": "run", "tags": ["a"]}),
        ("trackio", "init", {"project": "made", "name": "run", "tags": ["a"]}),
        ("swanlab", "init", {"project": "made", "experiment_name": "run", "tags": ["a"]}),
        ("comet_ml", "start", {"project_name": "made", "tags": ["a"]}),
        ("mlflow", "start_run", {"run_name": "run", "tags": ["a"]}),
        ("aim", "Run", {"experiment": "made", "tags": ["a"]}),
        ("clearml", "Task.init", {"project_name": "made", "task_name": "run", "tags": ["a"]}),
        ("dvclive", "Live", {"dir": "{run}/dvclive", "tags": ["a"]}),
    ],
)
def test_every_tracker_of_accelerate_can_be_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, begins: str, arguments: dict[str, Any]
) -> None:
    """The classes are Accelerate's; the libraries behind them are stand-ins that accept anything."""
    library = MagicMock(__version__="4.0")
    library.Task.current_task.return_value = None
    library.utils.validation = MagicMock(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100)
    monkeypatch.setitem(sys.modules, name, library)
    monkeypatch.setitem(sys.modules, "dvclive.plots", MagicMock(spec=ModuleType, Metric=MagicMock()))
    tracking.replay(made(tmp_path), TrackTable(**{"with": name, "options": {name: {"tags": ["a"]}}}))
    function = library
    for part in begins.split("."):
        function = getattr(function, part)
    values = {key: value.format(run=tmp_path / "run") if key == "dir" else value for key, value in arguments.items()}
    assert values.items() <= function.call_args.kwargs.items()
    assert "0.5" in str(library.mock_calls), "the accuracy"


def test_which_trackers_there_are() -> None:
    from typing import get_args

    from fedmllm.kinds import TrackerName

    assert set(get_args(TrackerName)) == LOGGER_TYPE_TO_CLASS.keys()


# The table


def test_what_is_not_installed_is_one_sentence(write_experiment: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    file, absent = write_experiment(), {"comet_ml"}
    monkeypatch.setattr(track_table, "find_spec", lambda name: None if name in absent else True)
    done = call("check", file, "--set", 'track.with=["tensorboard", "comet_ml"]')
    assert done.exit_code == 2
    assert "track.with: 'comet_ml' needs comet_ml, which is not installed; run pip install comet-ml." in done.stderr
    absent.add("tensorboard")
    done = call("run", file, "--set", "track.with=tensorboard")
    assert (done.exit_code, 'run pip install "fedmllm[track]".' in done.stderr) == (2, True)
    absent.add("accelerate")
    done = call("track", "x", "--with", "mlflow")
    assert "'mlflow' needs accelerate, which is not installed; run pip install \"fedmllm[track]\"." in done.stderr


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("track.with=tensorbord", "track.with.0: input should be 'aim', 'clearml',"),
        ('track.with=["wandb", "wandb"]', "track.with: must name each tracker once"),
        ("track.wth=wandb", "track.wth: unknown key; did you mean 'with'?"),
        ("track.project=a/b", "track.project: must be usable as a folder's name"),
        ("track.options.wand.entity=x", "track.options.wand"),
    ],
)
def test_a_wrong_table_is_one_sentence(write_experiment: Write, setting: str, message: str) -> None:
    done = call("check", write_experiment(), "--set", setting)
    assert (done.exit_code, message in done.stderr) == (2, True), done.stderr


def test_a_replay_needs_a_run(tmp_path: Path) -> None:
    done = call("track", tmp_path)
    assert (done.exit_code, done.stderr) == (2, f"error: {tmp_path} is not a run directory.\n")
    assert "--with" in call("track", "--help").stdout
    assert "track.with.0: input should be" in call("track", tmp_path, "--with", "tensorbord").stderr


def test_an_unfinished_run_is_told_as_far_as_it_is(tmp_path: Path) -> None:
    run = made(tmp_path)
    (run.path / "meta.json").write_text(json.dumps({"kind": "local"}))
    (run.path / "rounds.jsonl").write_text(json.dumps({**RECORD, "loss": 0.5}).replace("NaN]", "0.5]") + "\n{cut")
    (run.path / "result.json").unlink()
    assert tracking.replay(run, TrackTable(**{"with": "tensorboard"})) == 1
    curves = scalars(run.path / "tensorboard")
    assert curves["train/loss"] == {1: 0.5}
    assert not any(tag.startswith("final/") for tag in curves)


def test_a_run_of_another_shape_is_one_sentence(tmp_path: Path) -> None:
    run = made(tmp_path)
    (run.path / "rounds.jsonl").write_text("".join(json.dumps({"round": n, "sampled": 5}) + "\n" for n in range(2)))
    with pytest.raises(RunError, match=r"run: a file is not as a run writes it \(TypeError: "):
        tracking.replay(run, TrackTable(**{"with": "tensorboard"}))


def test_the_table_is_no_part_of_the_experiment(tmp_path: Path) -> None:
    """Neither of what identifies it, nor of what a site is sent or would use; the processes that execute a run do get it."""
    from fedmllm.remote.serverapp import experiment_for_sites
    from fedmllm.remote.site import parts_at

    tables = {"task": {"name": "easy-vqa"}, "track": {"with": ["tensorboard"], "options": {"wandb": {"entity": "secret"}}}}
    plain, tracked = config.validate({"task": tables["task"]}), config.validate(tables)
    assert tracked.digest() == plain.digest()
    assert "track" not in tracked.toml()
    assert "track" not in experiment_for_sites(tracked)
    whole = tracked.toml(track=True)
    assert "secret" in whole
    assert config.validate(tomllib.loads(whole)) == tracked
    assert parts_at(whole, None).config.track == TrackTable()
