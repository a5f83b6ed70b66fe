"""Secure aggregation: the server sees only sums, the sums are exact, and drop-outs are tolerated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmllm.algorithms import Update, algorithms
from fedmllm.federation import FederationPlan, RoundRecord, TooFewUpdates, federate
from fedmllm.secure.clients import change_of
from fedmllm.secure.fixed import FixedPoint
from fedmllm.secure.fleet import LocalTransport, SecureFleet
from fedmllm.secure.settings import PHASES, Phase
from fedmllm.tensors import State, flatten
from fedmllm.testing import properties
from helpers import (
    ADAPTER_INFO,
    COMBINATIONS,
    built,
    lora_adapter,
    quick,
    round_info,
)
from secure_rounds import (
    AVERAGING,
    RUN,
    Clients,
    RecordingTransport,
    clients_of,
    dropping,
    fixed_of,
    one_round,
    secure,
    settings,
    total,
)

# The algorithms that only average


@pytest.mark.parametrize("parts", [parts for parts in COMBINATIONS if built(*parts).averages], ids="-".join)
def test_an_averaging_algorithm_cannot_distinguish_updates_from_copies_of_their_mean(parts: tuple[str, str, str]) -> None:
    properties.check_averages(built(*parts))


def test_which_algorithms_can_be_hidden() -> None:
    assert {"fedavg", "fedadam", "scaffold", "feddyn", "ffa-lora", "fedrot-lora"} <= set(AVERAGING)
    assert not {"fednova", "flora", "flexlora", "fedmomentum", "flora-na", "fedex-lora", "hetlora", "fedilora"} & set(AVERAGING)


# The sum


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize("name", ["fedavg", "scaffold"])
def test_the_sum_is_exact(name: str, bits: int) -> None:
    algorithm = algorithms.build(name, {})
    sums: list[np.ndarray] = []
    fleet, _ = secure(algorithm, bits=bits)
    info = round_info(0, range(5))
    messages = {c: algorithm.message(algorithm.init(lora_adapter()), c, info) for c in info.sampled}
    with pytest.MonkeyPatch.context() as patch:
        decode = FixedPoint.decode

        def recording(self: FixedPoint, vector: np.ndarray, shapes: State, clients: int) -> object:
            sums.append(np.concatenate([p.view(p.dtype.str.replace("u", "i")).astype(object) for p in self.words(vector)]))
            return decode(self, vector, shapes, clients)

        patch.setattr(FixedPoint, "decode", recording)
        fleet.train(info, messages)
    expected = total(fixed_of(info, algorithm, bits=bits), clients_of(fleet).trained, messages)
    assert (sums[0] == expected).all()
    assert sums[0].any()


@pytest.mark.parametrize("name", AVERAGING)
def test_a_secure_federation_learns_the_same_as_an_open_one(name: str) -> None:
    ends, records = [], []
    for hidden in (False, True):
        # YOCO's sign term is too steep for plain gradient descent with a larger γ, and its changes would be clipped.
        algorithm = algorithms.build(name, {"gamma_max": 1.0} if name == "yoco" else {})
        fleet = secure(algorithm)[0] if hidden else Clients(algorithm)
        plan = FederationPlan(range(5), 3, 4, 0.1, "constant", 1, 0, ADAPTER_INFO)
        *_, (record, state) = federate(algorithm, fleet, plan, lora_adapter())
        ends.append(flatten(state))
        records.append(record)
    assert max(float((ends[0][n] - ends[1][n]).abs().max()) for n in ends[0]) < 2e-5
    open_record, secure_record = records
    for key in ("examples", "steps", "sampled", "refused"):
        assert getattr(open_record, key) == getattr(secure_record, key)
    assert secure_record.loss == pytest.approx(open_record.loss, abs=1e-5)


# Drop-outs


@quick
@given(st.integers(3, 6), st.data())
def test_the_sum_is_exact_after_any_tolerated_drop_outs(clients: int, data: st.DataObject) -> None:
    required = clients // 2 + 1
    dropped = data.draw(st.lists(st.integers(0, clients - 1), unique=True, max_size=clients - required))
    at = {client: data.draw(st.sampled_from(PHASES)) for client in dropped}
    updates, _, fleet, info, messages = one_round(clients, dropping(at))
    counted = [c for c in info.sampled if c not in at or at[c] == "unmask"]
    assert [u.client for u in updates if not u.problem] == counted
    assert {u.client for u in updates if u.problem == "no answer"} == set(info.sampled) - set(counted)
    trained = [u for u in fleet.trained if u.client in counted]
    fixed = fixed_of(info, fleet.algorithm)
    sums = total(fixed, trained, messages)
    assert sum(u.examples for u in updates) == int(sums[0]) == sum(u.examples for u in trained)
    weight, first = int(sums[0]), next(u for u in updates if not u.problem).groups["adapter"]
    change = np.concatenate([(first[n] - lora_adapter()[n]).flatten().numpy() for n in sorted(first)])
    assert np.abs(change - sums[5:].astype(float) * fixed.unit / weight).max() < 1e-6


@pytest.mark.parametrize("phase", PHASES)
def test_a_round_below_the_threshold_fails_with_one_sentence(phase: Phase) -> None:
    with pytest.raises(TooFewUpdates) as caught:
        one_round(5, dropping({0: phase, 2: phase, 4: phase}))
    reasons = "client 0: no answer; client 2: no answer; client 4: no answer"
    assert str(caught.value) == (
        f"round 0: secure aggregation needs 3 of 5 clients until the end, and 2 were left, so the sum stays masked ({reasons})"
    )


def test_clients_forget_a_round_that_failed() -> None:
    algorithm = algorithms.build("scaffold", {})
    fleet, _ = secure(algorithm, dropping({0: "unmask", 1: "unmask"}))
    info = round_info(0, range(3))
    with pytest.raises(TooFewUpdates):
        fleet.train(info, {c: algorithm.message(algorithm.init(lora_adapter()), c, info) for c in info.sampled})
    assert clients_of(fleet).memory == {0: {}, 1: {}, 2: {}}


def test_a_client_without_samples_withdraws_and_the_others_are_summed() -> None:
    algorithm = algorithms.build("fedavg", {})
    fleet, _ = secure(algorithm)
    clients_of(fleet).alter = lambda _, updates: [replace(u, examples=0) if u.client == 1 else u for u in updates]
    info = round_info(0, range(4))
    message = algorithm.message(algorithm.init(lora_adapter()), 0, info)
    updates = fleet.train(info, dict.fromkeys(info.sampled, message))
    assert [u.problem for u in updates] == ["", "no examples", "", ""]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"examples": 10_001}, "holds more samples than secure.max_examples = 10000 allows; raise it"),
        ({"groups": {"adapter": {n: t * torch.nan for n, t in lora_adapter().items()}}}, "NaN or infinity in the update"),
    ],
)
def test_a_client_withdraws_an_update_that_must_not_be_summed(change: dict[str, object], reason: str) -> None:
    algorithm = algorithms.build("fedavg", {})
    fleet, _ = secure(algorithm)
    clients_of(fleet).alter = lambda _, updates: [replace(u, **change) if u.client == 1 else u for u in updates]  # type: ignore[arg-type]
    info = round_info(0, range(3))
    message = algorithm.message(algorithm.init(lora_adapter()), 0, info)
    assert [u.problem for u in fleet.train(info, dict.fromkeys(info.sampled, message))] == ["", reason, ""]


def test_clipped_numbers_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    one_round(3, clip=0.01)
    assert "of the numbers exceeded secure.clip = 0.01 and were clipped; raise it" in caplog.text


# What the server sees


def vector_of(transport: RecordingTransport, client: int) -> bytes:
    return bytes(transport.received["masked"][client].groups["masked"]["vector"].numpy())


def test_a_masked_vector_looks_like_random_bytes() -> None:
    algorithm = algorithms.build("fedavg", {})
    adapter = {"w": torch.zeros(100_000)}
    fleet, transport = secure(algorithm)
    clients_of(fleet).train = lambda info, messages: [  # type: ignore[method-assign, assignment]
        Update(c, {"adapter": adapter}, 1, 1) for c in messages
    ]
    info = round_info(0, range(3))
    for _ in range(2):
        fleet.train(info, {c: {"adapter": adapter} for c in info.sampled})
        first = vector_of(transport, 1)
    # Without masks everything but the counts would be 0. χ² of 400,040 bytes over 256 values has mean 255 and standard
    # deviation 22.6.
    counts = np.bincount(np.frombuffer(first, dtype=np.uint8), minlength=256)
    chi = float(((counts - len(first) / 256) ** 2 / (len(first) / 256)).sum())
    assert 255 - 6 * 22.6 < chi < 255 + 6 * 22.6
    assert abs(np.corrcoef(np.frombuffer(first[40:], "<u4"), np.frombuffer(vector_of(transport, 0)[40:], "<u4"))[0, 1]) < 0.02


def test_the_same_update_twice_is_masked_differently() -> None:
    vectors = [vector_of(one_round(3)[1], 0) for _ in range(2)]
    equal = (np.frombuffer(vectors[0], np.uint8) == np.frombuffer(vectors[1], np.uint8)).mean()
    assert equal < 0.03, "1 in 256 bytes is equal by chance"


def test_nothing_of_a_single_client_is_sent_unmasked() -> None:
    updates, transport, fleet, info, messages = one_round(4)
    fixed = fixed_of(info, fleet.algorithm)
    for phase in PHASES:
        for client, answer in transport.received[phase].items():
            assert (answer.examples, answer.steps, answer.metrics, answer.problem) == (0, 0, {}, ""), phase
            assert {t.dtype for ts in answer.groups.values() for t in ts.values()} == {torch.uint8}
            assert client in info.sampled
    for update in fleet.trained:
        plain = fixed.encode(change_of(update.groups, messages[update.client]), update)
        masked = np.frombuffer(vector_of(transport, update.client), np.uint8)
        assert (plain == masked).mean() < 0.03
    examples = {u.examples for u in updates}
    assert max(examples) - min(examples) <= 1, "the sum is divided evenly"


def test_no_masks_cancel_before_the_last_phase() -> None:
    """Not even the sum of all masked vectors is meaningful before the own masks are removed."""
    _, transport, fleet, info, messages = one_round(3)
    fixed = fixed_of(info, fleet.algorithm)
    sums = np.zeros(len(vector_of(transport, 0)), np.uint8)
    for client in info.sampled:
        fixed.add(sums, np.frombuffer(vector_of(transport, client), np.uint8))
    expected = total(fixed, fleet.trained, messages)
    assert int(sums[:8].view("<i8")[0]) != expected[0]


def test_updates_count_the_bytes_that_were_sent() -> None:
    updates, transport, _, info, _ = one_round(4, dropping({3: "masked"}))
    for update in updates:
        assert update.travelled is not None
        for counted, sent in zip(
            update.travelled, (transport.sent, {p: _groups(a) for p, a in transport.received.items()}), strict=True
        ):
            expected: dict[str, int] = {}
            for phase in PHASES:
                for group, named in sent.get(phase, {}).get(update.client, {}).items():
                    expected[group] = expected.get(group, 0) + sum(t.numel() * t.element_size() for t in named.values())
            assert counted == expected
    numbers = sum(t.numel() for t in lora_adapter().values())
    assert updates[0].travelled is not None
    assert updates[0].travelled[1]["masked"] == 4 * numbers + 40
    assert info.sampled == (0, 1, 2, 3)


def _groups(answers: Mapping[int, Update]) -> dict[int, State]:
    return {client: answer.groups for client, answer in answers.items()}


def test_the_server_detects_a_share_that_was_altered_in_the_last_phase() -> None:
    def alter(phase: Phase, answer: Update) -> Update:
        if phase == "unmask" and answer.client == 0:
            answer.groups["unmask"]["1"][0] ^= 1
        return answer

    with pytest.raises(TooFewUpdates, match="client 1's secret do not reconstruct it, so one of them was altered"):
        one_round(3, alter)


@pytest.mark.parametrize("phase", PHASES)
def test_a_malformed_answer_drops_the_client(phase: Phase) -> None:
    def alter(at: Phase, answer: Update) -> Update:
        return replace(answer, groups={phase: {"x": torch.ones(3)}}) if (at, answer.client) == (phase, 2) else answer

    updates = one_round(4, alter)[0]
    problems = [u.problem for u in updates]
    assert problems[:2] == ["", ""]
    assert "is not part of secure aggregation" in problems[2] or phase == "unmask"


# Many clients


def test_the_sum_over_a_ring_of_neighbours_is_exact() -> None:
    updates, transport, fleet, info, messages = one_round(12, dropping({3: "masked", 8: "unmask", 5: "keys"}), neighbours=6)
    assert {len(state["keys"]) for state in transport.sent["shares"].values()} <= {5, 6}
    counted = [u for u in fleet.trained if u.client not in (3, 5)]
    assert sum(u.examples for u in updates) == sum(u.examples for u in counted)
    fixed = fixed_of(info, fleet.algorithm)
    sums = total(fixed, counted, messages)
    first = updates[0].groups["adapter"]
    change = np.concatenate([(first[n] - lora_adapter()[n]).flatten().numpy() for n in sorted(first)])
    assert np.abs(change - sums[5:].astype(float) * fixed.unit / int(sums[0])).max() < 1e-6


@quick
@given(st.integers(2, 40), st.integers(2, 12).map(lambda half: 2 * half), st.integers(0, 5))
def test_neighbours_are_mutual_and_as_many_as_configured(clients: int, neighbours: int, round: int) -> None:
    peers = settings(neighbours=neighbours).peers(range(clients), 0, round)
    assert all(client in peers[peer] for client in peers for peer in peers[client])
    assert {len(set(neighbours)) for neighbours in peers.values()} == {min(neighbours, clients - 1)}
    assert all(client not in peers[client] for client in peers)


def test_separate_groups_of_clients_are_not_unmasked() -> None:
    peers = settings(neighbours=4).peers(range(12), 0, 0)
    ring = [0]
    while len(ring) < 12:  # the next client on the ring is the neighbour that shares the most neighbours with the last
        last = ring[-1]
        ring.append(max((p for p in peers[last] if p not in ring), key=lambda p: len(set(peers[p]) & set(peers[last]))))
    gone = (*ring[2:4], *ring[8:10])
    with pytest.raises(TooFewUpdates, match="share masks in separate groups"):
        one_round(12, dropping(dict.fromkeys(gone, "masked")), neighbours=4)


def test_records_count_the_bytes_of_every_phase() -> None:
    algorithm = algorithms.build("fedavg", {})
    fleet, _ = secure(algorithm)
    plan = FederationPlan(range(5), 3, 1, 0.1, "constant", 1, 0, ADAPTER_INFO)
    ((record, _),) = federate(algorithm, fleet, plan, lora_adapter())
    assert isinstance(record, RoundRecord)
    assert set(record.bytes_up) == {"keys", "shares", "masked", "unmask"}
    assert set(record.bytes_down) == {"keys", "shares", "adapter", "unmask"}


def test_the_phases_of_a_round_are_told() -> None:
    algorithm, told = algorithms.build("fedavg", {}), list[tuple[str, int, int, str]]()
    transport = LocalTransport(settings(), algorithm, clients := Clients(algorithm), RUN)
    fleet = SecureFleet(settings(), algorithm, clients, transport, RUN, lambda *call: told.append(call))
    info, state = round_info(0, range(4), clients=4), algorithm.init(lora_adapter())
    fleet.train(info, {client: algorithm.message(state, client, info) for client in info.sampled})
    assert told == [("secure round", n, 4, f"{PHASES[n]}: 4 clients") for n in range(4)] + [("secure round", 4, 4, "")]
