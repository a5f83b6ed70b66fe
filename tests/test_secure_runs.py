"""Secure aggregation in whole runs: the same model, the bytes that are sent, refusals, and sites that answer a server."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from commands import call, run
from fedmllm import config as files
from fedmllm.algorithms import RoundInfo, Update
from fedmllm.config import Experiment, Named
from fedmllm.errors import ConfigError
from fedmllm.experiment.parts import build, with_defaults
from fedmllm.experiment.sweep import essential
from fedmllm.federation import TooFewUpdates
from fedmllm.fleets.base import FleetBackend, FleetContext
from fedmllm.fleets.inprocess import IN_PROCESS
from fedmllm.remote.files import SiteData
from fedmllm.remote.protocol import Job, JobKind, Reply, parts_of, to_bytes
from fedmllm.remote.worker import Worker
from fedmllm.runs.kinds import execute
from fedmllm.runs.session import Session
from fedmllm.secure.settings import Phase
from fedmllm.storage.run_dir import RunDir
from fedmllm.tensors import State, Tensors

SECURE = '[secure]\nname = "pairwise"\n'
Write = Callable[..., Path]


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def largest_difference(a: Tensors, b: Tensors) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.fixture
def plain(write_experiment: Write, tmp_path: Path) -> tuple[dict[str, Any], Path]:
    return run("run", write_experiment(name="plain"), "--out", tmp_path / "plain"), tmp_path / "plain"


def test_a_secure_run_gives_the_same_model(plain: tuple[dict[str, Any], Path], write_experiment: Write, tmp_path: Path) -> None:
    hidden = run("run", write_experiment(SECURE, name="hidden"), "--out", tmp_path / "hidden")
    assert largest_difference(adapter_of(plain[1]), adapter_of(tmp_path / "hidden")) < 1e-4
    assert hidden["secure"] == "pairwise"
    assert plain[0]["secure"] == "none"
    assert hidden["refused_updates"] == 0
    numbers = sum(t.numel() for t in adapter_of(plain[1]).values())
    updates = 3 * 2
    assert hidden["bytes_up"]["masked"] == updates * (4 * numbers + 40)
    assert plain[0]["bytes_up"] == {"adapter": updates * 4 * numbers}
    assert hidden["bytes_down"]["adapter"] == plain[0]["bytes_down"]["adapter"]
    overhead = sum(hidden["bytes_up"].values()) - hidden["bytes_up"]["masked"]
    assert overhead == updates * (32 + 32 + 16 + 48 + 2 * 16), "keys, one sealed pair of shares, two shares to unmask"
    assert hidden["per_client"] == plain[0]["per_client"], "the manifest of a simulation is not secret"
    records = [RunDir(folder).rounds() for folder in (plain[1], tmp_path / "hidden")]
    for open_record, hidden_record in zip(*records, strict=True):
        for key in ("examples", "steps", "sampled"):
            assert open_record[key] == hidden_record[key]
        assert open_record["loss"] == pytest.approx(hidden_record["loss"], abs=1e-3)


def test_fewer_bits_mean_fewer_bytes_and_a_coarser_mean(write_experiment: Write, tmp_path: Path) -> None:
    plain = run("run", write_experiment(rounds=1, name="plain"), "--out", tmp_path / "plain")
    for bits, bound in ((16, 2e-2), (64, 2e-6)):
        options = f"{SECURE}bits = {bits}\nmax_examples = 40\nclip = 0.1\n"
        path, out = write_experiment(options, rounds=1, name=f"bits-{bits}"), tmp_path / f"bits-{bits}"
        hidden = run("run", path, "--out", out)
        assert largest_difference(adapter_of(tmp_path / "plain"), adapter_of(out)) < bound
        assert hidden["bytes_up"]["masked"] == plain["bytes_up"]["adapter"] * bits // 32 + 2 * 40


def test_an_interrupted_secure_run_continues(write_experiment: Write, tmp_path: Path) -> None:
    extra = '[algorithm]\nname = "scaffold"\n' + SECURE
    whole = run("run", write_experiment(extra), "--out", tmp_path / "whole")
    path = write_experiment(extra)
    parts = build(files.validate(files.read(path)))
    directory = RunDir(tmp_path / "interrupted")

    def interrupt(stage: str, done: int, total: int, note: str) -> None:
        if stage == "rounds" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute("federated", Session(parts, parts.prepare(), interrupt), directory)
    resumed = run("run", path, "--out", directory.path, "--resume")
    assert resumed["rounds"] == whole["rounds"] == 3
    assert largest_difference(adapter_of(tmp_path / "whole"), adapter_of(directory.path)) < 1e-6


REFUSED = [
    ({"algorithm.name": "flora"}, "'pairwise' shows the server only the mean of the updates, and algorithm.name = 'flora'"),
    ({"algorithm.name": "flexlora"}, "works on single updates; choose one of fed"),
    ({"algorithm.name": "fednova"}, "algorithm.name = 'fednova' works on single updates"),
    ({"algorithm.name": "fedsa-lora"}, "sends every client's own adapter to be tested"),
    ({"compression.name": "top-k"}, "compression.name = 'top-k' produces updates that must be unpacked one by one"),
    ({"compression.name": "int8"}, "compression.name = 'int8' produces updates that must be unpacked one by one"),
    ({"train.clients_per_round": 1}, "the mean of one update is that update; set train.clients_per_round to at least 2"),
    ({"secure.threshold": 0.2}, "secure: threshold = 0.2 must be at least 0.5"),
    ({"secure.bits": 8}, "secure.bits: input should be 16, 32 or 64"),
    ({"secure.name": "pairwice"}, "secure.name: there is no secure 'pairwice'; did you mean 'pairwise'?"),
    ({"secure.clips": 2.0}, "secure.clips: unknown key for secure 'pairwise'; did you mean 'clip'?"),
]  # fmt: skip


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize(("settings", "reason"), REFUSED, ids=[str(settings) for settings, _ in REFUSED])
def test_what_needs_single_updates_is_refused(
    settings: dict[str, object], reason: str, command: str, write_experiment: Write
) -> None:
    overrides = [argument for key, value in settings.items() for argument in ("--set", f"{key}={value}")]
    completed = call(command, write_experiment(SECURE), *overrides)
    assert completed.exit_code == 2
    assert reason in " ".join(completed.output.split())


def test_metrics_of_single_sites_are_refused(write_experiment: Write) -> None:
    completed = call("check", write_experiment(SECURE + '[fleet]\nname = "flower"\nevaluate = true\n'))
    assert completed.exit_code == 2
    assert "fleet.evaluate = true sends every site's own figures; set it to false" in " ".join(completed.output.split())


def test_missing_libraries_are_named(write_experiment: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmllm.experiment.compatibility.find_spec", lambda name: None)
    completed = call("run", write_experiment(SECURE))
    assert completed.exit_code == 2
    assert 'pip install "fedmllm[secure]"' in " ".join(completed.output.split())


def test_a_fleet_that_cannot_hide_updates_is_refused(write_experiment: Write, tmp_path: Path) -> None:
    parts = build(files.validate(files.read(write_experiment(SECURE))))
    backend = FleetBackend(lambda context: pytest.fail("the fleet must not be opened"), local=False)
    with pytest.raises(ConfigError, match="does not support secure"):
        execute("federated", Session(parts, parts.prepare()), RunDir(tmp_path / "run"), backend)


def test_check_prints_the_bytes_of_a_masked_update(write_experiment: Write) -> None:
    secure, plain = (run("check", write_experiment(extra)) for extra in (SECURE, ""))
    assert secure["bytes_up"] == {"masked": plain["bytes_up"]["adapter"] + 40}


def test_baselines_are_not_masked_and_shared_by_sweeps(write_experiment: Write, tmp_path: Path) -> None:
    result = run("baseline", "local", write_experiment(SECURE), "--out", tmp_path / "local", "--set", "train.rounds=1")
    assert result["kind"] == "local"
    config = with_defaults(files.validate(files.read(write_experiment(SECURE))))
    assert essential(config, "local").secure == Named(name="none")
    assert essential(config, "federated").secure.name == "pairwise"


# A server and its sites


class WorkerFleet:
    """A fleet whose clients are workers that receive and send the bytes of the protocol, as in a remote fleet."""

    def __init__(self, workers: Mapping[int, Worker], config: Experiment) -> None:
        self.workers, self.config, self.replies = workers, config, list[tuple[JobKind, int, Reply]]()
        self.lost: set[tuple[Phase, int]] = set()
        self.run = ""

    def request(self, phase: Phase, info: RoundInfo, messages: Mapping[int, State]) -> Sequence[Update]:
        answers = []
        for client, state in messages.items():
            last = info.round - 1
            job = Job(phase, self.run, self.config.toml(), client, info.round, info.sampled, {}, info.lr, last, state)
            reply = Reply.of(*parts_of(to_bytes(self.workers[client].answer([Job.of(*parts_of(to_bytes(job)))])[0])))
            self.replies.append((phase, client, reply))
            if (phase, client) not in self.lost:
                answers.append(Update(client, reply.groups, reply.examples, reply.steps, reply.metrics, reply.problem))
        return answers

    def train(self, info: RoundInfo, messages: Mapping[int, State]) -> Sequence[Update]:
        raise AssertionError("the updates are not hidden")

    def forget(self, round: int, clients: Sequence[int]) -> None: ...

    def commit(self, round: int) -> None: ...

    def personal(self, client: int, message: State, done: int) -> Tensors:
        raise NotImplementedError

    @property
    def backend(self) -> FleetBackend:
        def open_fleet(context: FleetContext) -> WorkerFleet:
            self.run = context.run
            return self

        return FleetBackend(open_fleet, local=False, secure=True)


@pytest.fixture
def fleet(write_experiment: Write, tmp_path: Path) -> WorkerFleet:
    config = with_defaults(files.validate(files.read(write_experiment(SECURE))))
    config = config.model_copy(update={"train": config.train.model_copy(update={"clients_per_round": 3})})
    return WorkerFleet({c: Worker(tmp_path / f"site-{c}") for c in range(4)}, config)


@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold"])
def test_sites_answer_a_server(algorithm: str, fleet: WorkerFleet, tmp_path: Path) -> None:
    config = fleet.config.model_copy(update={"algorithm": Named(name=algorithm)})
    fleet.config = config
    parts = build(config)

    def run_with(backend: FleetBackend, name: str) -> dict[str, Any]:
        return execute("federated", Session(parts, parts.prepare()), RunDir(tmp_path / name), backend)

    remote, local = run_with(fleet.backend, "remote"), run_with(IN_PROCESS, "local")
    assert largest_difference(adapter_of(tmp_path / "remote"), adapter_of(tmp_path / "local")) < 1e-4
    assert remote["bytes_up"] == local["bytes_up"]
    for phase, _, reply in fleet.replies:
        assert (reply.problem, reply.examples, reply.steps, dict(reply.metrics), dict(reply.about)) == ("", 0, 0, {}, {}), phase
        assert {t.dtype for tensors in reply.groups.values() for t in tensors.values()} == {torch.uint8}


def test_a_secure_round_tolerates_a_site_that_goes_away(fleet: WorkerFleet, tmp_path: Path) -> None:
    parts = build(fleet.config)
    fleet.lost = {("masked", 0), ("keys", 2)}

    with suppress(TooFewUpdates):  # both may be sampled in one round
        execute("federated", Session(parts, parts.prepare()), RunDir(tmp_path / "run"), fleet.backend)
    first = RunDir(tmp_path / "run").rounds()[0]
    assert {refusal["why"] for refusal in first["refused"]} == {"no answer"}
    assert {refusal["client"] for refusal in first["refused"]} == {0, 2} & set(first["sampled"])


def test_a_repeated_request_does_not_discard_a_clients_state(fleet: WorkerFleet, tmp_path: Path) -> None:
    fleet.config = fleet.config.model_copy(update={"algorithm": Named(name="scaffold")})
    parts, answer = build(fleet.config), Worker.answer

    def twice(worker: Worker, jobs: Sequence[Job]) -> list[Reply]:
        replies = answer(worker, jobs)
        return [replies, answer(worker, jobs)][jobs[0].kind == "masked"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Worker, "answer", twice)
        execute("federated", Session(parts, parts.prepare()), RunDir(tmp_path / "run"), fleet.backend)
    trained = RunDir(tmp_path / "run").rounds()[-1]["sampled"]
    for client in trained:
        assert (tmp_path / f"site-{client}" / fleet.run / f"client-{client}" / "round-2.safetensors").is_file()


def test_a_site_sends_nothing_unmasked_if_updates_are_hidden(fleet: WorkerFleet) -> None:
    (worker, *_), text = fleet.workers.values(), fleet.config.toml()
    for kind in ("train", "personal"):
        (reply,) = worker.answer([Job(kind, "ab" * 8, text, 0, 0, (0, 1), lr=0.1)])  # type: ignore[arg-type]
        assert reply.problem == f"secure.name: updates are hidden in this run, so {kind!r} is not answered."
        assert not reply.groups
    reports = [fleet.workers[c].answer([Job("describe", "ab" * 8, text, c)])[0].about for c in range(4)]
    assert {about[key] for about in reports for key in ("samples", "image", "text")} == {0, 1}, (
        "whether there are any, but not how many"
    )


def test_a_site_refuses_a_secure_round_of_an_open_experiment(fleet: WorkerFleet) -> None:
    plain = fleet.config.model_copy(update={"secure": Named(name="none")})
    (reply,) = fleet.workers[0].answer([Job("keys", "ab" * 8, plain.toml(), 0, 0, (0, 1))])
    assert reply.problem == "secure.name: the server requests a secure round, and its experiment has none."


def test_a_site_may_require_hidden_updates(fleet: WorkerFleet, tmp_path: Path) -> None:
    plain = fleet.config.model_copy(update={"secure": Named(name="none")})
    worker = Worker(tmp_path / "own", SiteData("a", fleet.config.task, secure=True, model="pocket"))
    (reply,) = worker.answer([Job("describe", "ab" * 8, plain.toml())])
    assert reply.problem == 'secure.name: this site\'s file requires hidden updates, and the experiment says "none".'
