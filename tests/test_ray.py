"""Ray: actors give the same numbers as a single process, an actor that dies is replaced, and sweeps over a cluster."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from commands import call, run
from federations import adapter, close, commands, is_open, wait_for
from fedmllm import api
from fedmllm.config import read, validate
from fedmllm.errors import ConfigError
from fedmllm.experiment.parts import build
from fedmllm.fleets.base import FleetBackend
from fedmllm.fleets.memory import ClientMemory
from fedmllm.fleets.options import RayOptions
from fedmllm.remote.actors import ATTEMPTS, ActorTransport, Packed, on_ray, split
from fedmllm.remote.cluster import LARGEST, actor_resources
from fedmllm.remote.cluster import cluster as connected
from fedmllm.remote.protocol import Job, Reply, to_bytes
from fedmllm.remote.ray_sweep import run_command
from fedmllm.remote.supervisor import free_port, tool
from fedmllm.remote.worker import Worker
from fedmllm.runs.kinds import execute
from fedmllm.runs.session import Session
from fedmllm.storage.run_dir import RunDir

pytest.importorskip("ray")
pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::ResourceWarning"),
]
Write = Callable[..., Path]
FLEET = '[fleet]\nname = "ray"\nactors = 2\ncpus = 0.5\n'
ONE_ACTOR = FLEET.replace("actors = 2", "actors = 1")
NICENESS = {"RAY_worker_niceness": "0"}
"""Ray's own 15 would let an actor wait for every other process of the machine, such as those of tests beside these."""
SCAFFOLD = '[algorithm]\nname = "scaffold"\n'
MEMORY = Path("memory")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDMLLM_CACHE", str(tmp_path / "cache"))
    for name, value in NICENESS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(autouse=True)
def _no_actor_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """They are ended by a message, on which a busy machine takes seconds to act."""
    yield
    if "actors" not in request.fixturenames:
        wait_for(lambda: not actor_pids(), 60)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a running cluster, which serves all tests but one because starting one takes long."""
    port, home = free_port(), Path(tempfile.mkdtemp(prefix="ray-"))  # a short path: Ray creates sockets there
    command = [
        tool("ray"), "start", "--head", "--block", "--port", str(port), "--node-ip-address", "127.0.0.1", "--num-cpus", "2",
        "--include-dashboard", "false", "--temp-dir", str(home), "--disable-usage-stats",
        "--object-store-memory", str(100 << 20),
    ]  # fmt: skip
    with (home / "head.log").open("wb") as log:
        head = subprocess.Popen(command, env=os.environ | NICENESS, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(lambda: is_open(port), 60)
        yield f"127.0.0.1:{port}"
        assert head.poll() is None
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        head.wait(30)
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="module")
def actors(cluster: str) -> Iterator[FleetBackend]:
    """Two actors that serve several runs, one after the other: starting them takes longer than all that they do here.

    This process stays connected to the cluster, so a test that connects itself must come before those that use the actors.
    """
    with on_ray(RayOptions(actors=2, cpus=0.5, address=cluster)) as started:
        # The actors belong to a folder for the clients' memory, here one of that name in each test's working folder.
        yield replace(started, open=lambda context: started.open(replace(context, memory=MEMORY)))
    wait_for(lambda: not actor_pids(), 60)


def actor_pids() -> list[int]:
    return [pid for pid, line in commands().items() if line.startswith("ray::Actor")]


# Without Ray's processes


def test_clients_are_split_evenly_and_each_once() -> None:
    for count in range(12):
        for actors in range(1, 6):
            parts = split(list(range(count)), actors)
            assert [client for part in parts for client in part] == list(range(count))
            sizes = [len(part) for part in parts]
            assert not sizes or (max(sizes) - min(sizes) <= 1 and min(sizes) >= 1)


@pytest.mark.parametrize(
    ("options", "available", "expected"),
    [
        (RayOptions(), (16, 4), (4, 4, 1)),
        (RayOptions(), (16, 0), (4, 4, 0)),
        (RayOptions(), (2, 0), (1, 2, 0)),
        (RayOptions(actors=2), (16, 4), (2, 8, 1)),
        (RayOptions(cpus=2), (16, 0), (8, 2, 0)),
        (RayOptions(gpus=0.5), (16, 2), (4, 4, 0.5)),
        (RayOptions(actors=3, gpus=0), (16, 4), (3, 5, 0)),
    ],
)
def test_an_actor_has_a_gpu_or_a_share_of_the_cores(
    options: RayOptions, available: tuple[float, float], expected: tuple[int, float, float]
) -> None:
    assert actor_resources(options, dict(zip(("CPU", "GPU"), available, strict=True))) == expected


def test_an_actor_has_at_most_the_cores_of_one_machine() -> None:
    available = {"CPU": 16.0, "GPU": 0.0, LARGEST: 8.0}
    assert actor_resources(RayOptions(actors=1), available) == (1, 8, 0)
    with pytest.raises(ConfigError, match="1 actors of 12 cores"):
        actor_resources(RayOptions(actors=1, cpus=12), available)


@pytest.mark.parametrize("options", [RayOptions(actors=9), RayOptions(actors=2, cpus=16), RayOptions(actors=1, gpus=5)])
def test_more_than_the_cluster_has_is_refused(options: RayOptions) -> None:
    with pytest.raises(ConfigError, match=r"lower fleet\.actors, fleet\.cpus or fleet\.gpus"):
        actor_resources(options, {"CPU": 8.0, "GPU": 4.0})


@pytest.mark.parametrize("option", ["actors = 0", "cpus = -1.0", "gpus = -0.5", "timeout = 0.0"])
def test_invalid_options_are_refused(write_experiment: Write, option: str) -> None:
    completed = call("run", write_experiment(f'[fleet]\nname = "ray"\n{option}\n'))
    assert completed.exit_code == 2
    assert "fleet: " in completed.stderr


def test_a_missing_cluster_gives_one_sentence(write_experiment: Write) -> None:
    completed = call("run", write_experiment(FLEET + 'address = "127.0.0.1:1"\n'), "--out", "out")
    assert completed.exit_code == 2, completed.output
    assert "no Ray cluster answers" in completed.stderr
    assert not Path("out").exists()


def test_missing_ray_gives_one_sentence(write_experiment: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "find_spec", lambda name: None)
    completed = call("run", write_experiment(FLEET))
    assert completed.exit_code == 2
    assert completed.stderr.strip().endswith('ray is not installed; run pip install "fedmllm[ray]".')


def test_a_sweeps_folder_must_be_readable_on_the_machine_of_its_run(tmp_path: Path) -> None:
    status, error = run_command(["run"], str(tmp_path / "none.toml"), str(tmp_path), 1, [])
    assert status == 2
    assert "give an --out that all machines of the cluster share" in error


def test_clients_and_runs_on_other_machines_load_the_plugin_files(
    write_experiment: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDMLLM_PLUGINS", "")  # `load_plugin` changes it
    plugin, missing, loaded = tmp_path / "plugin.py", tmp_path / "missing.py", tmp_path / "loaded"
    plugin.write_text(f"from pathlib import Path\nPath({str(loaded)!r}).touch()\n")
    job = Job("describe", "ab" * 8, write_experiment().read_text(), 0)
    (reply,) = Worker(tmp_path / "memory", plugins=[plugin, missing]).answer([job])
    assert loaded.exists()
    assert reply.problem == f"--plugin {missing}: there is no such file."
    status, error = run_command(["run"], str(plugin), str(tmp_path), 1, [plugin, missing])
    assert status == 2
    assert error.endswith(reply.problem)


# Runs


def test_a_run_in_actors_equals_the_run_in_one_process(write_experiment: Write) -> None:
    """Bit for bit with cohorts of one, for an algorithm with client memory, on a cluster of its own with one actor."""
    single = run("run", write_experiment(SCAFFOLD), "--out", "single", "--set", "train.cohort=1")
    ray = run("run", write_experiment(SCAFFOLD + ONE_ACTOR), "--out", "ray", "--set", "train.cohort=1")
    for key in ("metrics", "per_client", "rounds", "bytes_up", "bytes_down", "manifest_digest", "adapter_sha256"):
        assert ray[key] == single[key], key
    expected, memories = (memories_in(Path(name, "checkpoint", "clients")) for name in ("single", "ray"))
    assert memories == expected != {}, "the clients' memory is in the run's directory"


def memories_in(folder: Path) -> dict[str, bytes]:
    """The newest file of each client."""
    files = sorted(folder.glob("client-*/round-*.safetensors"), key=lambda path: int(path.stem.removeprefix("round-")))
    return {path.parent.name: path.read_bytes() for path in files}


def test_an_actor_that_always_dies_costs_only_its_own_clients_the_round(tmp_path: Path, cluster: str) -> None:
    import ray

    replies_of = [to_bytes(Reply(0, examples=clients)) for clients in range(4)]  # made here, where PyTorch is imported already

    class FakeActor:
        def __init__(self, dies: bool) -> None:
            self.dies = dies

        def answer(self, work: list[Packed]) -> list[Packed]:
            if self.dies:
                os._exit(1)
            return [(replies_of[len(work)], memory) for _, memory in work]

    started: list[int] = []
    with connected(cluster):
        remote = ray.remote(num_cpus=0.5)(FakeActor)

        def start(number: int) -> Any:
            started.append(number)
            return remote.remote(number == 1)

        transport = ActorTransport(2, start, ClientMemory(tmp_path))
        replies = transport.exchange({c: Job("train", "ab" * 8, "", c) for c in (3, 5, 8)}, 120)
        assert replies[3].examples == 1
        assert [replies[c].problem for c in (5, 8)] == [f"its actor died {ATTEMPTS} times (ActorDiedError)"] * 2
        assert started == [0, 1, *[1] * ATTEMPTS]
        transport.stop()


def test_a_round_ends_after_the_timeout(write_experiment: Write, cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the cluster that `fleet.address = "auto"` finds, which is left alone."""
    monkeypatch.setenv("RAY_ADDRESS", cluster)  # "auto" reads it before the traces of `ray start` in /tmp/ray
    completed = call("run", write_experiment(f'{ONE_ACTOR}timeout = 0.01\naddress = "auto"\n'), "--out", "out")
    assert completed.exit_code == 1
    assert "no answer within 0.01 s" in completed.stderr
    assert is_open(int(cluster.rpartition(":")[2]))


# Sweeps

AXES = """
[[axes]]
name = "method"
cells = [
    { name = "FedAvg" },
    { name = "nothing", kind = "zero-shot", set = { "model.name" = "gone" } },
]
"""


def test_a_sweep_distributes_its_runs_and_reports_those_that_fail(write_experiment: Write, cluster: str) -> None:
    file = Path("grid.toml")
    file.write_text(f'name = "grid"\nbase = "{write_experiment(rounds=1).name}"\n{AXES}')
    completed = call("sweep", file, "--fleet", "ray", "--address", cluster, "--jobs", 2, "--json")
    assert completed.exit_code == 1
    cells = json.loads(completed.stdout)["cells"]
    assert [cell["state"] for cell in cells] == ["complete", "failed"]
    assert cells[1]["error"].startswith("exit status 2: error: model.name")
    assert cells[1]["kind"] == "zero-shot"
    result = RunDir(Path("runs/grid") / cells[0]["id"]).result()
    run("run", Path("runs/grid") / f"{cells[0]['id']}.toml", "--out", "single")
    assert result["adapter_sha256"] == RunDir(Path("single")).result()["adapter_sha256"]


def test_bad_options_of_a_sweep_give_one_sentence(write_experiment: Write, cluster: str) -> None:
    Path("grid.toml").write_text(f'name = "grid"\nbase = "{write_experiment().name}"\n')
    for options, reason in (
        (["--address", cluster], "--fleet ray"),
        (["--fleet", "ray", "--address", "127.0.0.1:1"], "no Ray cluster answers"),
        (["--fleet", "ray", "--address", cluster, "--jobs", 99], "lower --jobs"),
    ):
        completed = call("sweep", "grid.toml", *options)
        assert completed.exit_code == 2, completed.output
        assert reason in completed.stderr


# Runs on actors that are started once

DEVICES = {"clients": {"profile": ["phone", "laptop", "workstation"], "dropout": [0.0, 0.2]}}
SERVERS: dict[str, dict[str, Any]] = {
    "fedbuff": DEVICES | {"asynchronous": {"name": "fedbuff", "buffer": 2}, "algorithm": {"name": "fedadam"}},
    "fedasync, sign-flip": DEVICES | {"asynchronous": {"name": "fedasync"}, "attack": {"name": "sign-flip", "share": 0.25}},
    "drift under privacy, whose budget ends early": {
        "privacy": {"name": "user-level", "epsilon": 4.0, "noise": 1.0, "delta": 0.01},
        "scenario": {"name": "drift", "at": 0.6},
    },
    "alie": {"attack": {"name": "alie", "share": 0.5, "start": 1}, "robust": {"name": "geometric-median"}},
    "label-flip": {"attack": {"name": "label-flip", "share": 0.5, "start": 1}, "algorithm": {"name": "scaffold"}},
    "fedsa-lora": {"algorithm": {"name": "fedsa-lora"}},
    "modality-swap": {"attack": {"name": "modality-swap", "share": 0.5}, "scenario": {"name": "aligned"}},
}

REMEMBERING = ("label-flip", "fedsa-lora")
"""Those whose clients remember something."""


def test_runs_of_many_kinds_are_the_same_in_actors(write_experiment: Write, actors: FleetBackend) -> None:
    """Asynchronous, private, attacked and personalised runs, each interrupted and resumed."""

    def interrupt(stage: str, done: int, total: int, note: str) -> None:
        if stage == "rounds" and done == 2:
            raise KeyboardInterrupt

    base = read(write_experiment(FLEET, rounds=5))
    base["train"] |= {"cohort": 1, "clients_per_round": 3}
    for name, tables in SERVERS.items():
        parts, single, ray = build(validate(base | tables)), RunDir(Path(name, "single")), RunDir(Path(name, "ray"))
        expected = execute("federated", Session(parts, parts.prepare()), single)
        with pytest.raises(KeyboardInterrupt):
            execute("federated", Session(parts, parts.prepare(), interrupt), ray, actors)
        result = execute("federated", Session(parts, parts.prepare()), ray, actors)
        for key in ("metrics", "per_client", "bytes_up", "bytes_down", "manifest_digest", "adapter_sha256", "privacy_spent"):
            assert result[key] == expected[key], (name, key)
        records = [[{**record, "seconds": 0.0} for record in run.rounds()] for run in (single, ray)]
        assert repr(records[0]) == repr(records[1]), name  # in which NaN equals itself
        memories = memories_in(MEMORY)
        assert memories == memories_in(single.path / "checkpoint" / "clients"), name
        assert bool(memories) == (name in REMEMBERING), name
        shutil.rmtree(MEMORY, ignore_errors=True)


class ActorKiller(RunDir):
    """Kills an actor after the first round."""

    killed = 0

    def save_round(self, record: Any, *arguments: Any) -> None:
        super().save_round(record, *arguments)
        if record["round"] == 0:
            threading.Thread(target=self._kill).start()

    def _kill(self) -> None:
        for pid in actor_pids()[:1]:
            os.kill(pid, signal.SIGKILL)
            self.killed += 1


def test_a_dead_actor_is_replaced_and_its_clients_train_again(write_experiment: Write, actors: FleetBackend) -> None:
    run("run", write_experiment(SCAFFOLD), "--out", "single", "--set", "train.cohort=1")
    raw = read(write_experiment(SCAFFOLD + FLEET))
    raw["train"] |= {"cohort": 1}
    parts, directory = build(validate(raw)), ActorKiller(Path("ray"))
    result = execute("federated", Session(parts, parts.prepare()), directory, actors)
    assert directory.killed == 1
    assert result["refused_updates"] == 0
    assert close(adapter(Path("single")), adapter(Path("ray")))
