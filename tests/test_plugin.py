"""Parts of every kind from one file outside the package, through `--plugin`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedmllm.registry import PLUGINS
from plugin_process import commands, python

PARTS = '''
"""One part of each kind."""

from dataclasses import replace

import numpy as np
import torch

from fedmllm.algorithms import Algorithm, algorithms, compressions, regularizations
from fedmllm.algorithms.base import Wrapper, in_order
from fedmllm.algorithms.compression import compressed
from fedmllm.algorithms.fedprox import proximal
from fedmllm.algorithms.fedavg import fedavg
from fedmllm.data.partitions import Deal, partitions
from fedmllm.data.prompts import Strategy, prompts
from fedmllm.data.samples import Sample, Task
from fedmllm.data.scenarios import BOTH, Scenario, scenarios
from fedmllm.data.tasks import tasks
from fedmllm.models.families import Family, families


@algorithms.register("loss-weighted")
def loss_weighted(*, power: float = 1.0) -> Algorithm:
    """Weight clients by a power of their loss, which reaches the server in the metrics."""
    plain = fedavg()

    def aggregate(state, updates, info):
        weights = [update.metrics["loss"] ** power for update in in_order(updates)]
        adapters = [update.groups["adapter"] for update in in_order(updates)]
        new = {
            name: sum(w * adapter[name] for w, adapter in zip(weights, adapters, strict=True)) / sum(weights)
            for name in state["adapter"]
        }
        return {**state, "adapter": new}

    return replace(plain, aggregate=aggregate, averages=None)


@regularizations.register("weak")
def weak(*, mu: float = 0.001) -> Wrapper:
    """A weak proximal term."""
    return lambda algorithm: proximal(algorithm, mu)


@compressions.register("half")
def half() -> Wrapper:
    """Two bytes per number."""

    def pack(change, client, info):
        return {"half": {name: tensor.half() for name, tensor in change.items()}}

    def unpack(packed, shapes):
        return {name: packed["half"][name].to(shape.dtype) for name, shape in shapes.items()}

    return lambda algorithm: compressed(algorithm, pack, unpack, feedback=False)


@scenarios.register("alternating")
def alternating() -> Scenario:
    """Clients of odd number see no text in samples that have an image."""

    def visible(sample, client, rng):
        return sample.modalities - {"text"} if client % 2 and "image" in sample.modalities else sample.modalities

    return Scenario(lambda number, rng: [BOTH] * number, visible)


@partitions.register("in-turn")
def in_turn() -> Deal:
    """One sample to each client in turn."""
    return lambda samples, clients, rng: np.resize(np.array(clients, dtype=np.int64), len(samples))


@prompts.register("polite")
def polite(*, word: str = "Please") -> Strategy:
    """A question with a polite word."""
    return lambda question, visible: f"{word}: {question}"


@tasks.register("sums")
def sums(*, train: int = 24, test: int = 8) -> Task:
    """Sums of small numbers."""

    def load(split):
        for i in range(train if split == "train" else test):
            answer = str(i % 3 + i % 2)
            yield Sample(f"sums/{split}/{i:02d}", f"{i % 3} + {i % 2} = ?", answer, text="a sum", choices=("0", "1", "2", "3"),
                         lettered=True, label=answer)

    return Task("sums", "accuracy", load)


@families.register("new_vl")
def new_vl() -> Family:
    """A family that counts positions from 0."""
    return Family(first_position=0)
'''

CHECKS = """
from pathlib import Path
import sys
from fedmllm.algorithms import algorithms
from fedmllm.registry import load_plugin
from fedmllm import testing

load_plugin(Path(sys.argv[1]))
testing.check_algorithm("loss-weighted", power=2.0)
algorithms.names = lambda: ["loss-weighted", "scaffold"]  # checking a wrapper around all of them takes long
testing.check_regularization("weak")
testing.check_compression("half")
testing.check_scenario("alternating")
testing.check_partition("in-turn")
testing.check_prompt("polite", word="Kindly")
testing.check_task("sums", train=12)
testing.check_family("new_vl")
print("checked")
"""

NEW = {
    "algorithms": "loss-weighted", "regularizations": "weak", "compressions": "half", "scenarios": "alternating",
    "partitions": "in-turn", "prompts": "polite", "tasks": "sums", "models": "new_vl",
}  # fmt: skip


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    path = tmp_path / "parts.py"
    path.write_text(PARTS)
    return path


def experiment(folder: Path, model: Path) -> Path:
    """An experiment of plug-in parts only."""
    path = folder / "own.toml"
    path.write_text(
        'name = "own"\n[task]\nname = "sums"\n[partition]\nname = "in-turn"\nclients = 3\n[scenario]\nname = "alternating"\n'
        '[prompt]\nname = "polite"\nword = "Kindly"\n'
        f'[model]\nname = "{model}"\nprecision = "fp32"\n[model.lora]\nrank = 2\nalpha = 4\n'
        '[algorithm]\nname = "loss-weighted"\n[regularization]\nname = "weak"\n[compression]\nname = "half"\n'
        "[train]\nrounds = 2\nclients_per_round = 2\nbatch_size = 4\n[eval]\nbootstrap = 20\nmax_new_tokens = 2\n"
    )
    return path


def test_a_part_of_each_kind_is_listed_checked_and_run(tmp_path: Path, tiny: Path, plugin: Path) -> None:
    file = experiment(tmp_path, tiny)
    (tmp_path / "grid.toml").write_text(
        'name = "grid"\nbase = "own.toml"\nseeds = [0]\n[[axes]]\nname = "power"\n'
        'cells = [{ name = "1", set = { "algorithm.power" = 1.0 } }]\n'
    )
    (tmp_path / "twice.py").write_text(
        'from fedmllm.algorithms import algorithms\n\n@algorithms.register("fedavg")\ndef again():\n    """Again."""\n'
    )
    lines: list[list[object]] = [["list", kind, "--plugin", plugin, "--json"] for kind in NEW]
    lines += [["check", file, "--plugin", plugin, "--json"], ["run", file, "--plugin", plugin, "--json", "--out", "alone"]]
    lines += [["sweep", "grid.toml", "--plugin", plugin, "--json"], ["list", "algorithms", "--plugin", tmp_path / "twice.py"]]
    *listed, checked, ran, swept, twice = commands(lines, tmp_path)
    for name, (status, out, error) in zip(NEW.values(), listed, strict=True):
        assert status == 0, error
        assert name in [part["name"] for part in json.loads(out)]
    assert checked[0] == ran[0] == 0, checked[2] + ran[2]
    result: dict[str, Any] = json.loads(ran[1])
    assert (result["algorithm"], result["regularization"], result["compression"]) == ("loss-weighted", "weak", "half")
    assert result["bytes_up"].keys() == {"half"}
    assert result["refused_updates"] == 0
    # The sweep's run is a process of its own, which gets the plug-in through the environment.
    assert swept[0] == 0, swept[2]
    (child,) = (tmp_path / "runs" / "grid").rglob("result.json")
    assert json.loads(child.read_text())["adapter_sha256"] == result["adapter_sha256"]
    assert_one_sentence(
        twice, "algorithm 'fedavg' is registered twice, by fedmllm.algorithms.fedavg and ", "twice.py; rename one"
    )


def test_the_checks_of_the_package_accept_the_parts(tmp_path: Path, plugin: Path) -> None:
    assert python(CHECKS, str(plugin), folder=tmp_path).endswith("checked\n")


def test_a_plugin_in_the_environment_is_found(tmp_path: Path, plugin: Path) -> None:
    code = "from fedmllm.data.prompts import prompts; print(prompts.names())"
    assert "polite" not in python(code, folder=tmp_path)
    assert "polite" in python(code, folder=tmp_path, **{PLUGINS: str(plugin)})


def assert_one_sentence(done: tuple[int, str, str], *sentences: str) -> None:
    status, out, error = done
    assert status == 2, out + error
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, error
    assert "Traceback" not in error
    for sentence in sentences:
        assert sentence in lines[0]


def test_a_plugin_that_cannot_be_used_is_one_sentence_and_status_2(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import no_such_library\n")
    (tmp_path / "syntax.py").write_text("def broken(:\n")
    (tmp_path / "notes.txt").write_text("x = 1\n")
    first = tmp_path / "first.py"  # registered before the package's own part is found
    first.write_text(
        'from fedmllm.data.prompts import prompts\n\n@prompts.register("modality-specific")\ndef own():\n    """Own."""\n'
    )
    files = ("missing.py", "broken.py", "syntax.py", "notes.txt", "first.py")
    results = commands([["list", "prompts", "--plugin", tmp_path / name] for name in files], tmp_path)
    for name, done in zip(files[:-1], results, strict=False):
        assert_one_sentence(done, f"--plugin {tmp_path / name}: ")
    assert_one_sentence(results[0], "there is no such file")
    assert_one_sentence(results[1], "cannot be imported (ModuleNotFoundError: No module named 'no_such_library')")
    assert_one_sentence(results[2], "cannot be imported (SyntaxError: ")
    assert_one_sentence(results[3], "is not a Python file; give one that ends in .py")
    assert_one_sentence(results[4], f"prompt 'modality-specific' is registered twice, by {first} and ", "rename one of them")
