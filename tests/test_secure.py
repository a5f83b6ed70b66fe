"""Secure aggregation: the server sees only sums, the sums are exact, and drop-outs are tolerated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmllm.algorithms import Algorithm, RoundInfo, Update, algorithms
from fedmllm.errors import ConfigError
from fedmllm.federation import FederationPlan, RoundRecord, TooFewUpdates, federate
from fedmllm.rng import stream
from fedmllm.secure import primitives as crypto
from fedmllm.secure.clients import SecureClients, change_of
from fedmllm.secure.fixed import FixedPoint
from fedmllm.secure.fleet import LocalTransport, SecureFleet
from fedmllm.secure.settings import PHASES, Pairwise, Phase, secures
from fedmllm.tensors import State, flatten
from helpers import (
    ADAPTER_INFO,
    CLIENTS,
    COMBINATIONS,
    FakeFleet,
    a_round,
    built,
    lora_adapter,
    quick,
    round_info,
    same,
    tensors,
)

RUN = "ab" * 8
AVERAGING = [name for name in algorithms.names() if algorithms.build(name, {}).averages]
Alter = Callable[[Phase, Update], Update | None]


def settings(**options: object) -> Pairwise:
    pairwise = secures.build("pairwise", options)
    assert pairwise is not None
    return pairwise


class Clients(FakeFleet):
    """Trains only the clients that receive a message, as in a round that lost some clients."""

    def train(self, info: RoundInfo, messages: Mapping[int, State]) -> Sequence[Update]:
        self.trained = super().train(replace(info, sampled=tuple(messages)), messages)
        return self.trained

    def forget(self, round: int, clients: Sequence[int]) -> None:
        for client in clients:
            if client in self.before:
                self.memory[client] = self.before[client]


@dataclass
class RecordingTransport:
    """Keeps everything that the server sends and receives; `alter` may replace an answer, or lose it by returning None."""

    inner: LocalTransport
    alter: Alter = lambda phase, answer: answer
    sent: dict[Phase, Mapping[int, State]] = field(default_factory=dict)
    received: dict[Phase, dict[int, Update]] = field(default_factory=dict)

    def request(self, phase: Phase, info: RoundInfo, messages: Mapping[int, State]) -> Sequence[Update]:
        self.sent[phase] = messages
        answers = [self.alter(phase, answer) for answer in self.inner.request(phase, info, messages)]
        self.received[phase] = {answer.client: answer for answer in answers if answer is not None}
        return list(self.received[phase].values())


def secure(
    algorithm: Algorithm, alter: Alter = lambda phase, answer: answer, **options: object
) -> tuple[SecureFleet, RecordingTransport]:
    pairwise, fleet = settings(**options), Clients(algorithm)
    transport = RecordingTransport(LocalTransport(pairwise, algorithm, fleet, RUN), alter)
    return SecureFleet(pairwise, algorithm, fleet, transport, RUN), transport


def clients_of(fleet: SecureFleet) -> Clients:
    assert isinstance(fleet.fleet, Clients)
    return fleet.fleet


def one_round(
    clients: int = 4, alter: Alter = lambda phase, answer: answer, name: str = "fedavg", **options: object
) -> tuple[list[Update], RecordingTransport, Clients, RoundInfo, dict[int, State]]:
    algorithm = algorithms.build(name, {})
    fleet, transport = secure(algorithm, alter, **options)
    info = round_info(0, range(clients), clients=clients)
    state = algorithm.init(lora_adapter())
    messages = {client: algorithm.message(state, client, info) for client in info.sampled}
    return list(fleet.train(info, messages)), transport, clients_of(fleet), info, messages


def dropping(at: Mapping[int, Phase]) -> Alter:
    """Lose the answers of clients from the given phase on."""

    def alter(phase: Phase, answer: Update) -> Update | None:
        gone = answer.client in at and PHASES.index(phase) >= PHASES.index(at[answer.client])
        return None if gone else answer

    return alter


def total(fixed: FixedPoint, updates: Sequence[Update], messages: Mapping[int, State]) -> np.ndarray:
    """The sum in Python integers, which cannot overflow."""
    sums: list[int] = []
    for update in updates:
        vector = fixed.encode(change_of(update.groups, messages[update.client]), update)
        head, body = (part.view(part.dtype.str.replace("u", "i")) for part in fixed.words(vector))
        numbers = [int(x) for x in (*head, *body)]
        sums = [a + b for a, b in zip(sums, numbers, strict=True)] if sums else numbers
    return np.array(sums, dtype=object)


def fixed_of(info: RoundInfo, algorithm: Algorithm, **options: object) -> FixedPoint:
    assert algorithm.averages is not None
    return FixedPoint.of(settings(**options), len(info.sampled), algorithm.averages)


# The algorithms that only average


@pytest.mark.parametrize("parts", COMBINATIONS, ids="-".join)
def test_an_averaging_algorithm_cannot_distinguish_updates_from_copies_of_their_mean(parts: tuple[str, str, str]) -> None:
    algorithm = built(*parts)
    memories: dict[int, State] = {}
    state = algorithm.init(lora_adapter())
    for number in range(2):
        info = round_info(number, CLIENTS)
        updates = a_round(algorithm, state, memories, info)
        weights = [u.examples if algorithm.averages == "examples" else 1 for u in updates]
        mean: State = {
            group: {
                name: sum(w * u.groups[group][name].double() for w, u in zip(weights, updates, strict=True)) / sum(weights)
                for name in tensors
            }
            for group, tensors in updates[0].groups.items()
        }
        copies = [
            replace(u, groups={g: {n: t.to(u.groups[g][n].dtype) for n, t in ts.items()} for g, ts in mean.items()}, examples=7)
            for u in updates
        ]
        after = algorithm.aggregate(state, updates, info)
        if algorithm.averages is not None:
            from_copies, true = (flatten(algorithm.aggregate(state, batch, info)) for batch in (copies, updates))
            assert all(torch.allclose(from_copies[n], true[n], rtol=1e-4, atol=1e-5) for n in true)
        state = after


def test_the_message_determines_the_shapes_of_the_upload() -> None:
    for name in AVERAGING:
        algorithm = algorithms.build(name, {})
        for number in range(2):
            info, state = round_info(number, CLIENTS), algorithm.init(lora_adapter())
            message = algorithm.message(state, 1, info)
            assert same(algorithm.uploads(message, 1, info), algorithm.uploads(state, 1, info)), name


def test_which_algorithms_can_be_hidden() -> None:
    assert {"fedavg", "fedadam", "scaffold", "feddyn", "ffa-lora"} <= set(AVERAGING)
    assert not {"fednova", "flora", "flexlora", "fedex-lora", "hetlora", "fedilora"} & set(AVERAGING)
    for compression in ("int8", "top-k"):
        assert built("fedavg", compression=compression).averages is None


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


@quick
@given(
    st.lists(
        st.tuples(st.lists(st.floats(-1e9, 1e9), min_size=3, max_size=3), st.integers(1, 100), st.floats(-1e9, 1e9)),
        min_size=2,
        max_size=40,
    ),
    st.sampled_from([16, 32, 64]),
    st.booleans(),
)
def test_sums_of_integers_never_overflow(clients: list[tuple[list[float], int, float]], bits: int, uniform: bool) -> None:
    if bits == 16:
        clients = clients[:30]  # more are refused
    fixed = FixedPoint(len(clients), 4.0, bits, 100, uniform)
    sums = np.zeros(fixed.nbytes(3), dtype=np.uint8)
    expected = 0
    for values, examples, loss in clients:
        update = Update(0, {}, examples, 1, {"loss": loss})
        vector = fixed.encode({"adapter": tensors(w=values)}, update)
        expected = expected + np.array([int(x) for x in vector[40:].view(f"<i{bits // 8}")], dtype=object)
        fixed.add(sums, vector)
    assert [int(x) for x in sums[40:].view(f"<i{bits // 8}")] == list(expected)


@quick
@given(
    st.lists(st.tuples(st.lists(st.floats(-4, 4), min_size=3, max_size=3), st.integers(1, 500)), min_size=2, max_size=20),
    st.sampled_from([16, 32, 64]),
    st.booleans(),
)
def test_the_mean_is_within_the_documented_bound(clients: list[tuple[list[float], int]], bits: int, uniform: bool) -> None:
    fixed = FixedPoint(len(clients), 4.0, bits, 500, uniform)
    sums, weights = np.zeros(fixed.nbytes(3), dtype=np.uint8), []
    true = np.zeros(3)
    for values, examples in clients:
        update = Update(0, {}, examples, 2, {"loss": 0.5})
        fixed.add(sums, fixed.encode({"adapter": {"w": torch.tensor(values, dtype=torch.float64)}}, update))
        weights.append(1 if uniform else examples)
        true += weights[-1] * np.array(values)
    mean, totals = fixed.decode(sums, {"adapter": tensors(w=[0.0] * 3)}, len(clients))
    assert np.abs(mean["adapter"]["w"].numpy() - true / sum(weights)).max() <= fixed.error(weights) * (1 + 1e-6) + 1e-12
    assert totals["examples"] == sum(examples for _, examples in clients)
    assert totals["steps"] == 2 * len(clients)
    assert totals["loss"] == pytest.approx(0.5)


def test_an_encoding_computed_by_hand() -> None:
    # K = 2, b = 16: Q = 32767 // 2 = 16383; W clip / Q = 4 · 2 / 16383. Client of 1 example: round(1/4 · 1/2 · Q) = 2048.
    fixed = FixedPoint(2, 2.0, 16, 4, uniform=False)
    change: State = {"adapter": tensors(w=[1.0, -9.0, 0.0])}
    first = fixed.encode(change, Update(0, {}, 1, 3, {"loss": 0.25}))
    assert first[40:].view("<i2").tolist() == [2048, -4096, 0], "1 of 4 examples; −9 is clipped to −2"
    assert first[:40].view("<i8").tolist() == [1, 3, 1, 2**18, 0], "examples, steps, clipped numbers, loss · 2²⁰, padding"
    second = fixed.encode(change, Update(1, {}, 4, 1, {}))
    assert second[40:].view("<i2").tolist() == [8192, -16383, 0]
    fixed.add(first, second)
    mean, totals = fixed.decode(first, {"adapter": tensors(w=[0.0] * 3)}, 2)
    assert mean["adapter"]["w"].tolist() == pytest.approx([1.0, -2.0, 0.0], abs=fixed.error([1, 4]))
    assert totals == {"examples": 5.0, "steps": 4.0, "clipped": 2.0, "loss": 0.05, "padding": 0.0}


@pytest.mark.parametrize("name", AVERAGING)
def test_a_secure_federation_learns_the_same_as_an_open_one(name: str) -> None:
    ends, records = [], []
    for hidden in (False, True):
        algorithm = algorithms.build(name, {})
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


# What clients refuse


class MaliciousServer:
    """Sends requests to the client halves of three clients, honest ones or others."""

    def __init__(self, clients: int = 3) -> None:
        self.algorithm = algorithms.build("fedavg", {})
        self.clients, self.info = SecureClients(settings(), self.algorithm), round_info(0, range(clients))
        self.attempt = torch.zeros(16, dtype=torch.uint8)
        self.trained = 0
        self.model: State = {"adapter": lora_adapter()}

    def request(self, phase: Phase, messages: Mapping[int, State], run: str = RUN) -> dict[int, Update]:
        def train(unmasked: Mapping[int, State]) -> list[Update]:
            self.trained += len(unmasked)
            return [Update(c, state, 5, 1) for c, state in unmasked.items()]

        return {u.client: u for u in self.clients.answer(phase, run, self.info, messages, train)}

    def keys(self) -> dict[int, Update]:
        return self.request("keys", {c: {"keys": {"attempt": self.attempt}} for c in self.info.sampled})

    def shares(self) -> dict[int, Update]:
        keys = {c: torch.cat([u.groups["keys"]["seal"], u.groups["keys"]["mask"]]) for c, u in self.keys().items()}
        return self.request("shares", {c: {"keys": {str(p): keys[p] for p in keys if p != c}} for c in keys})

    def sealed(self) -> dict[int, State]:
        shares = self.shares()
        return {c: {"shares": {str(p): shares[p].groups["shares"][str(c)] for p in shares if p != c}} for c in shares}

    def masked(self, change: Callable[[dict[int, State]], object] = lambda inboxes: None) -> dict[int, Update]:
        inboxes = self.sealed()
        change(inboxes)
        return self.request("masked", {c: {**self.model, **inbox} for c, inbox in inboxes.items()})

    def unmask(self, present: Sequence[int], gone: Sequence[int], client: int = 0) -> Update:
        ids = {"here": torch.tensor(present, dtype=torch.int64), "gone": torch.tensor(gone, dtype=torch.int64)}
        return self.request("unmask", {client: {"unmask": ids}})[client]


def test_both_secrets_of_a_client_are_never_sent() -> None:
    server = MaliciousServer()
    server.masked()
    assert "both secrets of one client" in server.unmask([0, 1, 2], [1]).problem
    assert "was already answered in this round" in server.unmask([0, 1, 2], []).problem, "not even after a refusal"


def test_nor_are_they_sent_one_after_the_other() -> None:
    server = MaliciousServer()
    server.masked()
    first = server.unmask([0, 1, 2], [])
    assert set(first.groups["unmask"]) == {"0", "1", "2"}
    later = server.unmask([0, 2], [1])
    assert later.problem == "secure aggregation: 'unmask' was already answered in this round"
    assert not later.groups
    again = server.unmask([0, 1, 2], [])
    assert same(again.groups, first.groups), "a repeated request gets the same answer"


@pytest.mark.parametrize(
    ("present", "gone", "reason"),
    [
        ([0, 1], [], "clients other than those with which it shares masks"),
        ([0, 1, 2, 9], [], "clients other than those with which it shares masks"),
        ([1, 2], [0], "clients other than those with which it shares masks"),
        ([0], [1, 2], "1 clients share masks with it, and 2 are needed"),
    ],
)
def test_secrets_are_sent_for_whole_rounds_only(present: list[int], gone: list[int], reason: str) -> None:
    server = MaliciousServer()
    server.masked()
    assert reason in server.unmask(present, gone).problem


def test_altered_shares_are_detected_before_training() -> None:
    def alter(inboxes: dict[int, State]) -> None:
        shares = inboxes[1]["shares"]
        shares["0"] = shares["0"].clone()
        shares["0"][3] ^= 1

    server = MaliciousServer()
    answers = server.masked(alter)
    assert answers[1].problem == "secure aggregation: the shares of client 0 were altered in transit"
    assert (answers[0].problem, server.trained) == ("", 2)


def test_shares_of_another_client_are_detected() -> None:
    def swap(inboxes: dict[int, State]) -> None:
        shares = inboxes[1]["shares"]
        shares["0"], shares["2"] = shares["2"], shares["0"]

    assert "altered in transit" in MaliciousServer().masked(swap)[1].problem


def test_shares_of_an_earlier_attempt_are_detected() -> None:
    server = MaliciousServer()
    old_shares = server.sealed()
    server.attempt = server.attempt + 1
    answers = server.masked(lambda inboxes: inboxes.update(old_shares))
    assert all("altered in transit" in answer.problem for answer in answers.values())


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"1": 63, "2": 64}, "'1' is not 64 bytes"),
        ({"1": 64, "7": 64}, "the key of a client that is not a peer"),
        ({"1": 64, "2": 64, "x": 64}, "the key of a client that is not a peer"),
    ],
)
def test_bad_keys_are_refused(keys: dict[str, int], reason: str) -> None:
    server = MaliciousServer()
    server.keys()
    forged = {name: torch.from_numpy(stream(0, name).integers(0, 255, size=n, dtype="uint8")) for name, n in keys.items()}
    assert reason in server.request("shares", {0: {"keys": forged}})[0].problem


def test_the_same_key_for_two_clients_is_refused() -> None:
    server = MaliciousServer()
    server.keys()
    key = torch.arange(64, dtype=torch.uint8)
    assert "two clients have the same key" in server.request("shares", {0: {"keys": {"1": key, "2": key}}})[0].problem


def test_a_restarted_client_refuses_to_continue() -> None:
    server = MaliciousServer()
    server.sealed()
    server.clients = SecureClients(settings(), server.algorithm)
    assert "restarted in the middle" in server.unmask([0, 1, 2], []).problem
    assert "restarted in the middle" in MaliciousServer().request("masked", {0: {"adapter": {}, "shares": {}}})[0].problem


def test_phases_must_be_requested_in_order() -> None:
    server = MaliciousServer()
    server.shares()
    assert "was requested too early" in server.unmask([0, 1, 2], []).problem


def test_a_repeated_request_trains_nobody_twice() -> None:
    server = MaliciousServer()
    messages = {client: {**server.model, **inbox} for client, inbox in server.sealed().items()}
    first, second = server.request("masked", messages), server.request("masked", messages)
    assert server.trained == 3
    assert all(same(first[c].groups, second[c].groups) for c in first)


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


# Options and primitives


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"threshold": 0.4}, "threshold = 0.4 must be at least 0.5"),
        ({"threshold": 1.0}, "threshold = 1.0 must be at least 0.5 and below 1"),
        ({"neighbours": 3}, "neighbours = 3 must be 0"),
        ({"clip": 0.0}, "clip = 0.0 must be above 0"),
        ({"bits": 24}, "secure.bits: input should be 16, 32 or 64"),
        ({"max_examples": 2**21}, "max_examples = 2097152 must be at least 1"),
        ({"treshold": 0.5}, "did you mean 'threshold'"),
    ],
)
def test_invalid_options_are_refused(options: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        settings(**options)


def test_settings_that_are_too_coarse_are_refused() -> None:
    with pytest.raises(ValueError, match=r"secure.bits = 16 leaves only 327 steps .* 100 clients"):
        FixedPoint(100, 4.0, 16, 10, uniform=False)


@quick
@given(st.integers(2, 9), st.data())
def test_enough_shares_reconstruct_the_secret_and_fewer_do_not(holders: int, data: st.DataObject) -> None:
    threshold = data.draw(st.integers(2, holders))
    secret = crypto.new_seed()
    shares = data.draw(st.permutations(list(enumerate(crypto.split(secret, threshold, holders)))))
    assert crypto.combine(shares[:threshold]) == secret
    assert crypto.combine(shares[: threshold - 1]) != secret


def test_keys_depend_on_their_purpose() -> None:
    secret = crypto.new_seed()
    assert (
        len({crypto.derive(secret, *words) for words in (("a", "b"), ("ab",), ("a", "b", 0), ("b", "a"), (1, 23), (12, 3))})
        == 6
    )
    pair, other = crypto.KeyPair.of(crypto.new_seed()), crypto.KeyPair.of(crypto.new_seed())
    assert pair.agree(other.public) == other.agree(pair.public)
    with pytest.raises(ValueError, match="altered"):
        crypto.unseal(bytes(32), crypto.seal(bytes(31) + b"1", b"x"))


def test_records_count_the_bytes_of_every_phase() -> None:
    algorithm = algorithms.build("fedavg", {})
    fleet, _ = secure(algorithm)
    plan = FederationPlan(range(5), 3, 1, 0.1, "constant", 1, 0, ADAPTER_INFO)
    ((record, _),) = federate(algorithm, fleet, plan, lora_adapter())
    assert isinstance(record, RoundRecord)
    assert set(record.bytes_up) == {"keys", "shares", "masked", "unmask"}
    assert set(record.bytes_down) == {"keys", "shares", "adapter", "unmask"}
