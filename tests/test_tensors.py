from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmllm import tensors as t
from fedmllm.storage.atomic import write_atomically
from fedmllm.storage.state_file import load_state, save_state
from fedmllm.tensors import State, Tensors
from helpers import quick, same, tensors

numbers = st.floats(-1e6, 1e6, width=32)
weights = st.floats(0.01, 1000)
group_names = st.text(st.characters(exclude_characters="/", codec="utf-8"), max_size=6)
states = st.dictionaries(
    group_names,
    st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=6), numbers.map(torch.tensor), min_size=1, max_size=3),
    max_size=3,
)


def test_arithmetic_is_done_per_name() -> None:
    a, b = tensors(x=[1, 2], y=3), tensors(x=[10, 20], y=30)
    assert same({"g": t.add(a, b)}, {"g": tensors(x=[11, 22], y=33)})
    assert same({"g": t.subtract(b, a)}, {"g": tensors(x=[9, 18], y=27)})
    assert same({"g": t.scale(a, -2)}, {"g": tensors(x=[-2, -4], y=-6)})
    assert same({"g": t.zeros_like(a)}, {"g": tensors(x=[0, 0], y=0)})


@pytest.mark.parametrize("function", [t.add, t.subtract, t.distance, lambda a, b: t.weighted_mean([a, b], [1, 1])])
def test_different_names_are_refused_by_name(function: Callable[[Tensors, Tensors], object]) -> None:
    with pytest.raises(ValueError, match="differ in 2 names, the first is 'y'"):
        function(tensors(x=1, y=2), tensors(x=1, z=2))


def test_inputs_are_never_modified() -> None:
    a, b = tensors(x=[1, 2], y=3), tensors(x=[5, 6], y=7)
    before = t.digest(a), t.digest(b)
    for result in (t.add(a, b), t.subtract(a, b), t.scale(a, 1), t.zeros_like(a), t.clone(a), t.weighted_mean([a], [1])):
        for tensor in result.values():
            tensor.fill_(99)
    assert (t.digest(a), t.digest(b)) == before


def test_weighted_mean_by_hand() -> None:
    mean = t.weighted_mean([tensors(x=[0, 4]), tensors(x=[8, 0])], [3, 1])
    assert mean["x"].tolist() == [2, 3]


@quick
@given(st.lists(st.tuples(numbers, weights), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_weighted_mean_is_bounded_and_ignores_the_order(pairs: list[tuple[float, float]], random: object) -> None:
    mean = t.weighted_mean([tensors(x=v) for v, _ in pairs], [w for _, w in pairs])["x"]
    assert min(v for v, _ in pairs) <= float(mean) <= max(v for v, _ in pairs)
    shuffled = list(pairs)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    other = t.weighted_mean([tensors(x=v) for v, _ in shuffled], [w for _, w in shuffled])["x"]
    torch.testing.assert_close(other, mean, rtol=1e-6, atol=1e-6)


def test_weighted_mean_sums_in_float64_and_keeps_the_dtype() -> None:
    items = [{"x": torch.tensor(v)} for v in (1e8, 1.0, -1e8)]  # in float32, 1e8 + 1 is 1e8
    assert float(t.weighted_mean(items, [1, 1, 1])["x"]) == pytest.approx(1 / 3)
    half = {"x": torch.ones(2, dtype=torch.bfloat16)}
    assert t.weighted_mean([half, half], [1, 2])["x"].dtype == torch.bfloat16


@pytest.mark.parametrize(("values", "by"), [([], []), ([1.0], []), ([1.0, 2.0], [0, 0]), ([1.0, 2.0], [1, float("nan")])])
def test_weighted_mean_needs_items_and_positive_weights(values: list[float], by: list[float]) -> None:
    with pytest.raises(ValueError, match="weights"):
        t.weighted_mean([tensors(x=v) for v in values], by)


@given(st.dictionaries(st.text(max_size=3), numbers.map(torch.tensor), max_size=9), st.randoms())
@quick
def test_the_norm_does_not_depend_on_the_order(a: Tensors, random: Random) -> None:
    assert t.norm(a) == t.norm(dict(random.sample(list(a.items()), len(a))))


def test_norm_distance_and_bytes() -> None:
    a = tensors(x=[3, 0], y=4)
    assert t.norm(a) == 5
    assert t.distance(a, tensors(x=[3, 0], y=-8)) == 12
    assert t.norm({}) == 0
    assert t.nbytes({**a, "z": torch.zeros(3, dtype=torch.bfloat16)}) == 8 + 4 + 6


@pytest.mark.parametrize(
    ("candidate", "why"),
    [
        (tensors(x=[1, 2], y=3), None),
        (tensors(x=[1, 2]), "missing tensor 'y'"),
        (tensors(x=[1, 2], y=3, a=0), "unknown tensor 'a'"),
        (tensors(x=[1], y=3), "shape (1,) of 'x' is not (2,)"),
        ({**tensors(x=[1, 2]), "y": torch.tensor(3.0, dtype=torch.float64)}, "dtype torch.float64 of 'y' is not torch.float32"),
        (tensors(x=[1, float("nan")], y=3), "NaN or infinity in 'x'"),
        (tensors(x=[1, 2], y=float("-inf")), "NaN or infinity in 'y'"),
    ],
)
def test_problem_with_gives_the_first_difference(candidate: Tensors, why: str | None) -> None:
    assert t.problem_with(candidate, tensors(x=[0, 0], y=0)) == why


@quick
@given(states)
def test_flatten_and_unflatten_are_inverse(state: State) -> None:
    assert t.unflatten(t.flatten(state)) == state


def test_flatten_refuses_a_slash_in_a_group_and_drops_empty_groups() -> None:
    with pytest.raises(ValueError, match="'a/b'"):
        t.flatten({"a/b": tensors(x=1)})
    assert t.flatten({"a": tensors(x=1), "empty": {}}).keys() == {"a/x"}


def test_digest_does_not_depend_on_the_order_of_names() -> None:
    base = tensors(x=[[1, 2], [3, 4]], y=0)
    assert t.digest(base) == t.digest(dict(reversed(base.items())))
    assert t.digest(base) == t.digest({**base, "x": base["x"].t().contiguous().t()})  # another memory layout
    others: list[Tensors] = [
        tensors(x=[[1, 2], [3, 5]], y=0),
        tensors(x=[1, 2, 3, 4], y=0),
        tensors(z=[[1, 2], [3, 4]], y=0),
        {**base, "y": torch.tensor(0, dtype=torch.int32)},
    ]
    assert len({t.digest(base), *map(t.digest, others)}) == 5


def test_digest_is_the_same_on_every_machine() -> None:
    mixed_types = {"a": torch.tensor(1.0), "b": torch.ones(0, 3), "c": torch.ones(2, dtype=torch.bfloat16)}
    assert t.digest(mixed_types) == "96961d37b663f6dcf7be7d15772df1c6e3b5c2d669a6f3aa5e4e4e46c7e79446"


def test_a_saved_state_loads_equal(tmp_path: Path) -> None:
    state = {
        "adapter": {"a/b": torch.arange(6.0).reshape(2, 3).t(), "scalar": torch.tensor(2.0)},
        "m": {"half": torch.ones(3, dtype=torch.bfloat16), "none": torch.zeros(0, 2)},
    }
    save_state(tmp_path / "deep" / "s.safetensors", state, {"round": "3"})
    loaded, metadata = load_state(tmp_path / "deep" / "s.safetensors")
    assert same(loaded, state)
    assert metadata == {"round": "3"}


def test_tensors_that_share_memory_can_be_saved(tmp_path: Path) -> None:
    stacked = torch.arange(4.0).reshape(2, 2)
    state = {"adapter": {"x": stacked[0]}, "reference": {"x": stacked[0], "all": stacked}}
    save_state(tmp_path / "s", state)
    assert same(load_state(tmp_path / "s")[0], state)


def test_an_empty_state_can_be_saved(tmp_path: Path) -> None:
    save_state(tmp_path / "s", {})
    assert load_state(tmp_path / "s") == ({}, {})


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"


def test_a_write_leaves_no_other_file(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", b"old")
    write_atomically(tmp_path / "file", b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"new")]
