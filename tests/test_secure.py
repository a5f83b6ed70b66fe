"""Secure aggregation: the server sees sums only, the sums are exact, and who drops out is made up for."""

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
from fedmllm.secure.fixed import FixedPoint
from fedmllm.secure.fleet import LocalTransport, SecureFleet
from fedmllm.secure.settings import PHASES, Pairwise, Phase, secures
from fedmllm.secure.site import Parties, change_of
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
Spoil = Callable[[Phase, Update], Update | None]


def settings(**options: object) -> Pairwise:
    made = secures.build("pairwise", options)
    assert made is not None
    return made


class Clients(FakeFleet):
    """Trains only those that are asked, as in a round some of whose clients went away."""

    def train(self, info: RoundInfo, messages: Mapping[int, State]) -> Sequence[Update]:
        self.trained = super().train(replace(info, sampled=tuple(messages)), messages)
        return self.trained

    def forget(self, round: int, clients: Sequence[int]) -> None:
        for client in clients:
            if client in self.before:
                self.memory[client] = self.before[client]


@dataclass
class Wire:
    """A carrier that keeps all that the server sends and sees; `spoil` may replace an answer, or lose it."""

    inner: LocalTransport
    spoil: Spoil = lambda phase, answer: answer
    asked: dict[Phase, Mapping[int, State]] = field(default_factory=dict)
    seen: dict[Phase, dict[int, Update]] = field(default_factory=dict)

    def ask(self, phase: Phase, info: RoundInfo, messages: Mapping[int, State]) -> Sequence[Update]:
        self.asked[phase] = messages
        answers = [self.spoil(phase, answer) for answer in self.inner.ask(phase, info, messages)]
        self.seen[phase] = {answer.client: answer for answer in answers if answer is not None}
        return list(self.seen[phase].values())


def secure(algorithm: Algorithm, spoil: Spoil = lambda phase, answer: answer, **options: object) -> tuple[SecureFleet, Wire]:
    chosen, fleet = settings(**options), Clients(algorithm)
    wire = Wire(LocalTransport(chosen, algorithm, fleet, RUN), spoil)
    return SecureFleet(chosen, algorithm, fleet, wire, RUN), wire


def clients_of(fleet: SecureFleet) -> Clients:
    found = fleet._fleet
    assert isinstance(found, Clients)
    return found


def one_round(
    clients: int = 4, spoil: Spoil = lambda phase, answer: answer, name: str = "fedavg", **options: object
) -> tuple[list[Update], Wire, Clients, RoundInfo, dict[int, State]]:
    algorithm = algorithms.build(name, {})
    fleet, wire = secure(algorithm, spoil, **options)
    info = round_info(0, range(clients), clients=clients)
    state = algorithm.init(lora_adapter())
    messages = {client: algorithm.message(state, client, info) for client in info.sampled}
    return list(fleet.train(info, messages)), wire, clients_of(fleet), info, messages


def lost(at: Mapping[int, Phase]) -> Spoil:
    """Clients that are gone from a phase on."""

    def spoil(phase: Phase, answer: Update) -> Update | None:
        gone = answer.client in at and PHASES.index(phase) >= PHASES.index(at[answer.client])
        return None if gone else answer

    return spoil


def total(fixed: FixedPoint, updates: Sequence[Update], messages: Mapping[int, State]) -> np.ndarray:
    """The sum in plain Python integers, which cannot wrap."""
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


# Which algorithms only average


@pytest.mark.parametrize("parts", COMBINATIONS, ids="-".join)
def test_an_algorithm_that_says_it_averages_cannot_tell_updates_from_copies_of_their_mean(parts: tuple[str, str, str]) -> None:
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
            told, true = (flatten(algorithm.aggregate(state, some, info)) for some in (copies, updates))
            assert all(torch.allclose(told[n], true[n], rtol=1e-4, atol=1e-5) for n in true)
        state = after


def test_what_goes_up_is_known_from_what_goes_down() -> None:
    for name in AVERAGING:
        algorithm = algorithms.build(name, {})
        for number in range(2):
            info, state = round_info(number, CLIENTS), algorithm.init(lora_adapter())
            sent = algorithm.message(state, 1, info)
            assert same(algorithm.uploads(sent, 1, info), algorithm.uploads(state, 1, info)), name


def test_which_algorithms_are_served() -> None:
    assert {"fedavg", "fedadam", "scaffold", "feddyn", "ffa-lora"} <= set(AVERAGING)
    assert not {"fednova", "flora", "flexlora", "fedex-lora", "hetlora", "fedilora"} & set(AVERAGING)
    for compression in ("int8", "top-k"):
        assert built("fedavg", compression=compression).averages is None


# The sum


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize("name", ["fedavg", "scaffold"])
def test_the_sum_is_exact(name: str, bits: int) -> None:
    algorithm = algorithms.build(name, {})
    seen: list[np.ndarray] = []
    fleet, _ = secure(algorithm, bits=bits)
    info = round_info(0, range(5))
    messages = {c: algorithm.message(algorithm.init(lora_adapter()), c, info) for c in info.sampled}
    with pytest.MonkeyPatch.context() as patch:
        decode = FixedPoint.decode

        def kept(self: FixedPoint, vector: np.ndarray, shapes: State, clients: int) -> object:
            seen.append(np.concatenate([p.view(p.dtype.str.replace("u", "i")).astype(object) for p in self.words(vector)]))
            return decode(self, vector, shapes, clients)

        patch.setattr(FixedPoint, "decode", kept)
        fleet.train(info, messages)
    expected = total(fixed_of(info, algorithm, bits=bits), clients_of(fleet).trained, messages)
    assert (seen[0] == expected).all()
    assert seen[0].any()


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
def test_sums_of_integers_never_wrap(clients: list[tuple[list[float], int, float]], bits: int, uniform: bool) -> None:
    if bits == 16:
        clients = clients[:30]  # more are refused
    fixed = FixedPoint(len(clients), 4.0, bits, 100, uniform)
    sums = np.zeros(fixed.nbytes(3), dtype=np.uint8)
    expected = 0
    for values, examples, loss in clients:
        one = Update(0, {}, examples, 1, {"loss": loss})
        vector = fixed.encode({"adapter": tensors(w=values)}, one)
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
        one = Update(0, {}, examples, 2, {"loss": 0.5})
        fixed.add(sums, fixed.encode({"adapter": {"w": torch.tensor(values, dtype=torch.float64)}}, one))
        weights.append(1 if uniform else examples)
        true += weights[-1] * np.array(values)
    mean, told = fixed.decode(sums, {"adapter": tensors(w=[0.0] * 3)}, len(clients))
    assert np.abs(mean["adapter"]["w"].numpy() - true / sum(weights)).max() <= fixed.error(weights) * (1 + 1e-6) + 1e-12
    assert told["examples"] == sum(examples for _, examples in clients)
    assert told["steps"] == 2 * len(clients)
    assert told["loss"] == pytest.approx(0.5)


def test_by_hand() -> None:
    # K = 2, b = 16: Q = 32767 // 2 = 16383; W clip / Q = 4 · 2 / 16383. Client of 1 example: round(1/4 · 1/2 · Q) = 2048.
    fixed = FixedPoint(2, 2.0, 16, 4, uniform=False)
    change: State = {"adapter": tensors(w=[1.0, -9.0, 0.0])}
    one = fixed.encode(change, Update(0, {}, 1, 3, {"loss": 0.25}))
    assert one[40:].view("<i2").tolist() == [2048, -4096, 0], "1 of 4 examples; −9 is cut to −2"
    assert one[:40].view("<i8").tolist() == [1, 3, 1, 2**18, 0], "examples, steps, cut numbers, loss · 2²⁰, padding"
    four = fixed.encode(change, Update(1, {}, 4, 1, {}))
    assert four[40:].view("<i2").tolist() == [8192, -16383, 0]
    fixed.add(one, four)
    mean, told = fixed.decode(one, {"adapter": tensors(w=[0.0] * 3)}, 2)
    assert mean["adapter"]["w"].tolist() == pytest.approx([1.0, -2.0, 0.0], abs=fixed.error([1, 4]))
    assert told == {"examples": 5.0, "steps": 4.0, "clipped": 2.0, "loss": 0.05, "padding": 0.0}


@pytest.mark.parametrize("name", AVERAGING)
def test_a_federation_learns_what_it_learns_in_the_clear(name: str) -> None:
    ends, records = [], []
    for hidden in (False, True):
        algorithm = algorithms.build(name, {})
        fleet = secure(algorithm)[0] if hidden else Clients(algorithm)
        plan = FederationPlan(range(5), 3, 4, 0.1, "constant", 1, 0, ADAPTER_INFO)
        *_, (record, state) = federate(algorithm, fleet, plan, lora_adapter())
        ends.append(flatten(state))
        records.append(record)
    assert max(float((ends[0][n] - ends[1][n]).abs().max()) for n in ends[0]) < 2e-5
    plain, hid = records
    for key in ("examples", "steps", "sampled", "refused"):
        assert getattr(plain, key) == getattr(hid, key)
    assert hid.loss == pytest.approx(plain.loss, abs=1e-5)


# Drop-outs


@quick
@given(st.integers(3, 6), st.data())
def test_any_drop_outs_above_the_threshold_leave_the_exact_sum(clients: int, data: st.DataObject) -> None:
    enough = clients // 2 + 1
    gone = data.draw(st.lists(st.integers(0, clients - 1), unique=True, max_size=clients - enough))
    at = {client: data.draw(st.sampled_from(PHASES)) for client in gone}
    updates, _, fleet, info, messages = one_round(clients, lost(at))
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
def test_below_the_threshold_a_round_fails_with_one_sentence(phase: Phase) -> None:
    with pytest.raises(TooFewUpdates) as caught:
        one_round(5, lost({0: phase, 2: phase, 4: phase}))
    why = "client 0: no answer; client 2: no answer; client 4: no answer"
    assert str(caught.value) == (
        f"round 0: secure aggregation needs 3 of 5 clients to the end, and 2 were left, so the sum stays masked ({why})"
    )


def test_what_clients_remember_of_a_round_that_failed_goes() -> None:
    algorithm = algorithms.build("scaffold", {})
    fleet, _ = secure(algorithm, lost({0: "unmask", 1: "unmask"}))
    info = round_info(0, range(3))
    with pytest.raises(TooFewUpdates):
        fleet.train(info, {c: algorithm.message(algorithm.init(lora_adapter()), c, info) for c in info.sampled})
    assert clients_of(fleet).memory == {0: {}, 1: {}, 2: {}}


def test_a_client_without_samples_withdraws_and_the_others_are_summed() -> None:
    algorithm = algorithms.build("fedavg", {})
    fleet, _ = secure(algorithm)
    clients_of(fleet).spoil = lambda _, updates: [replace(u, examples=0) if u.client == 1 else u for u in updates]
    info = round_info(0, range(4))
    message = algorithm.message(algorithm.init(lora_adapter()), 0, info)
    updates = fleet.train(info, dict.fromkeys(info.sampled, message))
    assert [u.problem for u in updates] == ["", "no examples", "", ""]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"examples": 10_001}, "holds more samples than secure.max_examples = 10000 allows; raise it"),
        ({"groups": {"adapter": {n: t * torch.nan for n, t in lora_adapter().items()}}}, "NaN or infinity in the update"),
    ],
)
def test_a_client_does_not_send_what_must_not_be_summed(change: dict[str, object], why: str) -> None:
    algorithm = algorithms.build("fedavg", {})
    fleet, _ = secure(algorithm)
    clients_of(fleet).spoil = lambda _, updates: [replace(u, **change) if u.client == 1 else u for u in updates]  # type: ignore[arg-type]
    info = round_info(0, range(3))
    message = algorithm.message(algorithm.init(lora_adapter()), 0, info)
    assert [u.problem for u in fleet.train(info, dict.fromkeys(info.sampled, message))] == ["", why, ""]


def test_numbers_that_were_cut_are_told(caplog: pytest.LogCaptureFixture) -> None:
    one_round(3, clip=0.01)
    assert "of the numbers were beyond secure.clip = 0.01 and were cut; raise it" in caplog.text


# What the server sees


def vector_of(wire: Wire, client: int) -> bytes:
    return bytes(wire.seen["masked"][client].groups["masked"]["vector"].numpy())


def test_what_the_server_sees_of_a_client_is_like_random_bytes() -> None:
    algorithm = algorithms.build("fedavg", {})
    adapter = {"w": torch.zeros(100_000)}
    fleet, wire = secure(algorithm)
    clients_of(fleet).train = lambda info, messages, lr: [  # type: ignore[method-assign, assignment]
        Update(c, {"adapter": adapter}, 1, 1) for c in messages
    ]
    info = round_info(0, range(3))
    for _ in range(2):
        fleet.train(info, {c: {"adapter": adapter} for c in info.sampled})
        first = vector_of(wire, 1)
    # Under no mask all but the counts would be 0. χ² of 400,040 bytes over 256 values: mean 255, standard deviation 22.6.
    counts = np.bincount(np.frombuffer(first, dtype=np.uint8), minlength=256)
    chi = float(((counts - len(first) / 256) ** 2 / (len(first) / 256)).sum())
    assert 255 - 6 * 22.6 < chi < 255 + 6 * 22.6
    assert abs(np.corrcoef(np.frombuffer(first[40:], "<u4"), np.frombuffer(vector_of(wire, 0)[40:], "<u4"))[0, 1]) < 0.02


def test_the_same_update_twice_is_masked_differently() -> None:
    seen = [vector_of(one_round(3)[1], 0) for _ in range(2)]
    alike = (np.frombuffer(seen[0], np.uint8) == np.frombuffer(seen[1], np.uint8)).mean()
    assert alike < 0.03, "1 in 256 bytes is the same by chance"


def test_nothing_of_a_single_client_is_in_the_clear() -> None:
    updates, wire, fleet, info, messages = one_round(4)
    fixed = fixed_of(info, fleet.algorithm)
    for phase in PHASES:
        for client, answer in wire.seen[phase].items():
            assert (answer.examples, answer.steps, answer.metrics, answer.problem) == (0, 0, {}, ""), phase
            assert {t.dtype for ts in answer.groups.values() for t in ts.values()} == {torch.uint8}
            assert client in info.sampled
    for update in fleet.trained:
        plain = fixed.encode(change_of(update.groups, messages[update.client]), update)
        masked = np.frombuffer(vector_of(wire, update.client), np.uint8)
        assert (plain == masked).mean() < 0.03
    told = {u.examples for u in updates}
    assert max(told) - min(told) <= 1, "the sum dealt out evenly"


def test_no_masks_cancel_before_the_last_phase() -> None:
    """Not even the sum of all masked vectors says anything while own masks are on."""
    _, wire, fleet, info, messages = one_round(3)
    fixed = fixed_of(info, fleet.algorithm)
    sums = np.zeros(len(vector_of(wire, 0)), np.uint8)
    for client in info.sampled:
        fixed.add(sums, np.frombuffer(vector_of(wire, client), np.uint8))
    expected = total(fixed, fleet.trained, messages)
    assert int(sums[:8].view("<i8")[0]) != expected[0]


def test_bytes_are_those_that_travel() -> None:
    updates, wire, _, info, _ = one_round(4, lost({3: "masked"}))
    for update in updates:
        assert update.travelled is not None
        for told, sent in zip(update.travelled, (wire.asked, {p: _groups(a) for p, a in wire.seen.items()}), strict=True):
            weighed: dict[str, int] = {}
            for phase in PHASES:
                for group, named in sent.get(phase, {}).get(update.client, {}).items():
                    weighed[group] = weighed.get(group, 0) + sum(t.numel() * t.element_size() for t in named.values())
            assert told == weighed
    numbers = sum(t.numel() for t in lora_adapter().values())
    assert updates[0].travelled is not None
    assert updates[0].travelled[1]["masked"] == 4 * numbers + 40
    assert info.sampled == (0, 1, 2, 3)


def _groups(answers: Mapping[int, Update]) -> dict[int, State]:
    return {client: answer.groups for client, answer in answers.items()}


# What clients refuse


class Sites:
    """Three clients' halves, asked by a server that need not be honest."""

    def __init__(self, clients: int = 3) -> None:
        self.algorithm = algorithms.build("fedavg", {})
        self.parties, self.info = Parties(settings(), self.algorithm), round_info(0, range(clients))
        self.attempt = torch.zeros(16, dtype=torch.uint8)
        self.trained = 0
        self.model: State = {"adapter": lora_adapter()}

    def ask(self, phase: Phase, messages: Mapping[int, State], run: str = RUN) -> dict[int, Update]:
        def train(plain: Mapping[int, State]) -> list[Update]:
            self.trained += len(plain)
            return [Update(c, state, 5, 1) for c, state in plain.items()]

        return {u.client: u for u in self.parties.answer(phase, run, self.info, messages, train)}

    def keys(self) -> dict[int, Update]:
        return self.ask("keys", {c: {"keys": {"attempt": self.attempt}} for c in self.info.sampled})

    def shares(self) -> dict[int, Update]:
        keys = {c: torch.cat([u.groups["keys"]["seal"], u.groups["keys"]["mask"]]) for c, u in self.keys().items()}
        return self.ask("shares", {c: {"keys": {str(p): keys[p] for p in keys if p != c}} for c in keys})

    def boxes(self) -> dict[int, State]:
        said = self.shares()
        return {c: {"shares": {str(p): said[p].groups["shares"][str(c)] for p in said if p != c}} for c in said}

    def masked(self, change: Callable[[dict[int, State]], object] = lambda boxes: None) -> dict[int, Update]:
        boxes = self.boxes()
        change(boxes)
        return self.ask("masked", {c: {**self.model, **box} for c, box in boxes.items()})

    def unmask(self, here: Sequence[int], gone: Sequence[int], client: int = 0) -> Update:
        ids = {"here": torch.tensor(here, dtype=torch.int64), "gone": torch.tensor(gone, dtype=torch.int64)}
        return self.ask("unmask", {client: {"unmask": ids}})[client]


def test_both_secrets_of_a_client_are_never_given() -> None:
    sites = Sites()
    sites.masked()
    assert "both secrets of one client" in sites.unmask([0, 1, 2], [1]).problem
    assert "has been answered in this round" in sites.unmask([0, 1, 2], []).problem, "not even after a refusal"


def test_nor_one_after_the_other() -> None:
    sites = Sites()
    sites.masked()
    first = sites.unmask([0, 1, 2], [])
    assert set(first.groups["unmask"]) == {"0", "1", "2"}
    later = sites.unmask([0, 2], [1])
    assert later.problem == "secure aggregation: 'unmask' has been answered in this round"
    assert not later.groups
    again = sites.unmask([0, 1, 2], [])
    assert same(again.groups, first.groups), "the same question again, as networks repeat it, has the same answer"


@pytest.mark.parametrize(
    ("here", "gone", "why"),
    [
        ([0, 1], [], "other clients than it shares masks with"),
        ([0, 1, 2, 9], [], "other clients than it shares masks with"),
        ([1, 2], [0], "other clients than it shares masks with"),
        ([0], [1, 2], "1 clients share masks with it, and 2 are needed"),
    ],
)
def test_secrets_are_given_for_whole_rounds_only(here: list[int], gone: list[int], why: str) -> None:
    sites = Sites()
    sites.masked()
    assert why in sites.unmask(here, gone).problem


def test_altered_shares_are_noticed_before_anything_is_trained() -> None:
    def alter(boxes: dict[int, State]) -> None:
        boxes[1]["shares"]["0"] = boxes[1]["shares"]["0"].clone()
        boxes[1]["shares"]["0"][3] ^= 1

    sites = Sites()
    said = sites.masked(alter)
    assert said[1].problem == "secure aggregation: the shares of client 0 were altered on the way"
    assert (said[0].problem, sites.trained) == ("", 2)


def test_shares_cannot_be_passed_off_as_anothers() -> None:
    def swap(boxes: dict[int, State]) -> None:
        box = boxes[1]["shares"]
        box["0"], box["2"] = box["2"], box["0"]

    assert "altered on the way" in Sites().masked(swap)[1].problem


def test_shares_of_an_earlier_attempt_do_not_fit() -> None:
    sites = Sites()
    old = sites.boxes()
    sites.attempt = sites.attempt + 1
    said = sites.masked(lambda boxes: boxes.update(old))
    assert all("altered on the way" in one.problem for one in said.values())


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"1": 63, "2": 64}, "'1' is not 64 bytes"),
        ({"1": 64, "7": 64}, "the key of a client that is no peer"),
        ({"1": 64, "2": 64, "x": 64}, "the key of a client that is no peer"),
    ],
)
def test_bad_keys_are_refused(keys: dict[str, int], why: str) -> None:
    sites = Sites()
    sites.keys()
    made = {name: torch.from_numpy(stream(0, name).integers(0, 255, size=n, dtype="uint8")) for name, n in keys.items()}
    assert why in sites.ask("shares", {0: {"keys": made}})[0].problem


def test_one_key_for_two_clients_is_refused() -> None:
    sites = Sites()
    sites.keys()
    key = torch.arange(64, dtype=torch.uint8)
    assert "two clients have one key" in sites.ask("shares", {0: {"keys": {"1": key, "2": key}}})[0].problem


def test_a_client_that_was_restarted_says_so() -> None:
    sites = Sites()
    sites.boxes()
    sites.parties = Parties(settings(), sites.algorithm)
    assert "restarted in the middle" in sites.unmask([0, 1, 2], []).problem
    assert "restarted in the middle" in Sites().ask("masked", {0: {"adapter": {}, "shares": {}}})[0].problem


def test_questions_come_in_their_order() -> None:
    sites = Sites()
    sites.shares()
    assert "comes before its turn" in sites.unmask([0, 1, 2], []).problem


def test_a_repeated_question_trains_nobody_twice() -> None:
    sites = Sites()
    boxes = sites.boxes()
    asked = {c: {**sites.model, **box} for c, box in boxes.items()}
    first, second = sites.ask("masked", asked), sites.ask("masked", asked)
    assert sites.trained == 3
    assert all(same(first[c].groups, second[c].groups) for c in first)


def test_a_share_that_was_altered_at_the_end_is_noticed_by_the_server() -> None:
    def spoil(phase: Phase, answer: Update) -> Update:
        if phase == "unmask" and answer.client == 0:
            answer.groups["unmask"]["1"][0] ^= 1
        return answer

    with pytest.raises(TooFewUpdates, match="client 1's secret do not make it, so one of them was altered"):
        one_round(3, spoil)


@pytest.mark.parametrize("phase", PHASES)
def test_answers_of_another_shape_drop_a_client(phase: Phase) -> None:
    def spoil(at: Phase, answer: Update) -> Update:
        return replace(answer, groups={phase: {"x": torch.ones(3)}}) if (at, answer.client) == (phase, 2) else answer

    updates = one_round(4, spoil)[0]
    problems = [u.problem for u in updates]
    assert problems[:2] == ["", ""]
    assert "is no part of secure aggregation" in problems[2] or phase == "unmask"


# Many clients


def test_a_ring_of_neighbours_sums_exactly_too() -> None:
    updates, wire, fleet, info, messages = one_round(12, lost({3: "masked", 8: "unmask", 5: "keys"}), neighbours=6)
    assert {len(state["keys"]) for state in wire.asked["shares"].values()} <= {5, 6}
    counted = [u for u in fleet.trained if u.client not in (3, 5)]
    assert sum(u.examples for u in updates) == sum(u.examples for u in counted)
    fixed = fixed_of(info, fleet.algorithm)
    sums = total(fixed, counted, messages)
    first = updates[0].groups["adapter"]
    change = np.concatenate([(first[n] - lora_adapter()[n]).flatten().numpy() for n in sorted(first)])
    assert np.abs(change - sums[5:].astype(float) * fixed.unit / int(sums[0])).max() < 1e-6


@quick
@given(st.integers(2, 40), st.integers(2, 12).map(lambda half: 2 * half), st.integers(0, 5))
def test_neighbours_are_mutual_and_as_many_as_asked(clients: int, neighbours: int, round: int) -> None:
    peers = settings(neighbours=neighbours).peers(range(clients), 0, round)
    assert all(one in peers[other] for one in peers for other in peers[one])
    assert {len(set(some)) for some in peers.values()} == {min(neighbours, clients - 1)}
    assert all(one not in peers[one] for one in peers)


def test_clients_that_fall_apart_are_not_unmasked() -> None:
    peers = settings(neighbours=4).peers(range(12), 0, 0)
    ring = [0]
    while len(ring) < 12:  # walk the ring: the next is the neighbour that shares most with the last
        last = ring[-1]
        ring.append(max((p for p in peers[last] if p not in ring), key=lambda p: len(set(peers[p]) & set(peers[last]))))
    gone = (*ring[2:4], *ring[8:10])
    with pytest.raises(TooFewUpdates, match="share masks in groups apart"):
        one_round(12, lost(dict.fromkeys(gone, "masked")), neighbours=4)


# Options and primitives


@pytest.mark.parametrize(
    ("options", "why"),
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
def test_bad_options_are_refused(options: dict[str, object], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        settings(**options)


def test_sums_that_would_be_too_coarse_are_refused() -> None:
    with pytest.raises(ValueError, match=r"secure.bits = 16 leaves only 327 steps .* 100 clients"):
        FixedPoint(100, 4.0, 16, 10, uniform=False)


@quick
@given(st.integers(2, 9), st.data())
def test_shares_make_the_secret_and_fewer_do_not(holders: int, data: st.DataObject) -> None:
    enough = data.draw(st.integers(2, holders))
    secret = crypto.fresh()
    shares = list(enumerate(crypto.split(secret, enough, holders)))
    chosen = data.draw(st.permutations(shares))
    assert crypto.combine(chosen[:enough]) == secret
    assert crypto.combine(chosen[: enough - 1]) != secret


def test_keys_are_for_one_purpose() -> None:
    secret = crypto.fresh()
    assert (
        len({crypto.derive(secret, *words) for words in (("a", "b"), ("ab",), ("a", "b", 0), ("b", "a"), (1, 23), (12, 3))})
        == 6
    )
    one, other = crypto.KeyPair.of(crypto.fresh()), crypto.KeyPair.of(crypto.fresh())
    assert one.agree(other.public) == other.agree(one.public)
    with pytest.raises(ValueError, match="altered"):
        crypto.unseal(bytes(32), crypto.seal(bytes(31) + b"1", b"x"))


def test_records_say_what_travelled() -> None:
    algorithm = algorithms.build("fedavg", {})
    fleet, _ = secure(algorithm)
    plan = FederationPlan(range(5), 3, 1, 0.1, "constant", 1, 0, ADAPTER_INFO)
    ((record, _),) = federate(algorithm, fleet, plan, lora_adapter())
    assert isinstance(record, RoundRecord)
    assert set(record.bytes_up) == {"keys", "shares", "masked", "unmask"}
    assert set(record.bytes_down) == {"keys", "shares", "adapter", "unmask"}
