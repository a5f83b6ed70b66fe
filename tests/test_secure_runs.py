"""Secure aggregation in whole runs: the same model, real bytes, refusals, and a site that answers a server."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from commands import call, run
from fedmllm import config as configs
from fedmllm.algorithms import RoundInfo, Update
from fedmllm.config import Experiment, Named
from fedmllm.errors import ConfigError
from fedmllm.experiment.parts import build, with_defaults
from fedmllm.experiment.sweep import essential
from fedmllm.federation import TooFewUpdates
from fedmllm.fleets.base import FleetBackend, FleetContext
from fedmllm.fleets.inprocess import IN_PROCESS
from fedmllm.remote.protocol import Job, JobKind, Reply, parts_of, to_bytes
from fedmllm.remote.site import Own, Worker
from fedmllm.runs.kinds import execute
from fedmllm.runs.session import Session
from fedmllm.secure.settings import Phase
from fedmllm.storage.run_dir import RunDir
from fedmllm.tensors import State, Tensors

SECURE = '[secure]\nname = "pairwise"\n'
Write = Callable[..., Path]


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def far(one: Tensors, other: Tensors) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.fixture
def plain(write_experiment: Write, tmp_path: Path) -> tuple[dict[str, Any], Path]:
    return run("run", write_experiment(name="plain"), "--out", tmp_path / "plain"), tmp_path / "plain"


def test_a_secure_run_makes_the_same_model(plain: tuple[dict[str, Any], Path], write_experiment: Write, tmp_path: Path) -> None:
    hidden = run("run", write_experiment(SECURE, name="hidden"), "--out", tmp_path / "hidden")
    assert far(adapter_of(plain[1]), adapter_of(tmp_path / "hidden")) < 1e-4
    assert hidden["secure"] == "pairwise"
    assert plain[0]["secure"] == "none"
    assert hidden["refused_updates"] == 0
    numbers = sum(t.numel() for t in adapter_of(plain[1]).values())
    updates = 3 * 2
    assert hidden["bytes_up"]["masked"] == updates * (4 * numbers + 40)
    assert plain[0]["bytes_up"] == {"adapter": updates * 4 * numbers}
    assert hidden["bytes_down"]["adapter"] == plain[0]["bytes_down"]["adapter"]
    few = sum(hidden["bytes_up"].values()) - hidden["bytes_up"]["masked"]
    assert few == updates * (32 + 32 + 16 + 48 + 2 * 16), "keys, one sealed pair of shares, two shares to unmask"
    for one, other in zip(plain[0]["per_client"], hidden["per_client"], strict=True):
        assert one == other, "the manifest of a simulation is no secret"
    records = [RunDir(folder).rounds() for folder in (plain[1], tmp_path / "hidden")]
    for one, other in zip(*records, strict=True):
        assert (one["examples"], one["steps"], one["sampled"]) == (other["examples"], other["steps"], other["sampled"])
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-3)


def test_fewer_bits_are_fewer_bytes_and_a_coarser_mean(
    plain: tuple[dict[str, Any], Path], write_experiment: Write, tmp_path: Path
) -> None:
    for bits, bound in ((16, 2e-2), (64, 2e-6)):
        more = f"{SECURE}bits = {bits}\nmax_examples = 40\nclip = 0.1\n"
        path = write_experiment(more, rounds=1, name=f"b{bits}")
        one = run("run", write_experiment(rounds=1, name="one"), "--out", tmp_path / f"one{bits}")
        hidden = run("run", path, "--out", tmp_path / f"b{bits}")
        assert far(adapter_of(tmp_path / f"one{bits}"), adapter_of(tmp_path / f"b{bits}")) < bound
        assert hidden["bytes_up"]["masked"] == one["bytes_up"]["adapter"] * bits // 32 + 2 * 40


def test_it_goes_on_after_a_stop(write_experiment: Write, tmp_path: Path) -> None:
    extra = '[algorithm]\nname = "scaffold"\n' + SECURE
    whole = run("run", write_experiment(extra), "--out", tmp_path / "whole")
    path, raised = write_experiment(extra), {"left": 2}
    parts = build(configs.validate(configs.read(path)))
    folder = RunDir(tmp_path / "cut")

    def report(stage: str, done: int, total: int, note: str) -> None:
        if stage == "rounds" and done == raised["left"]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute("federated", Session(parts, parts.prepare(), report), folder)
    done = run("run", path, "--out", tmp_path / "cut", "--resume")
    assert done["rounds"] == whole["rounds"] == 3
    assert far(adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "cut")) < 1e-6


REFUSED = [
    ({"algorithm.name": "flora"}, "'pairwise' shows the server only the mean of updates, and algorithm.name = 'flora'"),
    ({"algorithm.name": "flexlora"}, "works on single ones; choose one of fedadagrad, fedadam, fedavg, fedavgm, feddyn"),
    ({"algorithm.name": "fednova"}, "algorithm.name = 'fednova' works on single ones"),
    ({"algorithm.name": "fedsa-lora"}, "has every client's own adapter sent to be tested"),
    ({"compression.name": "top-k"}, "compression.name = 'top-k' makes updates that must be unpacked one by one"),
    ({"compression.name": "int8"}, "compression.name = 'int8' makes updates that must be unpacked one by one"),
    ({"train.clients_per_round": 1}, "the mean of one is that one; set train.clients_per_round to 2 at least"),
    ({"secure.threshold": 0.2}, "secure: threshold = 0.2 must be at least 0.5"),
    ({"secure.bits": 8}, "secure.bits: input should be 16, 32 or 64"),
    ({"secure.name": "pairwice"}, "secure.name: there is no secure 'pairwice'; did you mean 'pairwise'?"),
    ({"secure.clips": 2.0}, "secure.clips: unknown key for secure 'pairwise'; did you mean 'clip'?"),
]  # fmt: skip


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize(("settings", "why"), REFUSED, ids=[str(settings) for settings, _ in REFUSED])
def test_what_needs_single_updates_is_refused(
    settings: dict[str, object], why: str, command: str, write_experiment: Write
) -> None:
    done = call(command, write_experiment(SECURE), *(part for k, v in settings.items() for part in ("--set", f"{k}={v}")))
    assert done.exit_code == 2
    assert why in " ".join(done.output.split())


def test_figures_of_single_sites_are_refused(write_experiment: Write) -> None:
    done = call("check", write_experiment(SECURE + '[fleet]\nname = "flower"\nevaluate = true\n'))
    assert done.exit_code == 2
    assert "fleet.evaluate = true has every site's own figures sent; set it to false" in " ".join(done.output.split())


def test_without_its_libraries_it_says_what_to_install(write_experiment: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmllm.secure.chosen.find_spec", lambda name: None)
    done = call("run", write_experiment(SECURE))
    assert done.exit_code == 2
    assert 'pip install "fedmllm[secure]"' in " ".join(done.output.split())


def test_a_fleet_that_would_send_updates_as_they_are_is_refused(write_experiment: Write, tmp_path: Path) -> None:
    parts = build(configs.validate(configs.read(write_experiment(SECURE))))
    elsewhere = FleetBackend(lambda site: pytest.fail("it must not be made"), local=False)
    with pytest.raises(ConfigError, match="does not support secure"):
        execute("federated", Session(parts, parts.prepare()), RunDir(tmp_path / "run"), elsewhere)


def test_check_tells_the_real_bytes(write_experiment: Write) -> None:
    found, plain = (run("check", write_experiment(extra)) for extra in (SECURE, ""))
    assert found["bytes_up"] == {"masked": plain["bytes_up"]["adapter"] + 40}


def test_baselines_hide_nothing_and_are_the_same_runs(write_experiment: Write, tmp_path: Path) -> None:
    done = run("baseline", "local", write_experiment(SECURE), "--out", tmp_path / "local", "--set", "train.rounds=1")
    assert done["kind"] == "local"
    config = with_defaults(configs.validate(configs.read(write_experiment(SECURE))))
    assert essential(config, "local").secure == Named(name="none")
    assert essential(config, "federated").secure.name == "pairwise"


# A server and its sites


class Posted:
    """A fleet whose clients are workers behind the bytes of the protocol: what a remote fleet does in secure rounds."""

    def __init__(self, workers: Mapping[int, Worker], config: Experiment) -> None:
        self.workers, self.config, self.wire = workers, config, list[tuple[JobKind, int, Reply]]()
        self.away: set[tuple[Phase, int]] = set()
        self.run = ""

    def ask(self, phase: Phase, info: RoundInfo, messages: Mapping[int, State], lr: float) -> Sequence[Update]:
        answers = []
        for client, state in messages.items():
            job = Job(phase, self.run, self.config.toml(), client, info.round, info.sampled, {}, lr, info.round - 1, state)
            reply = Reply.of(*parts_of(to_bytes(self.workers[client].answer([Job.of(*parts_of(to_bytes(job)))])[0])))
            self.wire.append((phase, client, reply))
            if (phase, client) not in self.away:
                answers.append(Update(client, reply.groups, reply.examples, reply.steps, reply.metrics, reply.problem))
        return answers

    def train(self, info: RoundInfo, messages: Mapping[int, State], lr: float) -> Sequence[Update]:
        raise AssertionError("in the clear")

    def forget(self, round: int, clients: Sequence[int]) -> None: ...

    def commit(self, round: int) -> None: ...

    def personal(self, client: int, message: State, done: int) -> Tensors:
        raise NotImplementedError


@pytest.fixture
def posted(write_experiment: Write, tmp_path: Path) -> Posted:
    config = with_defaults(configs.validate(configs.read(write_experiment(SECURE))))
    config = config.model_copy(update={"train": config.train.model_copy(update={"clients_per_round": 3})})
    return Posted({c: Worker(tmp_path / f"site-{c}") for c in range(4)}, config)


@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold"])
def test_sites_answer_a_server(algorithm: str, posted: Posted, tmp_path: Path) -> None:
    config = posted.config.model_copy(update={"algorithm": Named(name=algorithm)})
    posted.config = config
    parts = build(config)

    def run_with(backend: FleetBackend, name: str) -> dict[str, Any]:
        return execute("federated", Session(parts, parts.prepare()), RunDir(tmp_path / name), backend)

    def make(site: FleetContext) -> Posted:
        posted.run = site.run
        return posted

    remote, here = run_with(FleetBackend(make, local=False, secure=True), "remote"), run_with(IN_PROCESS, "here")
    assert far(adapter_of(tmp_path / "remote"), adapter_of(tmp_path / "here")) < 1e-4
    assert remote["bytes_up"] == here["bytes_up"]
    for phase, _, reply in posted.wire:
        assert (reply.problem, reply.examples, reply.steps, dict(reply.metrics), dict(reply.about)) == ("", 0, 0, {}, {}), phase
        assert {t.dtype for tensors in reply.groups.values() for t in tensors.values()} == {torch.uint8}


def test_a_site_that_goes_away_is_made_up_for(posted: Posted, tmp_path: Path) -> None:
    parts = build(posted.config)
    posted.away = {("masked", 0), ("keys", 2)}

    def make(site: FleetContext) -> Posted:
        posted.run = site.run
        return posted

    session, backend = Session(parts, parts.prepare()), FleetBackend(make, local=False, secure=True)
    with suppress(TooFewUpdates):  # both may be sampled in one round
        execute("federated", session, RunDir(tmp_path / "run"), backend)
    first = RunDir(tmp_path / "run").rounds()[0]
    assert {refusal["why"] for refusal in first["refused"]} == {"no answer"}
    assert {refusal["client"] for refusal in first["refused"]} == {0, 2} & set(first["sampled"])


def test_what_a_client_learned_outlives_a_question_that_comes_twice(posted: Posted, tmp_path: Path) -> None:
    posted.config = posted.config.model_copy(update={"algorithm": Named(name="scaffold")})
    parts, answer = build(posted.config), Worker.answer

    def twice(worker: Worker, jobs: Sequence[Job]) -> list[Reply]:
        replies = answer(worker, jobs)
        return [replies, answer(worker, jobs)][jobs[0].kind == "masked"]

    def make(site: FleetContext) -> Posted:
        posted.run = site.run
        return posted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Worker, "answer", twice)
        backend = FleetBackend(make, local=False, secure=True)
        execute("federated", Session(parts, parts.prepare()), RunDir(tmp_path / "run"), backend)
    trained = RunDir(tmp_path / "run").rounds()[-1]["sampled"]
    for client in trained:
        assert (tmp_path / f"site-{client}" / posted.run / f"client-{client}" / "round-2.safetensors").is_file()


def test_a_site_answers_nothing_in_the_clear_where_updates_are_hidden(posted: Posted) -> None:
    (worker, *_), text = posted.workers.values(), posted.config.toml()
    for kind in ("train", "personal"):
        (reply,) = worker.answer([Job(kind, "ab" * 8, text, 0, 0, (0, 1), lr=0.1)])  # type: ignore[arg-type]
        assert reply.problem == f"secure.name: updates are hidden in this run, so {kind!r} is not answered."
        assert not reply.groups
    told = [posted.workers[c].answer([Job("describe", "ab" * 8, text, c)])[0].about for c in range(4)]
    assert {about[key] for about in told for key in ("samples", "image", "text")} == {0, 1}, "what there is, not how much"


def test_a_site_knows_no_secure_round_of_another_experiment(posted: Posted) -> None:
    plain = posted.config.model_copy(update={"secure": Named(name="none")})
    (reply,) = posted.workers[0].answer([Job("keys", "ab" * 8, plain.toml(), 0, 0, (0, 1))])
    assert reply.problem == "secure.name: the server asks for a secure round, and its experiment has none."


def test_a_site_may_demand_that_updates_are_hidden(posted: Posted, tmp_path: Path) -> None:
    plain = posted.config.model_copy(update={"secure": Named(name="none")})
    worker = Worker(tmp_path / "own", Own("a", posted.config.task, secure=True))
    (reply,) = worker.answer([Job("describe", "ab" * 8, plain.toml())])
    assert reply.problem == 'secure.name: this site\'s file demands that updates are hidden, and the experiment says "none".'
