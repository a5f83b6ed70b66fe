"""Options of secure aggregation, updates as integers, and the cryptographic primitives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmllm.algorithms import Update
from fedmllm.errors import ConfigError
from fedmllm.secure import primitives as crypto
from fedmllm.secure.fixed import FixedPoint
from fedmllm.tensors import State
from helpers import (
    quick,
    tensors,
)
from secure_rounds import (
    settings,
)

# Updates as integers


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
