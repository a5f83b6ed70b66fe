"""LoRA-A² against a naive twin, its identities, and what its packed updates promise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedmllm.algorithms import Algorithm, LocalResult, compressions
from fedmllm.algorithms.factors import A, B, modules
from fedmllm.algorithms.lora_a2 import frozen, largest, scores
from fedmllm.algorithms.screening import screen
from fedmllm.errors import ConfigError
from fedmllm.tensors import Tensors, bytes_by_group
from helpers import (
    CLIENTS,
    LR,
    a_round,
    built,
    examples_of,
    lora_adapter,
    round_info,
    rounds_of,
    steps_of,
    target,
    tensors,
)  # fmt: skip

Matrices = dict[str, np.ndarray]


def arrays(adapter: Tensors) -> Matrices:
    return {name: tensor.double().numpy().copy() for name, tensor in adapter.items()}


def naive_round(start: Matrices, number: int, shares: dict[int, float], factor: float) -> Matrices:
    """A round of the toy clients, which descend ½ ‖w − target‖², one rank of one module at a time."""
    trained = A if number % 2 else B
    lr = LR * (factor if trained == B else 1.0)
    names = sorted({name.removesuffix(A).removesuffix(B) for name in start})
    ranks = [(m, i) for m in names for i in range(start[m + A].shape[0])]
    mean = {name: np.zeros_like(tensor) for name, tensor in start.items()}
    for client, share in shares.items():
        goal = {m: target(client, m + trained, start[m + trained].shape).double().numpy() for m in names}
        after = {m: goal[m] + (1 - lr) ** steps_of(client) * (start[m + trained] - goal[m]) for m in names}
        score: dict[tuple[str, int], float] = {}
        for m, i in ranks:
            change = after[m] - start[m + trained]
            if trained == B:
                score[m, i] = float(np.linalg.norm(change[:, i]) * np.linalg.norm(start[m + A][i]))
            else:
                score[m, i] = float(np.linalg.norm(start[m + B][:, i]) * np.linalg.norm(change[i]))
        kept = sorted(ranks, key=lambda rank: -score[rank])[: int(share * len(ranks))]
        weight = examples_of(client) / sum(map(examples_of, shares))
        for m, i in kept:
            where = (slice(None), i) if trained == B else i
            mean[m + trained][where] += weight * (after[m] - start[m + trained])[where]
    return {name: tensor + mean[name] for name, tensor in start.items()}


@pytest.mark.parametrize("factor", [1.0, 5.0])
@pytest.mark.parametrize("share", [0.5, 0.25, [0.25, 1.0, 0.1, 0.5]])
def test_rounds_are_those_of_the_naive_twin(share: float | list[float], factor: float) -> None:
    options: dict[str, Any] = {"share": share, "b_lr_factor": factor}
    cycle = share if isinstance(share, list) else [share]
    for state, _, after, info in rounds_of(built("lora-a2", **options), rounds=5):
        shares = {client: cycle[client % len(cycle)] for client in CLIENTS}
        expected = naive_round(arrays(state["adapter"]), info.round, shares, factor)
        for name, tensor in after["adapter"].items():
            np.testing.assert_allclose(tensor.double().numpy(), expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_all_ranks_at_one_rate_are_rolora() -> None:
    both = zip(rounds_of(built("lora-a2", share=1.0, b_lr_factor=1.0)), rounds_of(built("rolora")), strict=True)
    for (_, _, after, _), (_, _, expected, _) in both:
        for name, tensor in expected["adapter"].items():
            torch.testing.assert_close(after["adapter"][name], tensor, rtol=1e-6, atol=1e-6)


def changed_ranks(before: Tensors, after: Tensors) -> list[tuple[str, int]]:
    """(name, rank) of all that is not the same bit for bit."""
    rows = {name: (after[name] != before[name]).any(dim=1 if name.endswith(A) else 0) for name in before}
    return [(name, i) for name, differs in rows.items() for i in differs.nonzero().flatten().tolist()]


def test_what_a_client_did_not_choose_stays_bit_for_bit() -> None:
    algorithm = built("lora-a2", share=[0.25, 1.0, 1.0, 0.5])
    for state, updates, after, info in rounds_of(algorithm):
        union: set[tuple[str, int]] = set()
        for u, count in zip(updates, (3, 12, 6), strict=True):  # of 6 modules of rank 2
            sent = algorithm.restored(u, state, info).groups["adapter"]
            changed = changed_ranks(half_of(state["adapter"], info.round), sent)
            assert len(changed) == count
            union |= set(changed)
        assert set(changed_ranks(state["adapter"], after["adapter"])) <= union


def half_of(adapter: Tensors, number: int) -> Tensors:
    return {name: t for name, t in adapter.items() if name.endswith(A if number % 2 else B)}


def test_one_module_may_take_the_whole_budget() -> None:
    """Scores are compared over all modules: here only one has rows of A that are not tiny."""
    adapter = {n: t * (1.0 if ".3." in n else 1e-6) if n.endswith(A) else t for n, t in lora_adapter().items()}
    algorithm = built("lora-a2", share=2 / 12)
    state = algorithm.init(adapter)
    for u in a_round(algorithm, state, {}, round_info(0, CLIENTS), adapter):
        sent = algorithm.restored(u, state, round_info(0, CLIENTS)).groups["adapter"]
        assert {name.split(".")[5] for name, _ in changed_ranks(half_of(adapter, 0), sent)} == {"3"}


def test_a_rank_whose_b_is_zero_is_never_chosen_for_a() -> None:
    before = tensors(**{"m" + A: [[1.0, 0], [0, 1.0]], "m" + B: [[0.0, 2.0], [0.0, 0.0]]})
    after = before | tensors(**{"m" + A: [[9.0, 9.0], [3.0, 5.0]]})
    assert scores(before, after)["m"].tolist() == [0.0, 2.0 * 5.0]
    after = before | tensors(**{"m" + B: [[3.0, 2.0], [4.0, 1.0]]})
    assert scores(before, after)["m"].tolist() == [5.0, 1.0]


def test_equal_scores_choose_the_first() -> None:
    assert largest(torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0]), 2).tolist() == [1, 2]
    masks = frozen(torch.tensor([0, 3]), tensors(**{"a" + B: torch.zeros(3, 2), "b" + B: torch.zeros(3, 2)}))
    assert masks["a" + B].tolist() == [[0.0, 1.0]] * 3
    assert masks["b" + B].tolist() == [[1.0, 0.0]] * 3


# What is sent


def test_bytes_are_those_of_the_chosen_ranks() -> None:
    """6 modules of rank 2, d_in = 3, d_out = 4: of 12 ranks half, each a vector of float32 and its place."""
    for _, updates, _, info in rounds_of(built("lora-a2")):
        width = 3 if info.round % 2 else 4
        assert [bytes_by_group(u.groups) for u in updates] == [{"places": 6 * 4, "values": 6 * 4 * width}] * 3


def unlike_modules() -> Tensors:
    """Modules of several widths, whose order by name differs from that of their tensors' names."""
    generator = torch.Generator().manual_seed(3)
    widths = {"q": (5, 4), "q-x": (2, 7), "q.z": (6, 3)}
    adapter = {m + A: torch.randn(2, d_in, generator=generator) for m, (_, d_in) in widths.items()}
    return adapter | {m + B: torch.zeros(d_out, 2) for m, (d_out, _) in widths.items()}


def test_modules_of_unlike_widths_are_packed_to_the_longest() -> None:
    adapter = unlike_modules()
    algorithm = built("lora-a2", share=0.5)
    for state, updates, after, info in rounds_of(algorithm, adapter=adapter):
        for u in updates:
            longest = 7 + 7 + 4 if info.round % 2 else 6 + 6 + 5
            assert len(u.groups["values"]["ranks"]) == longest
            sent = algorithm.restored(u, state, info).groups["adapter"]
            assert len(changed_ranks(half_of(state["adapter"], info.round), sent)) == 3
        expected = naive_round(arrays(state["adapter"]), info.round, dict.fromkeys(CLIENTS, 0.5), 5.0)
        for name, tensor in after["adapter"].items():
            np.testing.assert_allclose(tensor.double().numpy(), expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("places", [[0, 1, 2, 3, 4, 12], [-1, 1, 2, 3, 4, 5], [0, 0, 2, 3, 4, 5], [1, 0, 2, 3, 4, 5]])
def test_places_that_cannot_be_are_refused(places: list[int]) -> None:
    algorithm = built("lora-a2")
    state, info = algorithm.init(lora_adapter()), round_info(0, CLIENTS)
    first, *others = a_round(algorithm, state, {}, info)
    bad = replace(first, groups={**first.groups, "places": {"ranks": torch.tensor(places, dtype=torch.int32)}})
    valid, refused = screen([bad, *others], algorithm, state, info)
    assert [u.client for u in valid] == [u.client for u in others]
    assert [(r["client"], r["why"]) for r in refused] == [(0, "the chosen ranks are not increasing numbers below 12")]


def test_a_regularisation_applies_to_both_passes() -> None:
    """The proximal term is part of the rule, so what is sent is shorter under it."""
    norms = []
    for regularization in ("none", "fedprox"):
        algorithm = built("lora-a2", regularization)
        seen: list[LocalResult] = []

        def finish(result: LocalResult, *rest: Any, inner: Algorithm = algorithm, seen: list[LocalResult] = seen) -> Any:
            seen.append(result)
            return inner.finish(result, *rest)

        observed = replace(algorithm, finish=finish)
        a_round(observed, observed.init(lora_adapter()), {}, round_info(0, CLIENTS))
        norms.append(sum(float((r.trained[n] - r.received[n]).norm()) for r in seen for n in r.trained))
    assert norms[1] < norms[0]


# What is refused


@pytest.mark.parametrize("share", [0.0, 1.5, [], [0.5, -1.0]])
def test_shares_are_above_0_and_at_most_1(share: float | list[float]) -> None:
    with pytest.raises(ConfigError, match=r"share = .* must be above 0 and at most 1"):
        built("lora-a2", share=share)


def test_its_updates_are_not_packed_twice() -> None:
    algorithm = built("lora-a2")
    for name in compressions.names():
        if name != "none":
            with pytest.raises(ValueError, match="which are packed already"):
                compressions.build(name, {})(algorithm)
    assert algorithm.averages is None, "masks cannot hide which ranks are sent, and noise would fall on chosen ranks only"
    assert not algorithm.unequal_ranks
    assert len(modules(algorithm.init(lora_adapter())["adapter"])) == 6
