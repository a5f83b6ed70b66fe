"""Simulated attackers: who they are, what they send, and what they train on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedmllm.algorithms import Algorithm, RoundInfo, Update, algorithms, failed
from fedmllm.algorithms.screening import screen
from fedmllm.attacks.fleet import AttackedFleet
from fedmllm.attacks.settings import Attack, Shown, attacks
from fedmllm.attacks.updates import alie_z
from fedmllm.data.samples import Modality, Sample
from fedmllm.data.scenarios import BOTH, IMAGE, TEXT
from fedmllm.errors import ConfigError
from fedmllm.federation import FederationPlan, federate
from fedmllm.rng import stream
from fedmllm.tensors import Tensors, norm
from fedmllm.testing.registered import check_registered
from helpers import FakeFleet, lora_adapter, rounds_of, same, sample, tensors

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
