"""Whole runs on a tiny model, through the command line as a user would type it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from commands import call, run
from fedmllm.cli.list import PartKinds
from fedmllm.runs import kinds
from fedmllm.storage.run_dir import RunDir
from made_files import RESULT

Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_run_leaves_what_the_design_promises(write_experiment: Write) -> None:
    result = run("run", write_experiment("every = 1\n"))
    folder = RunDir(Path("runs/small-federated-seed0"))
    assert folder.result() == result
    keys = (
        "schema name kind task scenario partition algorithm regularization prompt model seed primary_metric metrics "
        "per_client rounds bytes_up bytes_down seconds peak_memory_mb config_digest manifest_digest adapter_sha256 "
        "skipped_samples refused_updates"
    )
    assert set(keys.split()) <= result.keys()
    assert RESULT.keys() == result.keys(), "the strategies of the fuzz tests know every key"
    assert result["kind"] == "federated"
    assert set(result["metrics"]) == {"both", "image", "text"}
    both = result["metrics"]["both"]
    assert both["n"] == 12
    assert both["accuracy_ci"][0] <= both["accuracy"] <= both["accuracy_ci"][1]
    files = {p.name for p in folder.path.iterdir()}
    written = "config.toml meta.json manifest.parquet rounds.jsonl predictions.jsonl checkpoint adapter result.json run.log"
    assert files == set(written.split())
    hardware = folder.meta()["hardware"]
    assert hardware["processor"] == torch.cpu.get_capabilities().get("cpu_name")
    assert hardware["kernels"] == torch.backends.cpu.get_cpu_capability()
    records = folder.rounds()
    assert [r["round"] for r in records] == [0, 1, 2]
    assert [bool(r["metrics"]) for r in records] == [True, True, False]
    adapter_bytes = sum(p.numel() * 4 for p in _adapter(folder.path).values())
    assert result["bytes_up"] == result["bytes_down"] == {"adapter": 3 * 2 * adapter_bytes}
    assert pq.read_table(folder.manifest).num_rows == 30
    predictions = [json.loads(line) for line in (folder.path / "predictions.jsonl").read_text().splitlines()]
    correct = [p["correct"] for p in predictions if p["pattern"] == "both"]
    assert both["accuracy"] == pytest.approx(sum(correct) / 12, abs=1e-6)


def _adapter(folder: Path) -> dict[str, torch.Tensor]:
    from fedmllm.models.adapter import read_adapter

    return read_adapter(folder / "adapter")


def test_twice_the_same_and_a_new_directory_each_time(write_experiment: Write) -> None:
    file = write_experiment()
    first, second = run("run", file), run("run", file)
    assert first["adapter_sha256"] == second["adapter_sha256"]
    assert first["metrics"] == second["metrics"]
    assert RunDir(Path("runs/small-federated-seed0-2")).complete
    other = run("run", file, "--set", "seed=1")
    assert other["adapter_sha256"] != first["adapter_sha256"]


def test_two_runs_started_at_the_same_moment(write_experiment: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is done from start to end while the first one loads its model."""
    file, prepare, inner = write_experiment(rounds=1), kinds.prepare_run, list[dict[str, Any]]()

    def slowly(*args: Any) -> Any:
        prepared = prepare(*args)
        if not inner:
            inner.append({})
            inner[0] = run("run", file)
        return prepared

    monkeypatch.setattr(kinds, "prepare_run", slowly)
    outer = run("run", file)
    folders = [RunDir(Path("runs") / name) for name in ("small-federated-seed0", "small-federated-seed0-2")]
    assert [folder.result() for folder in folders] == [inner[0], outer]
    assert sorted(p.name for p in Path("runs").iterdir()) == [folder.path.name for folder in folders]


@pytest.mark.parametrize("scenario", ["aligned", "missing", "cross", "hybrid"])
def test_every_scenario_by_set(write_experiment: Write, scenario: str) -> None:
    result = run("run", write_experiment(rounds=1), "--set", f"scenario.name={scenario}")
    assert result["scenario"] == scenario
    assert result["rounds"] == 1


def test_baselines(write_experiment: Write) -> None:
    file = write_experiment()
    zero = run("baseline", "zero-shot", file)
    assert (zero["kind"], zero["rounds"], zero["adapter_sha256"], zero["bytes_up"]) == ("zero-shot", 0, None, {})
    local = run("baseline", "local", file)
    assert len(local["per_client"]) == 4
    scores = [row["metrics"]["both"]["accuracy"] for row in local["per_client"]]
    assert local["metrics"]["both"]["accuracy"] == pytest.approx(sum(scores) / 4, abs=1e-5)
    # 3 rounds × 2 of 4 clients: each client takes part in 1.5 rounds on average, rounded to 2.
    assert local["rounds"] == 4 * 2
    assert local["bytes_up"] == {}
    pooled = run("baseline", "centralised", file)
    assert pooled["rounds"] == 2
    assert [row["samples"] for row in pooled["per_client"]] == [30]


def test_one_client_equals_centralised(write_experiment: Write) -> None:
    """All data on one client, aligned, in every round: the federation is the centralised run."""
    same = ["partition.clients=1", "train.clients_per_round=1", "scenario.name=aligned"]
    arguments = [word for setting in same for word in ("--set", setting)]
    file = write_experiment()
    assert run("run", file, *arguments)["adapter_sha256"] == run("baseline", "centralised", file, *arguments)["adapter_sha256"]


def test_eval_and_compare(write_experiment: Write) -> None:
    file = write_experiment()
    result = run("run", file, "--out", "a")
    again = run("eval", "a", "--trust-config", "--patterns", "image,both")
    assert again["metrics"]["both"] == result["metrics"]["both"]
    assert again["metrics"].keys() == {"image", "both"}
    run("baseline", "zero-shot", file, "--out", "b")
    table = call("compare", "a", "b")
    assert table.exit_code == 0
    assert "fedavg" in table.stdout
    assert "zero-shot" in table.stdout
    assert [r["kind"] for r in json.loads(call("compare", "a", "b", "--json").stdout)] == ["federated", "zero-shot"]


def test_eval_on_another_task(write_experiment: Write, dataset: Path) -> None:
    """A federation's adapter on questions of a task that none of its clients had."""
    companion = f'train = "{dataset / "train.jsonl"}"\ntest = "{dataset / "test.jsonl"}"\n'
    file = write_experiment(rounds=1)
    file.write_text(
        file.read_text().replace(companion, companion + 'companion = { name = "shapes-qa", train = 4, test = 3 }\n')
    )
    result = run("run", file, "--out", "a")
    assert result["metrics"]["both"]["n"] == 15
    other = ("--set", "task.name=shapes-qa", "--set", "task.train=5", "--set", "task.test=7", "--patterns", "text")
    evaluated = run("eval", "a", "--trust-config", *other)
    assert (evaluated["task"], evaluated["metrics"]["text"]["n"]) == ("shapes-qa", 7)
    assert run("eval", "a", "--trust-config", *other) == evaluated
    assert "task.companion is the companion of" in call("eval", "a", "--trust-config", *other).stderr
    for wrong, sentence in [
        ("train.lr=1", "the run is trained; only [task], [eval] and [prompt] can be set"),
        ("task.name=shape-qa", "did you mean 'shapes-qa'?"),
    ]:
        done = call("eval", "a", "--trust-config", "--set", wrong)
        assert done.exit_code == 2
        assert sentence in done.stderr
    assert run("eval", "a", "--trust-config")["metrics"] == result["metrics"], "the run itself is as it was"
    Path("a", "adapter").rename("elsewhere")
    assert "a has no adapter to evaluate: its kind is 'federated'" in call("eval", "a", "--trust-config").stderr


def test_partition_writes_manifest_and_picture(write_experiment: Write) -> None:
    made = run("partition", write_experiment(), "--out", "m.parquet", "--plot", "m.html")
    assert sum(row["samples"] for row in made["clients"]) == 30
    assert pq.read_table("m.parquet").column_names == ["sample_id", "client", "has_image", "has_text"]
    page = Path("m.html").read_text()
    assert page.count("client 3") >= 2
    assert "<svg" in page
    assert " samples, as drawn: " in page  # what the command prints


def test_check_trains_nothing(write_experiment: Write) -> None:
    summary = run("check", write_experiment())
    assert (summary["train_samples"], summary["test_samples"], summary["skipped_samples"]) == (30, 12, 0)
    assert summary["adapter_bytes"] == 4 * summary["adapter_parameters"]
    assert not Path("runs").exists()


@pytest.mark.parametrize("kind", list(PartKinds))
def test_list(kind: str) -> None:
    listed = json.loads(call("list", kind, "--json").stdout)
    assert listed
    assert all(part["name"] and part["description"].endswith((".", ")")) for part in listed)
    shown = " ".join(call("list", kind).stdout.split())
    assert listed[0]["name"] in shown
    # Extras such as [openmoji] in a description are not markup.
    assert all("[" not in part["description"] or part["description"][:60] in shown for part in listed)


BAD = [
    (["--set", "train.ruonds=3"], "train.ruonds: unknown key; did you mean 'rounds'?"),
    (["--set", "scenario.name=hybird"], "there is no scenario 'hybird'; did you mean 'hybrid'?"),
    (["--set", "scenario.presnce=0.5"], "scenario.presnce: unknown key for scenario 'hybrid'; did you mean 'presence'?"),
    (["--set", "train.rounds=0"], "train.rounds: input should be greater than or equal to 1, got 0"),
    (["--set", "train.rounds=two"], "train.rounds: input should be a valid integer, got 'two'"),
    (["--set", "partition.clients=50"], "partition.clients = 50 with min_samples = 1 needs 50 samples and there are 30"),
    (["--set", "train.clients_per_round=9"], "train.clients_per_round = 9 is more than partition.clients = 4"),
    (["--set", "task.train=absent.jsonl"], "absent.jsonl is missing or cannot be read"),
    (["--set", "algorithm.name=fedavgg"], "there is no algorithm 'fedavgg'; did you mean 'fedavg'?"),
    (["--set", "model.name=absent"], "model.name = 'absent' cannot be loaded"),
    (["--set", "rounds"], "--set rounds: write it as key=value"),
]


@pytest.mark.parametrize(("arguments", "sentence"), BAD, ids=[a[-1] for a, _ in BAD])
def test_bad_input_is_one_sentence_and_status_2(write_experiment: Write, arguments: Sequence[str], sentence: str) -> None:
    done = call("run", write_experiment(), *arguments)
    assert done.exit_code == 2
    assert sentence in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in done.output
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"id": "x", "answer": "red", "question": "which?", "image": "gone.png"}', "gone.png is missing"),
        ('{"id": "x", "answer": "red", "quest', "the line is not valid JSON"),
    ],
    ids=["missing picture", "truncated line"],
)
def test_a_bad_sample_is_named(write_experiment: Write, dataset: Path, line: str, sentence: str) -> None:
    shutil.copytree(dataset, "copy")
    Path("copy/bad.jsonl").write_text((dataset / "train.jsonl").read_text() + line + "\n")
    arguments = ["run", write_experiment(rounds=1), "--set", "task.train=copy/bad.jsonl"]
    done = call(*arguments)
    assert done.exit_code == 2
    assert sentence in done.stderr
    assert "bad.jsonl, line 31" in done.stderr
    assert run(*arguments, "--set", "task.on_bad_sample=skip")["skipped_samples"] == 1


@pytest.mark.parametrize(
    ("name", "option", "remedy"),
    [
        ("fedavg", "server_lr=1e39", "lower algorithm.server_lr = 1e+39 or train.lr = 0.005, and start"),
        # After one local step LoRA's A is unchanged, because B was 0: the step divides 0 by 0.
        ("fedadam", "tau=1e-300", "or raise algorithm.tau = 1e-300, and start"),
    ],
)
def test_a_servers_step_that_overflows_is_no_result(write_experiment: Write, name: str, option: str, remedy: str) -> None:
    settings = ["--set", f"algorithm.name={name}", "--set", f"algorithm.{option}", "--set", "train.batch_size=64"]
    done = call("run", write_experiment(rounds=1), "--out", "a", *settings)
    assert done.exit_code == 2
    assert "error: round 0: the server's step overflowed (NaN or infinity in 'adapter/" in done.stderr
    assert remedy in done.stderr
    assert not RunDir(Path("a")).complete
    assert not RunDir(Path("a")).adapter.exists()


def test_a_full_directory_is_left_alone(write_experiment: Write) -> None:
    Path("full").mkdir()
    Path("full/precious").write_text("keep")
    done = call("run", write_experiment(), "--out", "full")
    assert done.exit_code == 2
    assert "full is not empty" in done.stderr
    assert [p.name for p in Path("full").iterdir()] == ["precious"]


def test_not_a_run_directory() -> None:
    done = call("compare", ".")
    assert done.exit_code == 2
    assert "is not a run directory" in done.stderr


def test_compare_skips_what_is_no_complete_run(write_experiment: Write, tmp_path: Path) -> None:
    run("baseline", "zero-shot", write_experiment(), "--out", "runs/a")
    (tmp_path / "runs" / "grid").mkdir()
    (tmp_path / "runs" / "grid" / "sweep.json").write_text("{}")
    (tmp_path / "runs" / "begun").mkdir()
    done = call("compare", "runs/a", "runs/begun", "runs/grid", "--json")
    assert done.exit_code == 0
    assert [row["run"] for row in json.loads(done.stdout)] == ["runs/a"]
    assert "note: runs/grid is a sweep's folder" in done.stderr
    assert "note: runs/begun is not a complete run" in done.stderr
    assert call("compare", "runs/begun", "runs/grid").exit_code == 2
