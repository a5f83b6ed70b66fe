"""The adaptive regularisation, and compressed updates."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmllm.algorithms import (
    AdapterInfo,
    ClientInfo,
    LocalResult,
    RoundInfo,
    Update,
    algorithms,
    complete,
    compressions,
    regularizations,
)
from fedmllm.algorithms.adaptive import middle
from fedmllm.algorithms.screening import screen
from fedmllm.errors import ConfigError
from fedmllm.tensors import digest, nbytes, subtract
from helpers import CLIENTS, a_round, built, lora_adapter, quick, round_info, rounds_of

NAMES = lora_adapter(layers=12)


def strengths(gap: float = 0.0, layers: int = 12, **options: object) -> dict[int, float]:
    """layer -> the strength with which its tensors are tied."""
    layer = {name: int(name.split(".")[5]) for name in NAMES}
    info = RoundInfo(0, 1, 1, (0,), 0, AdapterInfo(layers, layer), client=ClientInfo(0, gap))
    algorithm = regularizations.build("adaptive", options)(algorithms.build("fedavg", {}))
    rule = algorithm.rule({"adapter": NAMES}, {}, info)
    return {layer[name]: mu for name, mu in rule.proximal.items()}


def test_only_the_middle_layers_are_tied() -> None:
    # L = 12, edge = 4: 4 ≤ layer ≤ 12 − 1 − 4 = 7
    assert strengths() == dict.fromkeys(range(4, 8), pytest.approx(0.01 * 0.1))
    assert strengths(edge=0).keys() == set(range(12))
    assert strengths(mu=0.5, mu_w=0.5) == dict.fromkeys(range(4, 8), 0.25)


EDGES = [
    (28, 4, range(4, 24)),
    (13, 4, range(4, 9)),
    (12, 4, range(4, 8)),
    (11, 4, range(3, 7)),
    (9, 4, range(2, 6)),
    (8, 4, range(2, 6)),
    (6, 4, range(1, 5)),
    (5, 4, range(4)),
    (3, 4, range(3)),
    (1, 1, range(1)),
    (2, 1, range(1)),
    (7, 0, range(7)),
    (10, 3, range(3, 7)),
]


@pytest.mark.parametrize(("layers", "edge", "expected"), EDGES)
def test_the_edge_shrinks_where_it_leaves_too_few_layers(layers: int, edge: int, expected: range, caplog) -> None:
    middle.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert middle(layers, edge) == middle(layers, edge) == expected
    said = [record.getMessage() for record in caplog.records]
    free = layers - len(expected)
    warning = f"adaptive regularisation: edge = {edge} is too much for {layers} layers; {free} of them are left free"
    assert said == [warning] * (layers < 3 * edge)


@pytest.mark.parametrize("edge", range(7))
def test_a_deeper_model_never_ties_fewer_layers_nor_leaves_fewer_free(edge: int) -> None:
    windows = [middle(layers, edge) for layers in range(1, 50)]
    tied = [len(window) for window in windows]
    assert tied == sorted(tied)
    assert [window.start for window in windows] == sorted(window.start for window in windows)
    assert all(window.stop <= layers for layers, window in enumerate(windows, start=1))
    assert all(window == range(edge, layers - edge) for layers, window in enumerate(windows, start=1) if layers >= 3 * edge)


def test_the_strength_grows_with_what_a_client_lacks() -> None:
    # μ·μ_w·(1 + κ·gap) = 0.001·(1 + 3·½)
    assert strengths(0.5, strength="modality-gap", kappa=3.0) == dict.fromkeys(range(4, 8), pytest.approx(0.0025))
    assert strengths(0.0, strength="modality-gap", kappa=3.0) == strengths()
    assert strengths(0.5, kappa=3.0) == strengths(), "the fixed strength does not depend on the gap"


def test_a_tensor_of_no_layer_is_not_tied() -> None:
    info = RoundInfo(0, 1, 1, (0,), 0, AdapterInfo(12, {}), client=ClientInfo(0, 0.0))
    algorithm = regularizations.build("adaptive", {})(algorithms.build("fedavg", {}))
    assert algorithm.rule({"adapter": NAMES}, {}, info).proximal == {}
    assert algorithm.needs_layers


@pytest.mark.parametrize("name", algorithms.names())
def test_adaptive_adds_to_what_the_algorithm_ties(name: str) -> None:
    inner, outer = algorithms.build(name, {}), built(name, "adaptive")
    info, start = round_info(client=ClientInfo(0, 0.5)), lora_adapter()
    received = complete(inner.message(inner.init(start), 0, info), {}, start)
    plain, tied = inner.rule(received, {}, info), outer.rule(received, {}, info)
    for tensor in start:
        added = tied.proximal.get(tensor, 0.0) - plain.proximal.get(tensor, 0.0)
        inside = info.adapter.layer[tensor] in middle(6, 4)
        assert added == pytest.approx(0.001 if inside else 0.0)
        assert tied.trainable(tensor) == plain.trainable(tensor)
    assert tied.observe_gradient == plain.observe_gradient


@pytest.mark.parametrize("option", ["mu", "mu_w", "edge", "kappa"])
def test_adaptive_options_out_of_range_are_refused(option: str) -> None:
    with pytest.raises(ConfigError, match=f"{option} = -1"):
        regularizations.build("adaptive", {option: -1 if option == "edge" else -1.0})


# Compression


def first_round(compression: str, **options: object):
    """(algorithm, state, updates, the uncompressed updates)."""
    plain = algorithms.build("fedavg", {})
    algorithm = compressions.build(compression, options)(plain)
    state, info = plain.init(lora_adapter()), round_info(0, CLIENTS)
    return algorithm, state, a_round(algorithm, state, {}, info), a_round(plain, state, {}, info)


def test_int8_sends_a_byte_a_number_and_a_scale_a_tensor() -> None:
    _, state, updates, plain = first_round("int8")
    numbers = sum(t.numel() for t in state["adapter"].values())
    for one, full in zip(updates, plain, strict=True):
        assert one.groups.keys() == {"int8", "step"}
        assert (nbytes(one.groups["int8"]), nbytes(one.groups["step"])) == (numbers, 4 * len(state["adapter"]))
        assert nbytes(full.groups["adapter"]) == 4 * numbers


def test_int8_is_within_a_step_and_uses_its_range() -> None:
    _, state, updates, plain = first_round("int8")
    for one, full in zip(updates, plain, strict=True):
        for name, change in subtract(full.groups["adapter"], state["adapter"]).items():
            step = change.abs().max() / 127
            torch.testing.assert_close(one.groups["step"][name], step.reshape(1))
            error = one.groups["int8"][name].float() * step - change
            assert float(error.abs().max()) <= float(step) * 1.001
            assert int(one.groups["int8"][name].abs().max()) == 127


def test_int8_rounding_is_unbiased() -> None:
    """A naive twin: the mean over many rounds of one change is the change, to 5 standard errors."""
    wrapper = compressions.build("int8", {})
    algorithm = wrapper(algorithms.build("fedavg", {}))
    change = {"x": torch.tensor([1.0, 0.123, -0.377, 0.0011])}
    total, rounds = torch.zeros(4, dtype=torch.float64), 4000
    result = LocalResult({"x": torch.zeros(4)}, change, None, 1, 1, 0.1, {})
    for number in range(rounds):
        info = round_info(number, client=ClientInfo(0, 0.0))
        upload, _ = algorithm.finish(result, {"adapter": {"x": torch.zeros(4)}}, {}, info)
        total += upload["int8"]["x"].double() * upload["step"]["x"].double()
    torch.testing.assert_close((total / rounds).float(), change["x"], rtol=0, atol=5 * (0.5 / 127) / rounds**0.5)


def test_int8_noise_is_the_clients_and_the_rounds_own() -> None:
    algorithm, state, updates, _ = first_round("int8")

    def codes(number: int) -> list[str]:
        return [digest(u.groups["int8"]) for u in a_round(algorithm, state, {}, round_info(number, CLIENTS))]

    assert codes(0) == [digest(u.groups["int8"]) for u in updates]
    assert not set(codes(0)) & set(codes(1))


def test_top_k_keeps_the_largest_and_remembers_the_rest() -> None:
    """Change (4, −1, 0.5, −3) with half kept: 4 and −3 travel; −1 and 0.5 wait and join the next change."""
    algorithm = compressions.build("top-k", {"share": 0.5})(algorithms.build("fedavg", {}))
    start = {"x": torch.ones(4)}

    def finish(change: list[float], memory: dict) -> tuple:
        result = LocalResult(start, {"x": start["x"] + torch.tensor(change)}, None, 1, 1, 0.1, {})
        return algorithm.finish(result, {"adapter": start}, memory, round_info(client=ClientInfo(0, 0.0)))

    upload, memory = finish([4, -1, 0.5, -3], {})
    assert upload["places"]["x"].tolist() == [0, 3]
    assert upload["values"]["x"].tolist() == [4, -3]
    assert memory["residual"]["x"].tolist() == [0, -1, 0.5, 0]
    upload, memory = finish([0.25, -1, 0.5, 0], memory)  # with the rest: (0.25, −2, 1, 0)
    assert upload["places"]["x"].tolist() == [1, 2]
    assert upload["values"]["x"].tolist() == [-2, 1]
    assert memory["residual"]["x"].tolist() == [0.25, 0, 0, 0]
    state = algorithm.aggregate({"adapter": start}, [Update(0, upload, 1, 1)], round_info())
    assert state["adapter"]["x"].tolist() == [1, -1, 2, 1]


@quick
@given(share=st.floats(0.01, 1.0), rounds=st.integers(1, 5))
def test_top_k_loses_nothing_for_ever(share: float, rounds: int) -> None:
    """What was sent plus what is remembered is the sum of all changes."""
    algorithm = compressions.build("top-k", {"share": share})(algorithms.build("fedavg", {}))
    start, memory = {"x": torch.zeros(3, 5)}, {}
    generator = torch.Generator().manual_seed(rounds)
    sent, total = torch.zeros(15), torch.zeros(15)
    for _ in range(rounds):
        change = torch.randn(3, 5, generator=generator)
        total += change.flatten()
        result = LocalResult(start, {"x": change}, None, 1, 1, 0.1, {})
        upload, memory = algorithm.finish(result, {"adapter": start}, memory, round_info(client=ClientInfo(0, 0.0)))
        sent[upload["places"]["x"].long()] += upload["values"]["x"]
    torch.testing.assert_close(sent + memory["residual"]["x"].flatten(), total)


def test_top_k_of_everything_is_the_algorithm_itself() -> None:
    plain = algorithms.build("scaffold", {})
    full = compressions.build("top-k", {"share": 1.0})(plain)
    for (_, _, a, _), (_, _, b, _) in zip(rounds_of(plain), rounds_of(full), strict=True):
        for group in a:
            for name in a[group]:
                torch.testing.assert_close(a[group][name], b[group][name], rtol=1e-5, atol=1e-6)


def test_compression_leaves_the_clients_own_memory_alone() -> None:
    algorithm = built("scaffold", compression="top-k")
    memories: dict = {}
    a_round(algorithm, algorithm.init(lora_adapter()), memories, round_info(0, CLIENTS))
    assert all(memory.keys() == {"control", "residual"} for memory in memories.values())


@pytest.mark.parametrize(
    ("places", "why"),
    [
        ([0, 99], "are not increasing numbers below 6"),
        ([-1, 2], "are not increasing numbers below 6"),
        ([3, 3], "are not increasing numbers below 6"),
        ([4, 2], "are not increasing numbers below 6"),
    ],
)
def test_places_that_no_honest_client_sends_are_refused(places: list[int], why: str) -> None:
    algorithm, state, updates, _ = first_round("top-k", share=0.3)
    name = min(state["adapter"])
    spoilt = updates[0]
    assert spoilt.groups["places"][name].numel() == 2
    groups = {**spoilt.groups, "places": {**spoilt.groups["places"], name: torch.tensor(places, dtype=torch.int32)}}
    bad = Update(spoilt.client, groups, spoilt.examples, spoilt.steps)
    good, refused = screen([bad, *updates[1:]], algorithm, state, round_info(0, CLIENTS))
    assert len(good) == 2
    assert why in str(refused[0]["why"])


def test_a_step_that_overflows_is_refused() -> None:
    algorithm, state, updates, _ = first_round("int8")
    name = min(state["adapter"])
    groups = {**updates[0].groups, "step": {**updates[0].groups["step"], name: torch.tensor([3e38])}}
    bad = Update(updates[0].client, groups, 1, 1)
    _, refused = screen([bad, *updates[1:]], algorithm, state, round_info(0, CLIENTS))
    assert "after decompression" in str(refused[0]["why"])


@pytest.mark.parametrize("name", [n for n in algorithms.names() if algorithms.build(n, {}).refactors])
def test_error_feedback_is_refused_where_entries_change_their_meaning(name: str) -> None:
    with pytest.raises(ValueError, match="set feedback = false or use int8"):
        compressions.build("top-k", {})(algorithms.build(name, {}))
    compressions.build("top-k", {"feedback": False})(algorithms.build(name, {}))


@pytest.mark.parametrize("share", [0.0, 1.5, -0.1])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match=f"compression: share = {share} must be above 0"):
        compressions.build("top-k", {"share": share})
