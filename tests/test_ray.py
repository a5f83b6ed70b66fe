"""Ray as a fleet: the same numbers, and an actor that dies."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from commands import call, run
from federations import adapter, close, commands, is_open, wait_for
from fedmllm.api import fleet_backend
from fedmllm.config import read, validate
from fedmllm.errors import ConfigError
from fedmllm.experiment.parts import build
from fedmllm.fleets.memory import ClientMemory
from fedmllm.remote import ray_sweep as spread
from fedmllm.remote.actors import ATTEMPTS, LARGEST, ActorTransport, Packed, resources, split
from fedmllm.remote.actors import cluster as on_cluster
from fedmllm.remote.protocol import Job, Reply, to_bytes
from fedmllm.remote.supervisor import free_port, tool
from fedmllm.runs.kinds import execute
from fedmllm.runs.session import Session
from fedmllm.storage.run_dir import RunDir

pytest.importorskip("ray")
pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::ResourceWarning")]
Write = Callable[..., Path]
FLEET = '[fleet]\nname = "ray"\nactors = 2\ncpus = 0.5\n'


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDMLLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster that was there before; it serves all runs here but one, as starting one takes long."""
    port, home = free_port(), Path(tempfile.mkdtemp(prefix="ray-"))  # a short path: Ray keeps sockets there
    command = [
        tool("ray"), "start", "--head", "--block", "--port", str(port), "--node-ip-address", "127.0.0.1", "--num-cpus", "2",
        "--include-dashboard", "false", "--temp-dir", str(home), "--disable-usage-stats",
        "--object-store-memory", str(100 << 20),
    ]  # fmt: skip
    with (home / "head.log").open("wb") as log:
        head = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(lambda: is_open(port), 60)
        yield f"127.0.0.1:{port}"
        assert head.poll() is None
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        head.wait(30)
        shutil.rmtree(home, ignore_errors=True)


def test_clients_are_dealt_evenly_and_none_twice() -> None:
    for count in range(12):
        for actors in range(1, 6):
            parts = split(list(range(count)), actors)
            assert [c for part in parts for c in part] == list(range(count))
            sizes = [len(part) for part in parts]
            assert not sizes or (max(sizes) - min(sizes) <= 1 and min(sizes) >= 1)


@pytest.mark.parametrize(
    ("options", "there", "expected"),
    [
        ((None, None, None), (16, 4), (4, 4, 1)),
        ((None, None, None), (16, 0), (4, 4, 0)),
        ((None, None, None), (2, 0), (1, 2, 0)),
        ((2, None, None), (16, 4), (2, 8, 1)),
        ((None, 2, None), (16, 0), (8, 2, 0)),
        ((None, None, 0.5), (16, 2), (4, 4, 0.5)),
        ((3, None, 0), (16, 4), (3, 5, 0)),
    ],
)
def test_an_actor_has_a_gpu_or_a_share_of_the_cores(
    options: tuple[Any, Any, Any], there: tuple[float, float], expected: tuple[int, float, float]
) -> None:
    asked = dict(zip(("actors", "cpus", "gpus"), options, strict=True))
    assert resources(asked, dict(zip(("CPU", "GPU"), there, strict=True))) == expected


def test_no_actor_asks_for_more_cores_than_a_machine_has() -> None:
    there = {"CPU": 16.0, "GPU": 0.0, LARGEST: 8.0}
    assert resources({"actors": 1, "cpus": None, "gpus": None}, there) == (1, 8, 0)
    with pytest.raises(ConfigError, match="1 actors of 12 cores"):
        resources({"actors": 1, "cpus": 12, "gpus": None}, there)


@pytest.mark.parametrize("options", [(9, None, None), (2, 16, None), (1, None, 5)])
def test_more_than_there_is_is_refused(options: tuple[Any, Any, Any]) -> None:
    with pytest.raises(ConfigError, match=r"lower fleet\.actors, fleet\.cpus or fleet\.gpus"):
        resources(dict(zip(("actors", "cpus", "gpus"), options, strict=True)), {"CPU": 8.0, "GPU": 4.0})


@pytest.mark.parametrize(("name", "own"), [("scaffold", True), ("fedsa-lora", False)])
def test_a_run_in_actors_is_the_run_in_process(write_experiment: Write, name: str, own: bool, cluster: str) -> None:
    """With cohorts of one, and methods that remember: bits and all. On a cluster of its own, and on one that is there."""
    address = [] if own else ["--set", f"fleet.address={cluster}"]
    extra = f'[algorithm]\nname = "{name}"\n'
    here = run("run", write_experiment(extra), "--out", "here", "--set", "train.cohort=1")
    there = run("run", write_experiment(extra + FLEET), "--out", "there", "--set", "train.cohort=1", *address)
    for key in ("metrics", "per_client", "rounds", "bytes_up", "bytes_down", "manifest_digest", "adapter_sha256"):
        assert there[key] == here[key], key
    one, other = (
        {p.relative_to(f): p.read_bytes() for p in (f / "checkpoint/clients").rglob("*") if p.is_file()}
        for f in (Path("here"), Path("there"))
    )
    assert other
    assert other.items() <= one.items(), "what clients remember is in the run's directory, as ever"
    assert not [text for text in commands().values() if "ray::_Actor" in text]


def test_a_cluster_that_is_there_is_used_and_left_alone(
    write_experiment: Write, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", cluster)  # "auto" looks there first, then for what `ray start` notes in /tmp/ray
    here = run("run", write_experiment(), "--out", "here", "--set", "train.cohort=1")
    there = run(
        "run", write_experiment(FLEET), "--out", "there", "--set", "train.cohort=1", "--set", f"fleet.address={cluster}"
    )
    assert there["adapter_sha256"] == here["adapter_sha256"]
    assert is_open(int(cluster.rpartition(":")[2]))


class Killing(RunDir):
    """Kills an actor in round 1, and the one that replaced it once more."""

    killed = 0

    def save_round(self, record: Any, *more: Any) -> None:
        super().save_round(record, *more)
        if record["round"] == 0:
            threading.Thread(target=self._kill).start()

    def _kill(self) -> None:
        for pid, text in commands().items():
            if text.startswith("ray::_Actor"):
                os.kill(pid, signal.SIGKILL)
                self.killed += 1
                return


def test_an_actor_that_dies_is_replaced_and_its_clients_train_again(write_experiment: Write, cluster: str) -> None:
    extra = '[algorithm]\nname = "scaffold"\n'
    run("run", write_experiment(extra), "--out", "here", "--set", "train.cohort=1")
    config = validate(read(write_experiment(f'{extra}{FLEET}address = "{cluster}"\n')))
    config = config.model_copy(update={"train": config.train.model_copy(update={"cohort": 1})})
    parts, directory = build(config), Killing(Path("there"))
    with fleet_backend(parts) as backend:
        result = execute("federated", Session(parts, parts.prepare()), directory, backend)
    assert directory.killed == 1
    assert result["refused_updates"] == 0
    assert close(adapter(Path("here")), adapter(Path("there")))


def test_an_actor_that_always_dies_costs_its_clients_the_round_and_no_one_else(tmp_path: Path, cluster: str) -> None:
    import ray

    class Actor:
        def __init__(self, dies: bool) -> None:
            self.dies = dies

        def answer(self, work: list[Packed]) -> list[Packed]:
            if self.dies:
                os._exit(1)
            return [(to_bytes(Reply(0, examples=len(work))), memory) for _, memory in work]

    made: list[int] = []
    with on_cluster(cluster):
        remote = ray.remote(num_cpus=0.5)(Actor)

        def make(number: int) -> Any:
            made.append(number)
            return remote.remote(number == 1)

        post = ActorTransport(2, make, ClientMemory(tmp_path))
        replies = post.exchange({c: Job("train", "ab" * 8, "", c) for c in (3, 5, 8)}, 120)
        assert replies[3].examples == 1
        assert [replies[c].problem for c in (5, 8)] == [f"its actor died {ATTEMPTS} times (ActorDiedError)"] * 2
        assert made == [0, 1, *[1] * ATTEMPTS]
        post.end()


def test_a_round_has_an_end(write_experiment: Write, cluster: str) -> None:
    done = call("run", write_experiment(f'{FLEET}timeout = 0.01\naddress = "{cluster}"\n'), "--out", "out")
    assert done.exit_code == 1
    assert "no answer within 0.01 s" in done.stderr


@pytest.mark.parametrize("option", ["actors = 0", "cpus = -1.0", "gpus = -0.5", "timeout = 0.0"])
def test_options_that_cannot_be_are_refused(write_experiment: Write, option: str) -> None:
    done = call("run", write_experiment(f'[fleet]\nname = "ray"\n{option}\n'))
    assert done.exit_code == 2
    assert "fleet: " in done.stderr


AXES = """
[[axes]]
name = "method"
cells = [
    { name = "zero-shot", kind = "zero-shot" },
    { name = "FedAvg" },
    { name = "nothing", set = { "model.name" = "gone" } },
]
"""


def test_a_sweep_spreads_its_runs_and_tells_of_those_that_fail(write_experiment: Write, cluster: str) -> None:
    file = Path("grid.toml")
    file.write_text(f'name = "grid"\nbase = "{write_experiment(rounds=1).name}"\n{AXES}')
    done = call("sweep", file, "--fleet", "ray", "--address", cluster, "--jobs", 2, "--json")
    assert done.exit_code == 1
    cells = json.loads(done.stdout)["cells"]
    assert [cell["state"] for cell in cells] == ["complete", "complete", "failed"]
    assert cells[2]["error"].startswith("exit status 2: error: model.name")
    made = RunDir(Path("runs/grid") / cells[1]["id"]).result()
    run("run", Path("runs/grid") / f"{cells[1]['id']}.toml", "--out", "here")
    assert made["adapter_sha256"] == RunDir(Path("here")).result()["adapter_sha256"]


def test_a_sweeps_folder_must_be_seen_where_its_runs_are(tmp_path: Path) -> None:
    status, said = spread._run(["run"], str(tmp_path / "none.toml"), str(tmp_path), "1")
    assert status == 2
    assert "give an --out that all machines of the cluster share" in said


def test_a_sweep_is_told_what_is_wrong_in_one_sentence(write_experiment: Write, cluster: str) -> None:
    Path("grid.toml").write_text(f'name = "grid"\nbase = "{write_experiment().name}"\n')
    for options, why in (
        (["--address", cluster], "--address goes with --fleet ray"),
        (["--fleet", "ray", "--address", "127.0.0.1:1"], "no Ray cluster answers"),
        (["--fleet", "ray", "--address", cluster, "--jobs", 99], "lower --jobs"),
    ):
        done = call("sweep", "grid.toml", *options)
        assert done.exit_code == 2, done.output
        assert why in done.stderr


def test_a_cluster_that_is_not_there_is_one_sentence(write_experiment: Write) -> None:
    done = call("run", write_experiment(FLEET + 'address = "127.0.0.1:1"\n'), "--out", "out")
    assert done.exit_code == 2, done.output
    assert "no Ray cluster answers" in done.stderr
    assert not Path("out").exists()


def test_ray_that_is_not_installed_is_one_sentence(write_experiment: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmllm.cli.remote.find_spec", lambda name: None)
    done = call("run", write_experiment(FLEET))
    assert done.exit_code == 2
    assert done.stderr.strip().endswith('ray is not installed; `pip install "fedmllm[ray]"` brings it.')


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    wait_for(lambda: not [text for text in commands().values() if text.startswith("ray::_Actor")], 20)
