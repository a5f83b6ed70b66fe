"""Attackers in whole runs: resumed, masked, refused, and without effect on what does not attack."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from commands import call, run
from fedmllm import config as files
from fedmllm.experiment.parts import build, with_defaults
from fedmllm.experiment.sweep import essential
from fedmllm.runs.kinds import execute
from fedmllm.runs.session import Session
from fedmllm.storage.run_dir import RunDir
from helpers import apply_overrides

Write = Callable[..., Path]


def with_attack(name: str, *more: str) -> list[str]:
    settings = (f"attack.name={name}", "attack.share=0.5", "attack.start=1", "train.clients_per_round=3", *more)
    return [word for setting in settings for word in ("--set", setting)]


@pytest.mark.parametrize("name", ["gaussian", "label-flip"])
def test_interrupted_and_resumed_equals_uninterrupted(write_experiment: Write, name: str, tmp_path: Path) -> None:
    file, settings = write_experiment(rounds=4), with_attack(name)
    whole = run("run", file, *settings, "--out", tmp_path / "whole")
    attackers = [row["client"] for row in whole["per_client"] if row.get("attacker") is True]
    assert len(attackers) == 2
    merged, _ = apply_overrides(files.read(file), settings[1::2])
    parts, directory = build(files.validate(merged)), RunDir(tmp_path / "interrupted")

    def interrupt(stage: str, done: int, total: int, note: str) -> None:
        if stage == "rounds" and done == 3:  # the attack began in the round before
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute("federated", Session(parts, parts.prepare(), interrupt), directory)
    resumed = run("run", file, *settings, "--out", directory.path, "--resume")
    assert resumed["adapter_sha256"] == whole["adapter_sha256"]
    assert resumed["per_client"] == whole["per_client"]
    assert resumed["attack"] == name
    honest = run("run", file, *settings[6:], "--out", tmp_path / "honest")
    assert honest["adapter_sha256"] != whole["adapter_sha256"]
    assert not any("attacker" in row for row in honest["per_client"])


def test_what_a_run_without_attackers_shares_with_one_that_has_them(write_experiment: Write, tmp_path: Path) -> None:
    """The manifest, the rounds before the attack and the baselines."""
    file, rounds = write_experiment(rounds=2), list[Any]()
    settings = with_attack("modality-drop", "scenario.name=aligned")
    for name, words in (("none", settings[6:]), ("attacked", settings)):
        result = run("run", file, *words, "--out", tmp_path / name)
        records = RunDir(tmp_path / name).rounds()
        rounds.append([{key: value for key, value in record.items() if key != "seconds"} for record in records])
        rounds[-1].append((result["manifest_digest"], [row["gap"] for row in result["per_client"]]))
    (first, second, drawn), (same_first, other, same_drawn) = rounds
    assert (first, drawn) == (same_first, same_drawn)
    assert second["loss"] != other["loss"]
    local = [run("baseline", "local", file, *words, "--out", tmp_path / f"l{len(words)}") for words in (settings[6:], settings)]
    assert local[0]["per_client"] == local[1]["per_client"]


def test_attackers_encode_what_they_claim_to_train_on(write_experiment: Write) -> None:
    """One session has both: what the manifest says, and what attackers see of it."""
    parts = build(files.validate(files.read(write_experiment('[attack]\nname = "label-flip"\nshare = 0.5\n'))))
    session = Session(parts, parts.prepare())
    assert len(session.attackers) == 2
    for client in session.clients:
        honest, changed = session.clients[client], session.attacked[client]
        assert len(honest) == len(changed)
        differ = [(a.prompt, a.answer) != (b.prompt, b.answer) for a, b in zip(honest, changed, strict=True)]
        assert any(differ) == (client in session.attackers)


def test_models_of_their_own_are_tested_for_honest_clients(write_experiment: Write, tmp_path: Path) -> None:
    settings = with_attack("gaussian", "algorithm.name=fedsa-lora")
    rows = run("run", write_experiment(rounds=2), *settings, "--out", tmp_path / "own")["per_client"]
    assert [("metrics" in row) for row in rows] == [("attacker" not in row) for row in rows]


def test_masked_updates_are_distorted_before_they_are_masked(write_experiment: Write, tmp_path: Path) -> None:
    file = write_experiment(rounds=2)
    adapters = []
    for name in ("none", "pairwise"):
        run("run", file, *with_attack("sign-flip", f"secure.name={name}"), "--out", tmp_path / name)
        adapters.append(load_file(tmp_path / name / "adapter" / "adapter_model.safetensors"))
    assert all(torch.allclose(adapters[0][key], adapters[1][key], atol=1e-4) for key in adapters[0])


REFUSED = [
    ("sign-flip", ["fleet.name=flower"], "fleet.name = 'flower' trains on real clients"),
    ("label-flip", ["fleet.name=flower", 'fleet.sites=["a", "b", "c", "d"]'], "'label-flip' is for simulations only"),
    ("alie", ["compression.name=int8"], "compression.name = 'int8' has packed before; set it to"),
    ("alie", ["algorithm.name=lora-a2"], "algorithm.name = 'lora-a2' has packed before; choose another algorithm"),
    ("alie", ["algorithm.name=flexlora", "clients.rank=[1, 2]"], "gives them different shapes"),
    ("scaled", ["attack.share=0.1"], "attack.share = 0.1 of 4 clients is 0; raise it"),
    ("scaled", ["attack.share=0.9"], "attack.share = 0.9 of 4 clients is 4; lower it"),
    ("gaussian", ["attack.start=3"], "the last of train.rounds = 3 rounds is 2, so that nobody would attack"),
    ("gaussian", ["attack.shares=0.1"], "attack.shares: unknown key for attack 'gaussian'; did you mean 'share'?"),
    ("sign-flop", [], "attack.name: there is no attack 'sign-flop'; did you mean 'sign-flip'?"),
]


@pytest.mark.parametrize(("name", "settings", "reason"), REFUSED, ids=[f"{name} {rest}" for name, rest, _ in REFUSED])
def test_what_is_no_simulation_of_attackers_is_refused(
    name: str, settings: list[str], reason: str, write_experiment: Write
) -> None:
    given = {setting.partition("=")[0]: setting for setting in ("attack.share=0.5", *settings)}
    done = call("check", write_experiment(), "--set", f"attack.name={name}", *(w for s in given.values() for w in ("--set", s)))
    assert done.exit_code == 2, done.output
    assert reason in " ".join(done.output.split())


def test_attackers_who_are_never_sampled_are_refused(write_experiment: Write, tmp_path: Path) -> None:
    settings = ["attack.name=scaled", "attack.share=0.25", "train.rounds=1", "train.clients_per_round=1"]
    outcomes = [
        call(
            "run",
            write_experiment(),
            *(w for s in (*settings, f"seed={seed}") for w in ("--set", s)),
            "--out",
            tmp_path / f"{seed}",
        )
        for seed in range(2)
    ]
    refused = [done for done in outcomes if done.exit_code == 2]
    assert refused
    assert "1 of 4 clients would attack, and none of them is sampled" in " ".join(refused[0].output.split())


def test_baselines_and_experiments_without_attack_do_not_depend_on_its_options(write_experiment: Write) -> None:
    config = with_defaults(files.validate(files.read(write_experiment('[attack]\nname = "alie"\nshare = 0.3\n'))))
    plain = with_defaults(files.validate(files.read(write_experiment())))
    for kind in ("zero-shot", "local", "centralised"):
        assert essential(config, kind) == essential(plain, kind)
    assert essential(config, "federated").attack.name == "alie"
    assert config.digest() != plain.digest()
    assert "share" not in plain.resolved()["attack"]
