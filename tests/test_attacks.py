"""Simulated attackers: what they send and train on, who they are, and that the rest of a run is as without them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from commands import call, run
from fedmllm import config as files
from fedmllm.algorithms import Algorithm, RoundInfo, Update, algorithms, failed
from fedmllm.algorithms.screening import screen
from fedmllm.attacks.fleet import AttackedFleet
from fedmllm.attacks.settings import Attack, Shown, attacks
from fedmllm.attacks.updates import alie_z
from fedmllm.data.samples import Modality, Sample
from fedmllm.data.scenarios import BOTH, IMAGE, TEXT
from fedmllm.errors import ConfigError
from fedmllm.experiment.parts import build, with_defaults
from fedmllm.experiment.sweep import essential
from fedmllm.federation import FederationPlan, federate
from fedmllm.rng import stream
from fedmllm.runs.kinds import execute
from fedmllm.runs.session import Session
from fedmllm.storage.run_dir import RunDir
from fedmllm.tensors import Tensors, norm
from fedmllm.testing.registered import check_registered
from helpers import FakeFleet, apply_overrides, lora_adapter, rounds_of, same, sample, tensors

Write = Callable[..., Path]
INFO = RoundInfo(3, 10, 10, tuple(range(10)), seed=5)


def attack(name: str, **options: object) -> Attack:
    part = attacks.build(name, options)
    assert part is not None
    return part


def equal(a: Mapping[int, Tensors], b: Mapping[int, Tensors]) -> bool:
    return a.keys() == b.keys() and all(same({"": a[client]}, {"": b[client]}) for client in a)


def sent(part: Attack, changes: Mapping[int, Tensors], info: RoundInfo = INFO) -> Mapping[int, Tensors]:
    assert part.distort is not None
    return part.distort(changes, info)


@pytest.mark.parametrize("name", attacks.names())
def test_every_attack_is_registered_as_it_should(name: str) -> None:
    check_registered(attacks, name)
    if name != "none":
        assert {"share", "start"} <= set(attacks.option_names(name))
        assert (attack(name).falsify is None) != (attack(name).distort is None)


# Who attacks


@pytest.mark.parametrize(
    ("share", "clients", "count"), [(0.2, 10, 2), (0.4, 10, 4), (0.25, 10, 3), (0.5, 3, 2), (0.24, 10, 2), (0.04, 10, 0)]
)
def test_the_share_is_rounded(share: float, clients: int, count: int) -> None:
    chosen = attack("sign-flip", share=share).attackers(clients, seed=1)
    assert len(chosen) == count
    assert chosen <= set(range(clients))


def test_attackers_depend_on_the_seed_and_grow_with_the_share() -> None:
    few, many = (attack("label-flip", share=share) for share in (0.2, 0.4))
    assert few.attackers(10, 1) < many.attackers(10, 1)
    assert few.attackers(10, 1) == attack("alie", share=0.2, start=3).attackers(10, 1)
    assert len({few.attackers(10, seed) for seed in range(20)}) > 5


# What attackers send


def test_sign_flip_and_scaled() -> None:
    changes = {1: tensors(a=[1.0, -2.0]), 4: tensors(a=[0.5, 0.0])}
    assert equal(sent(attack("sign-flip"), changes), {1: tensors(a=[-1.0, 2.0]), 4: tensors(a=[-0.5, 0.0])})
    assert equal(sent(attack("sign-flip", factor=3.0), changes), {1: tensors(a=[-3.0, 6.0]), 4: tensors(a=[-1.5, 0.0])})
    assert equal(sent(attack("scaled"), changes), {1: tensors(a=[10.0, -20.0]), 4: tensors(a=[5.0, 0.0])})


def test_gaussian_has_the_length_of_the_change_and_is_each_attackers_own() -> None:
    change = {"a": torch.full((40, 50), 0.3), "b": torch.zeros(3000)}
    noise = sent(attack("gaussian", factor=2.0), {1: change, 4: change})
    for tensors_of_client in noise.values():
        assert norm(tensors_of_client) == pytest.approx(2 * norm(change), rel=0.05)
        # The noise is the same everywhere, also where the change is small.
        assert float(tensors_of_client["b"].std()) == pytest.approx(float(tensors_of_client["a"].std()), rel=0.1)
        assert abs(float(tensors_of_client["b"].mean())) < 0.03
    assert not torch.equal(noise[1]["a"], noise[4]["a"])
    assert equal(noise, sent(attack("gaussian", factor=2.0), {4: change, 1: change}))
    later = RoundInfo(4, 10, 10, INFO.sampled, seed=5)
    assert not torch.equal(sent(attack("gaussian"), {1: change}, later)[1]["a"], sent(attack("gaussian"), {1: change})[1]["a"])


@pytest.mark.parametrize(
    ("clients", "attackers", "z"),
    [
        (50, 24, 1.4261),  # Φ⁻¹(24/26): s = 2, the paper's example
        (50, 12, 0.3360),  # Φ⁻¹(24/38): s = 14
        (10, 4, 0.4307),  # Φ⁻¹(4/6)
        (10, 2, 0.0),  # Φ⁻¹(1/2)
        (10, 1, 0.0),  # Φ⁻¹(4/9) is below 0
        (10, 6, 0.6745),  # a majority: Φ⁻¹(3/4)
        (10, 9, 0.0),
        (3, 3, 0.0),
    ],
)
def test_alies_z(clients: int, attackers: int, z: float) -> None:
    assert alie_z(clients, attackers) == pytest.approx(z, abs=5e-5)


def test_alie_sends_the_same_from_every_attacker() -> None:
    changes = {2: tensors(a=[1.0, 0.0]), 5: tensors(a=[3.0, 0.0]), 7: tensors(a=[2.0, 3.0]), 8: tensors(a=[2.0, 1.0])}
    mean, deviation = torch.tensor([2.0, 1.0]), torch.tensor([0.5, 1.5]).sqrt()
    for part, z in ((attack("alie"), 0.430727), (attack("alie", z=1.5), 1.5)):
        result = sent(part, changes)
        assert result.keys() == changes.keys()
        for of_client in result.values():
            assert torch.allclose(of_client["a"], mean - z * deviation, atol=1e-6)
    alone = sent(attack("alie", z=1.5), {2: changes[2]})
    assert equal(alone, {2: changes[2]}), "one attacker has no deviation"


REFUSED_OPTIONS = [
    ("sign-flip", {"share": 0.0}, "share = 0.0 must be above 0"),
    ("label-flip", {"share": 1.0}, "below 1"),
    ("alie", {"start": -1}, "start = -1 must not be negative"),
    ("alie", {"z": 0.0}, "z = 0.0 must be above 0"),
    ("scaled", {"factor": -1.0}, "factor = -1.0 must be above 0"),
    ("modality-drop", {"modality": "sound"}, "should be 'image' or 'text'"),
]


@pytest.mark.parametrize(("name", "options", "sentence"), REFUSED_OPTIONS)
def test_options_that_mean_nothing(name: str, options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        attacks.build(name, options)


# In a federation of toy clients

SAMPLED = (0, 1, 3, 4)


def attacked(part: Attack, algorithm: Algorithm, attackers: frozenset[int] = frozenset((1, 4))) -> AttackedFleet:
    fleet = FakeFleet(algorithm)
    return AttackedFleet(part, attackers, algorithm, fleet, fleet)


@pytest.mark.parametrize("name", algorithms.names())
def test_attackers_turn_round_what_they_learnt_under_every_algorithm(name: str) -> None:
    """In the second round too, in which the adapter, control variates and folds are no longer what they were."""
    algorithm = algorithms.build(name, {})
    for state, updates, _, info in rounds_of(algorithm, 2, sampled=lambda number: SAMPLED):
        fleet = attacked(attack("sign-flip", factor=0.5), algorithm)
        fleet._honest.train = lambda info, messages, updates=updates: updates  # type: ignore[method-assign, misc]
        messages = {client: algorithm.message(state, client, info) for client in SAMPLED}
        for honest, changed in zip(updates, fleet.train(info, messages), strict=True):
            if honest.client not in (1, 4):
                assert changed is honest
                continue
            start = {**messages[honest.client].get("adapter", {})}
            assert replace(changed, groups=honest.groups) == honest, "counts and losses are sent as they are"
            assert changed.groups.keys() == honest.groups.keys()
            for group, own in honest.groups.items():
                for key, tensor in own.items():
                    middle = start.get(key, torch.zeros_like(tensor)) if group == "adapter" else torch.zeros_like(tensor)
                    expected = middle - 0.5 * (tensor - middle) if group in algorithm.summed else tensor
                    assert torch.allclose(changed.groups[group][key], expected, atol=1e-6), (group, key)
        assert screen(fleet.train(info, messages), algorithm, state, info)[1] == []


def test_an_attack_has_a_first_round() -> None:
    algorithm = algorithms.build("fedavg", {})
    plan = FederationPlan(range(6), 4, 5, 0.1, "constant", 1, seed=3)
    honest = [state for _, state in federate(algorithm, FakeFleet(algorithm), plan, lora_adapter())]
    fleet = attacked(attack("sign-flip", start=2), algorithm, frozenset(range(5)))
    states = [state for _, state in federate(algorithm, fleet, plan, lora_adapter())]
    assert [same(a, b) for a, b in zip(states, honest, strict=True)] == [True, True, False, False, False]


def test_every_round_is_committed_where_it_was_trained() -> None:
    algorithm = algorithms.build("fedavg", {})
    early, late = FakeFleet(algorithm), FakeFleet(algorithm)
    plan = FederationPlan(range(6), 4, 7, 0.1, "constant", 1, seed=3)
    list(federate(algorithm, AttackedFleet(attack("label-flip", start=3), {0}, algorithm, early, late), plan, lora_adapter()))
    assert [info.round for info, _ in early.seen] == [0, 1, 2]
    assert [info.round for info, _ in late.seen] == [3, 4, 5, 6]
    assert early.committed + late.committed == [0, 1, 2, 3, 4]


def test_a_client_without_an_update_has_none_to_distort() -> None:
    algorithm = algorithms.build("fedavg", {})
    fleet = attacked(attack("alie", z=1.0), algorithm)
    silent = {1: failed(1, "no answer"), 4: Update(4, {"adapter": lora_adapter()}, 0, 0)}
    fleet._honest.alter = lambda _, updates: [silent.get(u.client, u) for u in updates]  # type: ignore[attr-defined]
    info = RoundInfo(0, 3, 6, SAMPLED, 0)
    updates = fleet.train(info, {client: {"adapter": lora_adapter()} for client in SAMPLED})
    assert {u.client: u for u in updates if u.client in silent} == silent


# What attackers train on


def draw(shown_sample: Sample) -> np.random.Generator:
    return stream(3, "attack", 0, shown_sample.id)


def falsified(part: Attack, shown: Sequence[Shown]) -> list[Shown]:
    assert part.falsify is not None
    return part.falsify(shown, draw)


def test_label_flip_gives_every_question_a_wrong_answer() -> None:
    colors = ("red", "green", "blue")
    closed = [sample(f"c{i}", answer=colors[i % 3], choices=colors) for i in range(30)]
    opened = [sample(f"o{i}", answer=f"a{i % 4}") for i in range(40)]
    lonely = [sample("x", answer="only")]
    shown = [(s, BOTH) for s in (*closed, *opened)]
    flipped = falsified(attack("label-flip"), shown)
    for (before, _), (after, visible) in zip(shown, flipped, strict=True):
        assert after.answer != before.answer
        assert after.answer in (before.choices or {s.answer for s in opened})
        assert (replace(after, answer=before.answer), visible) == (before, BOTH)
    assert len({after.answer for after, _ in flipped[:30:3]}) == 2, "either of the two wrong choices"
    assert falsified(attack("label-flip"), [(lonely[0], TEXT)]) == [(lonely[0], TEXT)], "there is no other answer"
    # Each sample's own draw: neither the order nor the other closed questions matter.
    assert falsified(attack("label-flip"), shown[29::-1])[::-1] == flipped[:30]
    assert falsified(attack("label-flip"), shown[:7]) == flipped[:7]


def test_modality_swap_shows_the_picture_of_another_sample() -> None:
    pictures = [Path(f"{i}.png") for i in range(6)]
    seen = [(sample(f"s{i}", image=pictures[i % 6]), IMAGE if i % 2 else BOTH) for i in range(12)]
    hidden = [(sample("h", image=Path("hidden.png")), TEXT), (sample("t", "text"), TEXT)]
    swapped = falsified(attack("modality-swap"), [*seen, *hidden])
    for (before, visible), (after, still) in zip(seen, swapped[:12], strict=True):
        assert after.image != before.image
        assert after.image in pictures
        assert (replace(after, image=before.image), still) == (before, visible)
    assert swapped[12:] == hidden
    assert falsified(attack("modality-swap"), [*hidden, *seen][::-1])[::-1] == [*hidden, *swapped[:12]]
    same_picture = [(sample(f"s{i}"), BOTH) for i in range(3)]
    assert falsified(attack("modality-swap"), same_picture) == same_picture


@pytest.mark.parametrize(("modality", "left"), [("image", TEXT), ("text", IMAGE)])
def test_modality_drop_hides_one_of_two(modality: str, left: frozenset[Modality]) -> None:
    shown = [(sample("a"), BOTH), (sample("b"), IMAGE), (sample("c"), TEXT)]
    dropped = falsified(attack("modality-drop", modality=modality), shown)
    assert dropped == [(sample("a"), left), (sample("b"), IMAGE), (sample("c"), TEXT)]


# In whole runs


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
    ("modality-swap", ["fleet.name=ray"], "changes samples, which only this process does"),
    ("alie", ["compression.name=int8"], "compression.name = 'int8' has packed before"),
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
