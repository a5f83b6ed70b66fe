"""What a hostile server asks of a site, and what the site's own file allows: every attack replayed, none with a model."""

from __future__ import annotations

import json
import re
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import tomli_w
import torch

from federations import write_samples
from fedmllm.config import TaskTable
from fedmllm.errors import ConfigError, RunError
from fedmllm.federation import FederationPlan, sample_clients
from fedmllm.remote import limits as limits_module
from fedmllm.remote.files import SiteData, SiteTable, private_folder
from fedmllm.remote.limits import Limits, TimeIsUp, time_limit
from fedmllm.remote.protocol import Job, ProtocolError, Reply, parts_of, to_bytes
from fedmllm.remote.service import ReplyCache
from fedmllm.remote.site import SiteExperiment, check_job, parts_at, site_dataset
from fedmllm.remote.worker import Worker
from fedmllm.secure.clients import SecureClients

RUN = "ab" * 8
SITES = ["north", "south", "east", "west"]
CATASTROPHIC = "(.*.*)*(.*)*!"
MODULE = "model.language_model.layers.0.self_attn.q_proj"


def site_in(folder: Path, **settings: Any) -> SiteData:
    task = TaskTable(name="jsonl", train=str(folder / "train.jsonl"), test=str(folder / "train.jsonl"))  # type: ignore[call-arg]
    limits = Limits(**settings.pop("limits", {}))
    return SiteData("south", task, device="cpu", limits=limits.beside(folder), **settings)


def experiment(**tables: Any) -> str:
    """The experiment of an honest server, as sites receive it, with some settings replaced."""
    raw: dict[str, Any] = {
        "partition": {"name": "iid", "clients": len(SITES)},
        "train": {"rounds": 3, "clients_per_round": 3},
        "fleet": {"name": "flower", "sites": SITES},
    }
    for name, table in tables.items():
        raw[name] = {**raw.get(name, {}), **table}
    return tomli_w.dumps(raw)


MASKED = {"secure": {"name": "pairwise"}}


# The experiment


def test_a_sites_data_need_no_test_split(tmp_path: Path) -> None:
    site = replace(site_in(tmp_path), task=TaskTable(name="medalpaca", data_dir=str(tmp_path)))  # type: ignore[call-arg]
    assert parts_at(experiment(), site).source.task.splits == ("train",)


@pytest.mark.parametrize(
    ("tables", "site", "problem"),
    [
        ({"train": {"epochs": 10**9}}, {}, "train.epochs: must be at most 1000"),
        ({"train": {"epochs": 1e9}}, {}, "train.epochs: "),
        ({"partition": {"clients": 2 * 10**9}}, {}, "partition.clients: must be at most 1000000"),
        ({"partition": {"clients": 20_000}}, {}, "partition.clients = 20000 is more than limits.clients = 10000"),
        ({"partition": {"clients": 4}}, {"limits": {"clients": 3}}, "partition.clients = 4 is more than limits.clients = 3"),
        ({"model": {"trust_remote_code": True}}, {}, "model.trust_remote_code: the experiment runs code"),
        ({"model": {"trust_remote_code": True}}, {"model": "/srv/own"}, "model.trust_remote_code: the experiment runs code"),
        ({"train": {"clients_per_round": 2}, **MASKED}, {}, "train.clients_per_round = 2 is less than min_peers = 3"),
        ({"train": {"clients_per_round": 4}, **MASKED}, {"min_peers": 5}, "clients_per_round = 4 is less than min_peers = 5"),
        ({"train": {"clients_per_round": 1}, **MASKED}, {"min_peers": 2}, "the mean of one update is that update"),
        ({}, {"secure": True}, "this site's file requires hidden updates"),
    ],
)  # fmt: skip
def test_an_experiment_beyond_the_limits_is_refused(
    tmp_path: Path, tables: dict[str, Any], site: dict[str, Any], problem: str
) -> None:
    """The refusal is the client's problem in its reply, and is in the site's own log."""
    log: list[str] = []
    worker = Worker(tmp_path, site_in(tmp_path, **site), log.append)
    for kind in ("describe", "train", "keys"):
        (reply,) = worker.answer([Job(kind, RUN, experiment(**tables), 1, 0, (0, 1, 2))])  # type: ignore[arg-type]
        assert problem in reply.problem
        assert not reply.groups
        assert log.pop() == reply.problem


@pytest.mark.parametrize(
    ("tables", "site"),
    [
        ({}, {}),
        (MASKED, {}),
        ({"train": {"clients_per_round": 2}}, {}),  # without masks
        ({"train": {"clients_per_round": 2}, **MASKED}, {"min_peers": 2}),
        ({"model": {"trust_remote_code": True}}, {"trust_remote_code": True}),
        ({"model": {"name": "/etc"}}, {"model": "/srv/own"}),
    ],
)
def test_an_experiment_within_the_limits_is_not(tmp_path: Path, tables: dict[str, Any], site: dict[str, Any]) -> None:
    assert parts_at(experiment(**tables), site_in(tmp_path, **site)).config.model.device == "cpu"


@pytest.mark.parametrize(("device", "expected"), [("auto", "auto"), ("cpu", "none")])
def test_a_site_decides_where_its_model_is(tmp_path: Path, device: str, expected: str) -> None:
    site = replace(site_in(tmp_path), device=device)
    model = parts_at(experiment(model={"device_map": "auto"}), site).config.model
    assert (model.device, model.device_map) == (device, expected)


@pytest.mark.parametrize(
    ("name", "allowed", "problem"),
    [
        ("pocket", ["*"], ""),
        ("HuggingFaceTB/SmolVLM2-256M-Video-Instruct", ["*"], ""),
        ("HuggingFaceTB/SmolVLM2-256M-Video-Instruct", ["pocket", "HuggingFaceTB/*"], ""),
        ("HuggingFaceTB/SmolVLM2-256M-Video-Instruct", ["pocket"], "is an id that"),
        ("pocket", [], "is an id that"),
        ("HuggingFaceTBX/evil", ["HuggingFaceTB/*"], "is an id that"),
        ("FOLDER/models/llava", ["*"], "is a path"),
        ("FOLDER/models/llava", ["FOLDER/models/llava"], ""),
        ("FOLDER/models/llava", ["./models/*"], ""),
        ("FOLDER/models/../models/llava", ["./models/*"], ""),
        ("FOLDER/models/../secret", ["./models/*"], "is a path"),
        ("FOLDER/models/link", ["./models/*"], "is a path"),  # which leads out
        ("models/llava", ["*"], "is a path"),  # as an id, but it is a folder where the site was started
        ("models/llava", ["./models/*"], ""),
        ("../secret", ["*", "./models/*"], "is a path"),
        (".", ["*"], "is a path"),
        ("~/secret", ["*"], "is a path"),
        ("https://example.org/model", ["*"], "is a path or an address"),
        ("//example.org/share", ["*"], "is a path"),
        ("a/b/c", ["*"], "is a path"),
        ("a\0b", ["*"], "is a path"),
        ("a\\b", ["*"], "is a path"),
        ("", ["*"], "is a path"),
        ("x" * 300, ["*"], "is a path"),
        ("x\n/etc", ["*"], "is a path"),
    ],
)
def test_the_server_names_no_path_that_the_site_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, allowed: list[str], problem: str
) -> None:
    for folder in ("models/llava", "secret"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "models" / "link").symlink_to(tmp_path / "secret")
    monkeypatch.chdir(tmp_path)
    text = experiment(model={"name": name.replace("FOLDER", str(tmp_path))})
    site = site_in(tmp_path, limits={"models": [pattern.replace("FOLDER", str(tmp_path)) for pattern in allowed]})
    if not problem:
        assert parts_at(text, site).config.model.name == name.replace("FOLDER", str(tmp_path))
        return
    with pytest.raises(ConfigError, match=f"^model.name = .* {problem}.* this site's file does not allow") as refusal:
        parts_at(text, site)
    assert "\n" not in str(refusal.value)


def test_a_site_opens_no_data_and_no_judge_of_the_server(tmp_path: Path) -> None:
    """Nothing that the server names is left in the experiment as the site uses it, so that nothing can open it."""
    secret = "/etc/shadow"
    text = experiment(
        task={
            "name": "jsonl",
            "train": secret,
            "test": secret,
            "companion": {"name": "jsonl", "train": secret, "test": secret},
        },
        eval={"transfer": [{"name": "jsonl", "train": secret, "test": secret}]},
        judge={"name": "openai", "endpoint": "http://169.254.169.254/latest", "model": secret},
        model={"device": "meta"},
    )
    parts = parts_at(text, site_in(tmp_path))
    assert (parts.judge, parts.transfer, parts.config.judge.name) == (None, {}, "none")
    for word in (secret, "169.254", "meta"):
        assert word in text
        assert word not in parts.config.toml()


# The amount of work


def test_epochs_and_samples_are_limited_together(tmp_path: Path) -> None:
    write_samples(tmp_path, "train", 6)
    parts = parts_at(experiment(train={"epochs": 10}), site_in(tmp_path))
    assert len(site_dataset(parts, site_in(tmp_path, limits={"samples": 60})).train) == 6
    with pytest.raises(ConfigError, match=r"samples in 10 epochs are more than limits.samples in its file"):
        site_dataset(parts, site_in(tmp_path, limits={"samples": 59}))


def test_a_reply_that_is_too_long_is_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = {"adapter": {"w": torch.zeros(25)}}
    monkeypatch.setattr(Worker, "_answer", lambda self, jobs: [Reply(job.client, groups) for job in jobs])
    for most, problem in (
        (100, ""),
        (99, "a reply would have 100 bytes, more than limits.reply_bytes = 99 in this site's file"),
    ):
        (reply,) = Worker(tmp_path, site_in(tmp_path, limits={"reply_bytes": most})).answer([Job("train", RUN, "", 1)])
        assert reply.problem.partition(";")[0] == problem
        assert bool(reply.groups) is not bool(problem)


def test_a_catastrophic_expression_ends_with_the_time_of_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The site answers the next job."""
    write_samples(tmp_path, "train", 6)
    monkeypatch.setattr("fedmllm.remote.site.Session", lambda parts, _: re.fullmatch(parts.config.model.lora.target, MODULE))
    log: list[str] = []
    worker = Worker(tmp_path, site_in(tmp_path, limits={"seconds": 0.3}), log.append)
    began = time.monotonic()
    text = experiment(model={"lora": {"target": CATASTROPHIC}})
    replies = ReplyCache(worker)
    reply = Reply.of(*parts_of(replies(to_bytes(Job("describe", RUN, text)))))
    assert time.monotonic() - began < 10
    assert reply.problem == "the job took longer than limits.seconds in this site's file allows, and was ended"
    assert log == [reply.problem]
    assert "must be at most 1000" in worker.answer([Job("describe", RUN, experiment(train={"epochs": 10**9}))])[0].problem


@pytest.mark.parametrize("caught", [Exception, BaseException])
def test_code_that_swallows_errors_is_interrupted(caught: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits_module, "_AGAIN", 0.05)

    def swallow() -> None:
        try:
            time.sleep(20)
        except caught:
            time.sleep(20)

    with pytest.raises(TimeIsUp), time_limit(0.05):
        swallow()
    with time_limit(0.05):
        pass
    time.sleep(0.1)  # nothing happens after the end


def test_what_cannot_be_interrupted_ends_with_the_process() -> None:
    code = (
        "import signal, time; from fedmllm.remote import limits; limits.GRACE = 0.2\n"
        "with limits.time_limit(0.1):\n"
        "    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM}); time.sleep(30)"
    )
    began = time.monotonic()
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert completed.returncode == 1
    assert "Timeout" in completed.stderr
    assert time.monotonic() - began < 25


# Jobs


def drawn(text: str, round: int = 0) -> tuple[int, ...]:
    config = parts_at(text, site_in(Path())).config
    return sample_clients(FederationPlan.of(config.train, range(config.partition.clients), config.seed), round)


@pytest.mark.parametrize(
    ("kind", "client", "round", "sampled", "problem"),
    [
        ("keys", 1, 0, None, ""),
        ("unmask", 1, 2, None, ""),
        ("train", 1, 0, (), ""),
        ("evaluate", 1, 3, (), ""),
        ("personal", 1, 3, (), ""),
        ("keys", 1, 0, (1,), "the server hides updates in a sum over clients (1,), and the experiment draws 3 others"),
        ("masked", 1, 0, (1,), "the server hides updates in a sum over clients (1,)"),
        ("keys", 1, 0, (), "the server hides updates in a sum over clients ()"),
        ("keys", 1, 0, (1, 1, 1), "the server hides updates in a sum over clients (1, 1, 1)"),
        ("keys", 1, 0, (0, 1, 2, 3), "the server hides updates in a sum over clients (0, 1, 2, 3)"),
        ("keys", 1, 0, (1, 7, 8), "the server hides updates in a sum over clients (1, 7, 8)"),
        ("keys", 1, 0, (10**18,) * 900, "the server hides updates in a sum over clients (1000"),
        ("keys", 0, 0, None, "the server sends a job for client 0, and this site is client 1"),
        ("train", 2, 0, (), "the server sends a job for client 2, and this site is client 1"),
        ("evaluate", -1, 3, (), "the server sends a job for client -1, and this site is client 1"),
        ("keys", 1, 3, None, "the server begins round 3, and the experiment has 3"),
        ("train", 1, -1, (), "the server begins round -1, and the experiment has 3"),
    ],
)
def test_jobs_of_a_server_that_does_not_follow_its_experiment(
    kind: Any, client: int, round: int, sampled: tuple[int, ...] | None, problem: str
) -> None:
    text, site = experiment(**MASKED), site_in(Path())
    config = parts_at(text, site).config
    job = Job(kind, RUN, text, client, round, drawn(text, round) if sampled is None else sampled)
    if problem:
        with pytest.raises(ConfigError, match=re.escape(problem)) as refusal:
            check_job(job, config, site)
        assert len(str(refusal.value)) < 300
    else:
        check_job(job, config, site)


@pytest.mark.parametrize("kind", ["train", "keys"])
def test_a_server_that_wants_an_update_of_a_few_samples(kind: Any) -> None:
    """The change of a single step tells more of its samples than that of all steps."""
    text, site = experiment(**MASKED), site_in(Path())
    job = Job(kind, RUN, text, 1, 0, drawn(text), steps={1: 1})
    with pytest.raises(
        ConfigError, match=r"the server limits the optimizer steps of a round, which it may only in simulations"
    ):
        check_job(job, parts_at(text, site).config, site)


@pytest.mark.parametrize("sampled", [(1,), (1, 2), (0, 1, 2, 3), None])
def test_a_site_that_is_asked_alone_sends_no_key(tmp_path: Path, sampled: tuple[int, ...] | None) -> None:
    """The first request of the attack. Without an answer to it, the site answers no later one."""
    text, site = experiment(**MASKED), site_in(tmp_path)
    parts = parts_at(text, site)
    worker = Worker(tmp_path, site)
    assert parts.secure is not None
    loaded = SimpleNamespace(config=parts.config, secure_clients=SecureClients(parts.secure, parts.algorithm))
    loaded.session = SimpleNamespace(model=SimpleNamespace(info=None), parts=parts)
    loaded.info = lambda job: SiteExperiment.info(cast(SiteExperiment, loaded), job)
    worker._loaded = text, cast(SiteExperiment, loaded)
    attempt = {"keys": {"attempt": torch.zeros(16, dtype=torch.uint8)}}
    (reply,) = worker.answer([Job("keys", RUN, text, 1, 0, sampled or drawn(text), state=attempt)])
    assert bool(reply.groups) is (sampled is None)
    assert bool(reply.problem) is (sampled is not None)
    (later,) = worker.answer([Job("masked", RUN, text, 1, 0, (1,), state={"adapter": {}, "shares": {}})])
    assert "in a sum over clients (1,)" in later.problem


@pytest.mark.parametrize(
    "change",
    [
        {"client": "1"}, {"client": True}, {"client": [[[]]]}, {"round": 10**30}, {"round": 0.5}, {"last": None},
        {"sampled": "012"}, {"sampled": [[0]]}, {"sampled": [0.0]}, {"sampled": 3}, {"ranks": [[0, "8"]]}, {"ranks": [0]},
        {"lr": "1"}, {"lr": float("nan")}, {"lr": 1e400}, {"kind": "execute"}, {"kind": ["train"]}, {"run": 5}, {"config": {}},
        {"more": 1},
    ],
)  # fmt: skip
def test_malformed_jobs_are_refused(change: dict[str, Any]) -> None:
    header = json.dumps({**json.loads(Job("train", RUN, "").header()), **change})
    with pytest.raises(ProtocolError, match="not a job"):
        Job.of(header, {})
    assert Job.of(Job("train", RUN, "", 1, 2, (0, 1), {0: 4}, 0.1).header(), {}).ranks == {0: 4}


# The state folder


def test_the_state_folder_is_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where, path = tmp_path / "site.toml", tmp_path / "deep" / "state"
    for _ in range(2):
        assert stat.S_IMODE(private_folder(path, where).stat().st_mode) == 0o700
    for mode in (0o755, 0o710, 0o701, 0o770, 0o707):
        path.chmod(mode)
        with pytest.raises(
            ConfigError, match=f"other users of this machine may open the folder {path}; run `chmod 700 {path}`"
        ):
            private_folder(path, where)
    path.chmod(0o700)
    monkeypatch.setattr("os.geteuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(ConfigError, match="belongs to another user"):
        private_folder(path, where)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="is a file"):
        private_folder(tmp_path / "file" / "state", where)


def test_every_key_of_a_site_file_is_documented() -> None:
    page = (Path(__file__).parents[1] / "docs" / "deploy.md").read_text()
    keys = [*SiteTable.model_fields, *Limits.model_fields]
    assert [key for key in keys if not re.search(rf"`\[?{key}\b|^{key} = ", page, re.MULTILINE)] == []
    for key, field in Limits.model_fields.items():
        default = json.dumps(field.default).removesuffix(".0")
        assert f"| `{key}` | {default} |" in page or f"| `{key}` | `{default}` |" in page
