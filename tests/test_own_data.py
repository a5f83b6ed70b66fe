"""Sites that bring data of their own, on a grid without Flower's processes: whose data, whose limits, whose figures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from flwr.app import Context, Message

from federations import SITES, adapter, close, in_one_process, with_site_names, write_federation, write_samples
from fedmllm.errors import ConfigError, RunError
from fedmllm.federation import TooFewUpdates
from fedmllm.progress import no_progress
from fedmllm.remote.files import FederationFile, SiteFile
from fedmllm.remote.fleet import valid_metrics
from fedmllm.remote.protocol import Job, Reply, parts_of, to_bytes
from fedmllm.remote.records import pack, unpack
from fedmllm.remote.serverapp import run
from fedmllm.remote.service import ReplyCache
from fedmllm.remote.worker import Worker
from fedmllm.storage.run_dir import RunDir
from grids import DirectGrid


@pytest.fixture
def federation(tmp_path: Path, tiny: Path) -> Path:
    return write_federation(tmp_path, tiny)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDMLLM_CACHE", str(tmp_path / "cache"))


class Sites:
    """A ClientApp with the workers of all sites in this process; `log` has what they kept to themselves. If `lost(job)`, the
    answer to a job does not arrive."""

    def __init__(self, federation: Path, lost: Callable[[Job], bool] = lambda job: False) -> None:
        self.log: list[str] = []
        self.lost = lost
        self.jobs: list[Job] = []
        root = federation.parents[1]
        files = [SiteFile(root / name / "site.toml") for name in SITES]
        self.answers = {f.name: ReplyCache(Worker(f.state / "clients", f.data, self.log.append)) for f in files}

    def __call__(self, message: Message, context: Context) -> Message:
        content = pack(message.content)
        self.jobs.append(Job.of(*parts_of(content)))
        answer = self.answers[str(context.node_config["site"])](content)
        if self.lost(self.jobs[-1]):
            answer = to_bytes(Reply(self.jobs[-1].client, problem="the connection broke"))
        return Message(unpack(answer), reply_to=message)

    def grid(self) -> DirectGrid:
        return DirectGrid(self, {7 + i: {"site": n} for i, n in enumerate(SITES)}, {7 + i: n for i, n in enumerate(SITES)})


def settings(federation: Path, out: str = "out", overrides: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
    config = FederationFile(federation, list(overrides)).experiment
    file = federation.with_name("resolved.toml")
    file.write_text(tomli_w.dumps(config.resolved()))
    return {"experiment": file, "out": federation.with_name(out), "resume": False, "overrides": "", "outcome": "", **more}


def test_each_site_trains_on_its_own_data_under_its_own_limits(federation: Path, tmp_path: Path) -> None:
    sites = Sites(federation)
    result = run(sites.grid(), settings(federation), no_progress)
    alone = in_one_process(federation, tmp_path / "alone")
    assert close(adapter(federation.with_name("out")), adapter(tmp_path / "alone"))
    assert result["per_client"] == with_site_names(alone["per_client"])
    held = [(row["samples"], row["image"], row["text"]) for row in result["per_client"]]
    assert held == [(8, 8, 0), (12, 0, 12), (16, 16, 16)]
    for job in sites.jobs:
        assert "test.jsonl" not in job.config, "where the server's data is, is no site's affair"


def test_sites_test_the_model_on_data_of_their_own_and_sendvalid_metrics(federation: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("north", "east")):
        write_samples(tmp_path / name, "own", 9 + number)
        file = tmp_path / name / "site.toml"
        file.write_text('jsonl_test = "own.jsonl"\n' + file.read_text())
    patterns = 'eval.patterns=["both", "image", "text"]'
    sites = Sites(federation)
    grid = sites.grid()
    result = run(grid, settings(federation, overrides=("fleet.evaluate=true", patterns, "train.rounds=1")), no_progress)
    north, south, east = result["per_client"]
    assert {p: row["n"] for p, row in north["site_metrics"].items()} == {"both": 9, "image": 9}, "it has no text"
    assert {p: row["n"] for p, row in east["site_metrics"].items()} == {"both": 10, "image": 10, "text": 10}
    assert "site_metrics" not in south
    assert "this site has no test data" in south["site_problem"]
    # The same questions at the server, to the same model.
    task = f'task.test="{tmp_path / "east" / "own.jsonl"}"'
    told = in_one_process(federation, tmp_path / "there", (patterns, task, "train.rounds=1"))["metrics"]
    assert east["site_metrics"] == told
    secrets = {json.loads(line)["id"] for line in (tmp_path / "east" / "own.jsonl").read_text().splitlines()}
    assert not [m for m in grid.received for secret in secrets if secret.encode() in pack(m.content)]


GOOD = {"both": {"accuracy": 0.5, "n": 3, "accuracy_ci": [0.1, 0.9]}}


@pytest.mark.parametrize(
    ("told", "kept"),
    [
        (None, {}),
        ([], {}),
        (GOOD, GOOD),
        ({"both": {"accuracy": float("nan"), "n": "many", "ci": [1], "x": [1, "2"], "y": True}}, {}),
        ({"smell": {"accuracy": 0.5}, "image": "good"}, {}),
    ],
)  # fmt: skip
def test_of_what_a_site_says_only_figures_are_kept(told: Any, kept: Any) -> None:
    assert valid_metrics(told) == kept


def test_asking_for_figures_needs_sites(federation: Path) -> None:
    told = settings(federation, overrides=("fleet.evaluate=true",))
    raw = Path(told["experiment"]).read_text().replace('sites = [\n    "north",\n    "south",\n    "east",\n]\n', "")
    Path(told["experiment"]).write_text(raw)
    with pytest.raises(ConfigError, match="set it to false"):
        run(Sites(federation).grid(), told, no_progress)


def test_bad_data_at_a_site_is_told_there_and_not_here(federation: Path, tmp_path: Path) -> None:
    """The server hears that the site cannot take part; which sample is wrong, and how, stays."""
    data = tmp_path / "south" / "train.jsonl"
    data.write_text(data.read_text() + '{"id": "patient-17", "question": "q", "answer": "", "text": "secret"}\n')
    sites = Sites(federation)
    grid = sites.grid()
    with pytest.raises(RuntimeError, match="missing: south; a node reported: the site's data cannot be used; its own log"):
        run(grid, settings(federation, overrides=("fleet.wait=0.3",)), no_progress)
    assert any("patient-17" in line for line in sites.log)
    assert not [m for m in grid.received if b"patient-17" in pack(m.content)]


def test_a_site_runs_code_of_a_model_only_where_its_file_says_so(federation: Path) -> None:
    with pytest.raises(RuntimeError, match="runs code that comes with the model, and this site's file does not allow it"):
        run(
            Sites(federation).grid(),
            settings(federation, overrides=("model.trust_remote_code=true", "fleet.wait=0.3")),
            no_progress,
        )


def test_a_site_with_another_model_is_refused_by_name(federation: Path, tmp_path: Path) -> None:
    sites = Sites(federation)
    root = federation.parents[1]
    sites.answers["south"] = ReplyCache(Worker(root / "x", SiteFile(root / "south" / "site.toml").data))
    honest = sites.answers["south"]
    sites.answers["south"] = lambda content: honest(content.replace(b"rank = 2", b"rank = 3"))  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="client 'south' adapts other tensors than the server"):
        run(sites.grid(), settings(federation), no_progress)


def test_data_that_changed_between_two_halves_of_a_run_ends_it(federation: Path, tmp_path: Path) -> None:
    sites = Sites(federation)
    grid = sites.grid()
    grid.lose = lambda message: message.metadata.message_type == "train" and message.metadata.group_id != "0"
    short = ("fleet.timeout=0.3",)
    with pytest.raises(TooFewUpdates):
        run(grid, settings(federation, overrides=short), no_progress)
    assert len(RunDir(federation.with_name("out")).rounds()) == 1
    data = tmp_path / "south" / "train.jsonl"
    data.write_text("".join(data.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(RunError, match="site 'south': its data changed since this run began"):
        run(Sites(federation).grid(), settings(federation, overrides=short, resume=True), no_progress)


def test_a_run_goes_on_without_a_site_that_is_not_back_yet(federation: Path, tmp_path: Path) -> None:
    grid = Sites(federation).grid()
    grid.lose = lambda message: message.metadata.message_type == "train" and message.metadata.group_id != "0"
    short = ("fleet.timeout=0.3", "fleet.wait=0.3", "fleet.absent=0.1", "train.min_updates=2")
    with pytest.raises(TooFewUpdates):
        run(grid, settings(federation, overrides=short), no_progress)
    again = Sites(federation).grid()
    del again.nodes[8]
    result = run(again, settings(federation, overrides=short, resume=True), no_progress)
    assert [row["samples"] for row in result["per_client"]] == [8, 12, 16], "as it was told in the first half"
    assert [[r["client"] for r in record["refused"]] for record in RunDir(federation.with_name("out")).rounds()] == [
        [],
        [1],
        [1],
    ]


def test_a_masked_round_is_resumed_with_the_same_sites_only(federation: Path, tmp_path: Path) -> None:
    """The server is lost when the sites have just helped to unmask the sum of the last round."""
    masked = ("secure.name=pairwise", "train.rounds=1")
    first = Sites(federation, lost=lambda job: job.kind == "unmask")
    with pytest.raises(TooFewUpdates, match="the connection broke"):
        run(first.grid(), settings(federation, overrides=masked), no_progress)
    fewer = Sites(federation, lost=lambda job: job.kind == "keys" and job.client == 1)
    with pytest.raises(TooFewUpdates, match=r"the same updates were already summed over other clients.*: client 1 left since"):
        run(fewer.grid(), settings(federation, overrides=masked, resume=True), no_progress)
    assert [line for line in fewer.log if "already summed over other clients" in line], "the sites' own logs say so as well"
    run(Sites(federation).grid(), settings(federation, overrides=masked, resume=True), no_progress)
    in_one_process(federation, tmp_path / "alone", ("train.rounds=1",))
    ours, alone = adapter(federation.with_name("out")), adapter(tmp_path / "alone")
    assert max(float((ours[name] - alone[name]).abs().max()) for name in alone) < 1e-4
