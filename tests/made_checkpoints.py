"""A run's folder with every file that is read again, as a run leaves it that was killed before its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedmllm.data import manifest as manifests
from fedmllm.fleets.memory import ClientMemory
from fedmllm.storage.run_dir import RunDir
from fedmllm.storage.state_file import save_state
from fedmllm.tensors import State
from helpers import mixed, tensors

ROUNDS = 4


def state_after(rounds: int) -> State:
    return {"adapter": tensors(x=[float(rounds), 0.5]), "m": tensors(x=-float(rounds))}


def record_of(number: int) -> dict[str, Any]:
    return {"round": number, "loss": 1 / (number + 1), "bytes_up": {"adapter": 8}, "seconds": 0.25}


def made_run(path: Path, rounds: int = ROUNDS) -> RunDir:
    """A run with every file that is read again, without `result.json`."""
    run = RunDir(path)
    run.begin('name = "x"\n', {"config_digest": "d", "kind": "federated"})
    for number in range(rounds):
        run.save_round(record_of(number), state_after(number + 1), "d")
    manifests.pooled(mixed(5)).write(run.manifest)
    run.save_part("client-0", {"predictions": [{"id": "a", "score": None}], "rounds": [{"loss": float("nan")}]})
    run.save_predictions([{"id": "a", "pattern": "both", "score": 0.5}])
    ClientMemory(run.checkpoint / "clients").save(0, 0, {"control": tensors(x=[1, 2])})
    save_state(run.adapter / "adapter_model.safetensors", {"adapter": tensors(x=1)})
    run.rounds()
    return run
