"""Every algorithm, adapter and wrapper through the command line, on the tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from commands import call, run, settings
from fedmllm.algorithms import algorithms, compressions
from fedmllm.config import read, validate
from fedmllm.data.prompts import Conversation
from fedmllm.models.adapter import read_adapter
from fedmllm.models.mllm import MLLM
from fedmllm.models.scoring import option_scores
from fedmllm.storage.run_dir import RunDir
from fedmllm.storage.state_file import load_state
from fedmllm.tensors import State

Write = Callable[..., Path]
UNEQUAL = [name for name in algorithms.names() if algorithms.build(name, {}).unequal_ranks]


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def checkpoint(folder: str) -> State:
    return load_state(Path(folder) / "checkpoint" / "server.safetensors")[0]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_scaffolds_variates_move(write_experiment: Write, optimizer: str) -> None:
    run("run", write_experiment(), *settings(algorithm__name="scaffold", train__optimizer=optimizer), "--out", "a")
    assert all(bool(c.any()) for c in checkpoint("a")["control"].values())
    memories = sorted(Path("a/checkpoint/clients").rglob("*.safetensors"))
    assert memories
    for path in memories:
        assert all(bool(c.any()) for c in load_state(path)[0]["control"].values())


def test_scaffold_on_the_model_is_the_papers_option_two_under_plain_sgd(write_experiment: Write) -> None:
    """One round from c = c_k = 0: c_k⁺ = (w − w_k) / (τ_k η_l), from what the client really sent and remembered."""
    parts = {
        "algorithm__name": "scaffold", "train__optimizer": "sgd", "train__clip": 0, "train__lr": 0.05,
        "train__clients_per_round": 1, "train__rounds": 1, "train__schedule": "constant",
    }  # fmt: skip
    result = run("run", write_experiment(), *settings(**parts), "--out", "a")
    (client,) = RunDir(Path("a")).rounds()[0]["sampled"]
    steps = RunDir(Path("a")).rounds()[0]["steps"]
    run("run", write_experiment(), *settings(**{**parts, "train__lr": 1e-12}), "--out", "start")  # all but untouched
    start, state = checkpoint("start")["adapter"], checkpoint("a")
    (memory,) = Path("a/checkpoint/clients").glob(f"client-{client}/*")
    for name, c in load_state(memory)[0]["control"].items():
        option_two = (start[name] - state["adapter"][name]) / (steps * 0.05)
        torch.testing.assert_close(c, option_two, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(state["control"][name], c / 4)
    assert result["bytes_up"].keys() == {"adapter", "control"}


# What is exported


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("name", ["fedavg", "flora", "fedex-lora", "flexlora"])
def test_the_adapter_folder_is_the_model_of_the_run(write_experiment: Write, tiny: Path, name: str) -> None:
    """Loaded with PEFT alone, it scores options as the run's state does, and not as the base; a fold is inside."""
    run("run", write_experiment(), *settings(algorithm__name=name, train__lr=0.05), "--out", "a")
    experiment = validate(read(Path("a/config.toml")))
    model, state = MLLM.load(experiment.model, experiment.seed), checkpoint("a")
    talks = [Conversation("Text: a red thing\nwhich?", "(A) red", image=False, options=("(A) red", "(B) blue"))]
    batch = model.encode(talks, [None], 200)
    with model.without_adapter():
        base_scores = option_scores(model, batch)
    model.adapter.set_fold(state.get("fold", {}))
    model.adapter.set(state["adapter"])
    expected = torch.tensor(option_scores(model, batch))
    assert (expected - torch.tensor(base_scores)).abs().max() > 1e-3, "the run changed nothing"
    plain = AutoModelForImageTextToText.from_pretrained(tiny, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(plain, "a/adapter").eval().get_base_model()
    model.backbone = replace(model.backbone, model=loaded)
    torch.testing.assert_close(torch.tensor(option_scores(model, batch)), expected, rtol=1e-4, atol=1e-5)
    with_fold = name in ("flora", "fedex-lora")
    assert (json.loads(Path("a/adapter/adapter_config.json").read_text())["r"] > 2) == with_fold
    assert ("fold" in state) == with_fold


@pytest.mark.parametrize("name", ["fedavg", "flora", "fedsa-lora", "feddpa"])
def test_eval_repeats_the_runs_figures(write_experiment: Write, name: str) -> None:
    file = write_experiment()
    result = run("run", file, *settings(algorithm__name=name, train__lr=0.1), "--out", "a")
    assert result["metrics"] != run("baseline", "zero-shot", file)["metrics"], "the run changed nothing"
    assert run("eval", "a", "--trust-config")["metrics"] == result["metrics"]


# Personalised methods


def test_personalised_each_client_is_tested_with_its_own_model(write_experiment: Write) -> None:
    result = run("run", write_experiment(), *settings(algorithm__name="fedsa-lora"), "--out", "a")
    rows = result["per_client"]
    scores = sorted(row["metrics"]["both"]["accuracy"] for row in rows)
    both = result["metrics"]["both"]
    assert both["accuracy"] == pytest.approx(sum(scores) / 4, abs=1e-5)
    assert both["accuracy_worst_decile"] == pytest.approx(scores[0], abs=1e-5)  # a tenth of four clients, rounded up
    own = {row["client"]: read_adapter(Path(f"a/adapters/client-{row['client']}")) for row in rows}
    assert not Path("a/adapter").exists(), "there is no adapter for all"
    trained = [row["client"] for row in rows if row["rounds"]]
    assert len(trained) >= 2
    first, second = own[trained[0]], own[trained[1]]
    assert all(torch.equal(first[n], second[n]) == ("lora_A" in n) for n in first)
    for client in own.keys() - set(trained):
        assert not any(bool(t.any()) for n, t in own[client].items() if "lora_B" in n)
    lines = [json.loads(line) for line in Path("a/predictions.jsonl").read_text().splitlines()]
    assert {line["client"] for line in lines} == {0, 1, 2, 3}


def test_personalised_as_many_clients_are_tested_as_asked(write_experiment: Write) -> None:
    parts = {"algorithm__name": "fedsa-lora", "eval__clients": 2, "eval__every": 1}
    result = run("run", write_experiment(), *settings(**parts), "--out", "a")
    tested = [row["client"] for row in result["per_client"] if "metrics" in row]
    assert len(tested) == 2
    assert sorted(p.name for p in Path("a/adapters").iterdir()) == [f"client-{c}" for c in tested]
    assert all("accuracy_worst_decile" in r["metrics"]["both"] for r in RunDir(Path("a")).rounds()[:2])


def test_the_local_baseline_has_a_worst_decile_too(write_experiment: Write) -> None:
    result = run("baseline", "local", write_experiment())
    lowest = min(row["metrics"]["both"]["accuracy"] for row in result["per_client"])
    assert result["metrics"]["both"]["accuracy_worst_decile"] == pytest.approx(lowest, abs=1e-5)


def parts_of(folder: Path) -> list[dict[str, Any]]:
    return [part for c in range(4) if (part := RunDir(folder).load_part(f"client-{c}")) is not None]


@pytest.mark.parametrize("parts", [{}, {"algorithm__name": "hetlora", "clients__rank": "[1, 2]"}])
def test_clients_alone_learn_the_same_in_one_pass(write_experiment: Write, parts: dict[str, object]) -> None:
    file = write_experiment()
    one, each = (run("baseline", "local", file, *settings(**parts, train__cohort=n), "--out", f"by {n}") for n in (4, 1))
    assert (one["cohort"], each["cohort"]) == (4, 1)
    for a, b in zip(*(parts_of(Path(f"by {n}")) for n in (4, 1)), strict=True):
        assert [r["loss"] for r in a["rounds"]] == pytest.approx([r["loss"] for r in b["rounds"]], rel=1e-4)
        assert [p["predicted"] for p in a["predictions"]] == [p["predicted"] for p in b["predictions"]]


# Unequal ranks


@pytest.mark.parametrize("name", UNEQUAL)
def test_clients_of_unequal_rank(write_experiment: Write, name: str) -> None:
    parts = {"algorithm__name": name, "clients__rank": "[1, 2]"}
    result = run("run", write_experiment(), *settings(**parts), "--out", "a")
    assert [row["rank"] for row in result["per_client"]] == [1, 2, 1, 2]
    full = run("run", write_experiment(), *settings(algorithm__name=name))
    assert result["bytes_up"]["adapter"] < full["bytes_up"]["adapter"]
    assert result["adapter_sha256"] != full["adapter_sha256"]
    of_rank_one = full["bytes_up"]["adapter"] / (3 * 2) / 2  # 3 rounds, 2 clients, rank 2
    ranks = [1 + client % 2 for r in RunDir(Path("a")).rounds() for client in r["sampled"]]
    assert result["bytes_up"]["adapter"] == of_rank_one * sum(ranks)


def test_clients_of_unequal_rank_alone(write_experiment: Write) -> None:
    parts = settings(algorithm__name="hetlora", clients__rank="[1, 2]")
    result = run("baseline", "local", write_experiment(), *parts)
    assert len(result["per_client"]) == 4
    assert run("baseline", "centralised", write_experiment(), *parts)["rounds"] == 2


def test_check_says_what_travels(write_experiment: Write) -> None:
    plain = run("check", write_experiment())
    assert plain["bytes_down"] == plain["bytes_up"] == {"adapter": plain["adapter_bytes"]}
    found = run("check", write_experiment(), *settings(algorithm__name="ffa-lora", compression__name="int8"))
    assert found["bytes_down"] == {"adapter": plain["adapter_bytes"] // 2}
    assert found["bytes_up"] == {"int8": plain["adapter_bytes"] // 8, "step": 4 * 8}


def test_as_many_clients_alone_as_asked(write_experiment: Write) -> None:
    result = run("baseline", "local", write_experiment(), *settings(eval__clients=2))
    assert len([row for row in result["per_client"] if "metrics" in row]) == 2
    assert result["rounds"] == 2 * 2


@pytest.mark.parametrize("target", [".*vision_model.*q_proj", ".*patch_embedding"])
def test_an_adapter_elsewhere_trains_as_well(write_experiment: Write, target: str) -> None:
    """On the vision tower a batch without a picture has no gradient."""
    result = run("run", write_experiment(rounds=1), *settings(model__lora__target=target), "--out", "a")
    assert result["bytes_up"]["adapter"] > 0


# Other adapters


KINDS = ["rslora", "dora", "ia3", "prompt-tuning"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [*(("fedavg", kind) for kind in KINDS), *zip(["fedavgm", "fedadagrad", "fedyogi", "fedadam"], KINDS, strict=True)],
)
def test_other_adapters_under_averaging_and_the_fedopt_family(write_experiment: Write, name: str, kind: str) -> None:
    parts = {"algorithm__name": name, "model__adapter__kind": kind}
    result = run("run", write_experiment(rounds=1), *settings(**parts), "--out", "a")
    assert result["adapter"] == kind
    assert result["bytes_up"] == result["bytes_down"] == {"adapter": result["bytes_up"]["adapter"]}
    state = checkpoint("a")
    assert read_adapter(Path("a/adapter")).keys() == state["adapter"].keys()
    assert name == "fedavg" or all(bool(m.any()) for n, m in state["m"].items() if "lora_A" not in n), "nothing was trained"


def test_zero_shot_is_the_base_model_whatever_the_adapter(write_experiment: Write) -> None:
    found = [
        run("baseline", "zero-shot", write_experiment(), *settings(model__adapter__kind=kind), "--out", kind)["metrics"]
        for kind in ("lora", "prompt-tuning", "dora")
    ]
    assert found[0] == found[1] == found[2]
    assert run("eval", "prompt-tuning", "--trust-config")["metrics"] == found[0]


# Compression


def test_compressed_updates_are_counted_as_they_travel(write_experiment: Write) -> None:
    plain = run("run", write_experiment())
    int8 = run("run", write_experiment(), *settings(compression__name="int8"))
    top_k = run("run", write_experiment(), *settings(compression__name="top-k", compression__share=0.05))
    full = plain["bytes_up"]["adapter"]
    assert int8["compression"] == "int8"
    assert int8["bytes_up"] == {"int8": full // 4, "step": 3 * 2 * 4 * 16}
    # 64 numbers a tensor: ⌈0.05·64⌉ = 4 of them, each with its place.
    assert top_k["bytes_up"] == {"places": full // 16, "values": full // 16}
    assert plain["bytes_down"] == int8["bytes_down"] == top_k["bytes_down"]


# Refusals

REFUSED = [
    ({"regularization__name": "adaptive", "model__lora__target": ".*modality_projection.*proj"},
     "'adaptive' ties layers of the text model, and model.lora.target = '.*modality_projection.*proj' adapts none"),
    ({"algorithm__name": "flexlora", "model__lora__target": ".*(patch_embedding|q_proj)"},
     "algorithm.name: 'flexlora' cannot work with model.lora.target = '.*(patch_embedding|q_proj)' (not a LoRA"),
    ({"model__lora__target": ".*embed_tokens"}, "matches the embedding or the head, which share one weight in this model"),
    ({"model__lora__target": ".*lm_head"}, "model.lora.target = '.*lm_head' matches the embedding or the head"),
    ({"model__lora__target": ".*nothing"}, "model.lora.target = '.*nothing' matches no module of the model"),
    ({"model__lora__target": ".*q_proj", "model__adapter__kind": "ia3"},
     "model.lora.target is set and model.adapter.kind = 'ia3' does not use it; leave one of them out."),
    ({"model__adapter__kind": "prompt-tuning", "model__adapter__virtual_tokens": 4000}, "more than train.max_length = 1200"),
    ({"algorithm__name": "flora", "model__adapter__kind": "ia3"},
     "algorithm.name: 'flora' works on LoRA's factors A and B alone, and model.adapter.kind = 'ia3' has others"),
    ({"algorithm__name": "fedsvd", "model__adapter__kind": "dora"}, "works on LoRA's factors A and B alone"),
    ({"clients__rank": "[1, 2]"},
     "clients.rank: 'fedavg' cannot average adapters of ranks [1, 2] under model.lora.rank = 2; give all clients that rank, or "
     f"choose one of {', '.join(UNEQUAL)}."),
    ({"clients__rank": "[1]", "algorithm__name": "scaffold"}, "clients.rank: 'scaffold' cannot average"),
    ({"clients__rank": "[1, 8]", "algorithm__name": "flora"}, "clients.rank = 8 is more than model.lora.rank = 2"),
    ({"clients__rank": "[0]", "algorithm__name": "flora"}, "clients.rank.0: input should be greater than or equal to 1"),
    ({"clients__rank": "[2]", "model__adapter__kind": "ia3"}, "clients.rank: model.adapter.kind = 'ia3' has no rank to vary"),
    ({"regularization__name": "adaptive", "model__adapter__kind": "prompt-tuning"}, "'adaptive' ties the middle"),
    ({"compression__name": "top-k", "algorithm__name": "flora"},
     "compression.name: 'top-k' cannot be used with 'flora': error feedback adds last round's remainder"),
    ({"compression__name": "top-k", "compression__share": 0.0}, "compression: share = 0.0 must be above 0"),
    ({"compression__name": "zip"}, "there is no compression 'zip'"),
    ({"model__adapter__kind": "adalora"}, "model.adapter.kind: input should be 'lora', 'rslora'"),
    ({"algorithm__name": "fedadam", "algorithm__beta2": 2.0}, "algorithm: beta2 = 2.0 must be at least 0 and below 1"),
    ({"algorithm__name": "fednova", "algorithm__momentum": 0.9}, "algorithm.momentum: unknown key for algorithm 'fednova'"),
]  # fmt: skip


@pytest.mark.parametrize(("parts", "sentence"), REFUSED, ids=[" ".join(map(str, p.values())) for p, _ in REFUSED])
def test_what_does_not_go_together_is_one_sentence_and_status_2(
    write_experiment: Write, parts: dict[str, object], sentence: str
) -> None:
    done = call("run", write_experiment(), *settings(**parts))
    assert done.exit_code == 2, done.output
    assert sentence in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert not Path("runs").exists()


def test_list_has_defaults_and_what_travels() -> None:
    found = {part["name"]: part for part in json.loads(call("list", "algorithms", "--json").stdout)}
    assert found["fedadam"]["defaults"] == {
        "beta1": 0.9, "beta2": 0.99, "server_lr": 0.001, "tau": 0.001, "weighting": "examples"
    }  # fmt: skip
    assert found["fedadam"]["options"] == sorted(found["fedadam"]["defaults"])
    assert (found["fedsvd"]["down"], found["fedsvd"]["up"]) == (["adapter"], ["adapter (B)"])
    assert list(found) == algorithms.names()
    assert "travels down: adapter; up: adapter (B)" in call("list", "algorithms").stdout
    assert [part["name"] for part in json.loads(call("list", "compressions", "--json").stdout)] == compressions.names()
