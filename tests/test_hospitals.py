"""The example of three hospitals: its folders contain what real machines would have, and it runs; so does `flwr run`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from commands import call, run
from federations import adapter, close, commands, in_one_process, wait_for
from fedmllm.remote.files import FederationFile
from fedmllm.remote.supervisor import environment, tool

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "hospitals" / "run.py"


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("example") / "hospitals"
    for_containers = ["--prepare", "--host", "server", "--port", "9092"]
    subprocess.run([sys.executable, str(SCRIPT), "--out", str(out), *for_containers], check=True, capture_output=True)
    return out


def test_each_folder_contains_what_its_machine_would(hospitals: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, counts in {"north": (300, 300, 0), "south": (150, 0, 150), "east": (450, 300, 150)}.items():
        files = {path.name for path in (hospitals / name).iterdir()}
        assert files == {"ca.crt", f"{name}.key", f"{name}.pub", "pictures", "site.toml", "train.jsonl"}
        assert 'superlink = "server:9092"' in (hospitals / name / "site.toml").read_text()
        report = run("client", hospitals / name / "site.toml", "--check")
        assert (report["samples"], report["image"], report["text"]) == counts
    private = {path.name for path in (hospitals / "server").rglob("*.key")}
    assert private == {"ca.key", "server.key"}, "no site's key"
    ids = [
        {json.loads(line)["id"] for line in (hospitals / name / "train.jsonl").read_text().splitlines()}
        for name in ("north", "south", "east")
    ]
    assert sum(map(len, ids)) == len(set.union(*ids)), "no sample is at two sites"
    monkeypatch.chdir(hospitals / "server")
    assert FederationFile(hospitals / "server" / "federation.toml", []).experiment.partition.clients == 3


def test_it_does_not_overwrite_an_existing_folder(hospitals: Path) -> None:
    completed = subprocess.run([sys.executable, str(SCRIPT), "--out", str(hospitals)], capture_output=True, text=True)
    assert completed.returncode == 2
    assert "exists already" in completed.stderr


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_three_hospitals_train_the_model_of_a_single_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same adapter, which scores higher than the untrained model on the same questions."""
    out = tmp_path / "hospitals"
    command = [sys.executable, str(SCRIPT), "--out", str(out)]
    completed = subprocess.run(command, capture_output=True, text=True, timeout=1100)
    assert completed.returncode == 0, (out / "server.log").read_text()[-3000:]
    result = json.loads((out / "server" / "run" / "result.json").read_text())
    assert result["refused_updates"] == 0
    assert [row["samples"] for row in result["per_client"]] == [300, 150, 450]
    monkeypatch.chdir(out / "server")
    in_one_process(out / "server" / "federation.toml", tmp_path / "one")
    assert close(adapter(out / "server" / "run"), adapter(tmp_path / "one"))
    in_process = ["--set", "fleet.name=in-process", "--set", "partition.clients=3", "--set", "partition.name=iid"]
    zero_shot = call("baseline", "zero-shot", "experiment.toml", *in_process, "--out", "zero", "--json")
    assert zero_shot.exit_code == 0, zero_shot.output
    untrained = json.loads(zero_shot.stdout)["metrics"]["both"]["accuracy"]
    assert result["metrics"]["both"]["accuracy"] > untrained
    wait_for(lambda: not [line for line in commands().values() if str(out) in line], 30)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_flwr_run_simulates_the_shipped_app(tmp_path: Path, tiny: Path, dataset: Path) -> None:
    """Flower starts its own Ray cluster and SuperLink; the adapter is that of a single-process run."""
    file, home = tmp_path / "experiment.toml", tmp_path / "flower"
    file.write_text(
        f'name = "sim"\n[task]\nname = "jsonl"\ntrain = "{dataset / "train.jsonl"}"\ntest = "{dataset / "test.jsonl"}"\n'
        f'[partition]\nclients = 3\nname = "iid"\n[model]\nname = "{tiny}"\nprecision = "fp32"\n[model.lora]\nrank = 2\n'
        '[algorithm]\nname = "scaffold"\n[train]\nrounds = 3\nclients_per_round = 2\nlr = 5e-3\n[eval]\nbootstrap = 20\n'
    )
    home.mkdir()
    (home / "config.toml").write_text('[superlink]\ndefault = "local"\n[superlink.local]\naddress = ":local:"\n')
    env = environment(home) | {"FEDMLLM_CACHE": str(tmp_path / "cache")}
    settings = f'experiment="{file}" out="{tmp_path / "out"}"'
    nodes = "num-supernodes=3 client-resources-num-cpus=1"
    command = [tool("flwr"), "run", str(ROOT / "examples" / "flower"), "local", "--federation-config", nodes, "-c", settings]
    try:
        # Flower gives its SuperLink 15 s to start, which may be too little for the first attempt on a busy machine.
        wait_for(lambda: subprocess.run(command, env=env, capture_output=True, timeout=120).returncode == 0, 240)
        wait_for((tmp_path / "out" / "result.json").is_file, 300)
    finally:
        for pid in [pid for pid, line in commands().items() if "flower-superlink" in line and str(home) in line]:
            os.kill(pid, signal.SIGTERM)
    run("run", file, "--out", tmp_path / "single", "--set", "train.cohort=1")
    assert close(adapter(tmp_path / "out"), adapter(tmp_path / "single"))
