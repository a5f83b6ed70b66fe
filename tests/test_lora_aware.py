"""The LoRA-aware methods against naive twins that multiply everything out, one dense matrix at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmllm.algorithms import AdapterInfo, Algorithm, ClientInfo, LocalResult, Update, algorithms, complete
from fedmllm.algorithms.factors import A, B, best_factors, folded, modules, rank_of, resized
from fedmllm.algorithms.fedilora import repaired
from fedmllm.tensors import State, clone
from helpers import ADAPTER_INFO, CLIENTS, a_round, built, lora_adapter, quick, round_info, rounds_of, same, tensors, update
from products import RANKS, Dense, assert_close, effective, mean_of_products, truncation, unfolded, whole

UNEQUAL = [name for name in algorithms.names() if algorithms.build(name, {}).unequal_ranks]


@pytest.mark.parametrize(("name", "ranks"), [("flora", None), ("flora", RANKS), ("fedex-lora", None)])
def test_folding_is_exact(name: str, ranks: dict[int, int] | None) -> None:
    """Base + fold + s B A after the round is base + fold before it + Σ p_k s_k B_k A_k, and past the point where the factors
    outgrow the dense matrix."""
    dense = 0
    for before, updates, after, _ in rounds_of(built(name), rounds=5, adapter=lora_adapter(rank=3), ranks=ranks):
        carried = unfolded(before.get("fold", {}), effective(before["adapter"]))
        expected = {m: carried[m] + d for m, d in mean_of_products(updates).items()}
        assert_close(whole(after), expected)
        dense += any(n.endswith(".fold") for n in after["fold"])
    assert dense, "the factors never outgrew the dense matrix"


def test_fedavg_is_not_the_mean_of_the_products() -> None:
    """What all of these mend."""
    *_, (_, updates, after, _) = rounds_of(built("fedavg"))
    expected = mean_of_products(updates)
    assert max(np.abs(whole(after)[m] - expected[m]).max() for m in expected) > 1e-2


def test_flora_starts_anew_each_round_and_not_the_same() -> None:
    starts = [after["adapter"] for _, _, after, _ in rounds_of(built("flora"))]
    for start in starts:
        assert not any(bool(t.any()) for n, t in start.items() if n.endswith(B))
        assert all(float(t.abs().max()) <= 3**-0.5 for n, t in start.items() if n.endswith(A))
    assert not same({"adapter": starts[0]}, {"adapter": starts[1]})
    again = [after["adapter"] for _, _, after, _ in rounds_of(built("flora"))]
    assert all(same({"a": x}, {"a": y}) for x, y in zip(starts, again, strict=True))


def test_fedex_residual_travels_as_factors_of_rank_s_times_r() -> None:
    (_, _, after, _), *_ = rounds_of(built("fedex-lora"), sampled=lambda _: (2,), rounds=1)
    assert all(t.shape[0] == 2 for n, t in after["fold"].items() if n.endswith("fold_A"))
    wide = {"m" + A: torch.randn(2, 40), "m" + B: torch.randn(30, 2)}
    state = built("fedex-lora").init(wide)
    updates = [update(c, {n: t + c for n, t in wide.items()}) for c in range(3)]
    fold = built("fedex-lora").aggregate(state, updates, round_info())["fold"]
    assert {n: tuple(t.shape) for n, t in fold.items()} == {"m.fold_A": (6, 40), "m.fold_B": (30, 6)}


@pytest.mark.parametrize("ranks", [None, RANKS], ids=["equal", "unequal"])
def test_flexlora_is_the_truncated_mean_of_the_products(ranks: dict[int, int] | None) -> None:
    for _, updates, after, _ in rounds_of(built("flexlora"), adapter=lora_adapter(rank=3), ranks=ranks):
        expected = {m: truncation(d, 3) for m, d in mean_of_products(updates).items()}
        assert_close(whole(after), expected, 1e-5)


def test_flexlora_with_one_client_and_equal_ranks_gives_its_product_back() -> None:
    for _, updates, after, _ in rounds_of(built("flexlora"), sampled=lambda number: (number,)):
        assert_close(whole(after), effective(updates[0].groups["adapter"]))


def test_flexlora_sends_the_best_approximation_of_each_rank() -> None:
    algorithm = built("flexlora")
    *_, (_, _, state, _) = rounds_of(algorithm, adapter=lora_adapter(rank=3), ranks=RANKS)
    for client, rank in RANKS.items():
        sent = algorithm.message(state, client, round_info(1, CLIENTS, ranks=RANKS))["adapter"]
        assert rank_of(sent) == rank
        assert_close(effective(sent), {m: truncation(d, rank) for m, d in whole(state).items()}, 1e-5)


def test_flexlora_leaves_no_dead_direction() -> None:
    """A client of rank 1 alone fills one row; the others keep an A that has a gradient."""
    (_, _, after, _), *_ = rounds_of(
        built("flexlora"), adapter=lora_adapter(rank=3), sampled=lambda _: (0,), ranks={0: 1}, rounds=1
    )
    for m in modules(after["adapter"]):
        assert all(float(row.norm()) > 0.1 for row in after["adapter"][m + A])
        assert not bool(after["adapter"][m + B][:, 1:].any())


def test_fedsvd_renews_a_and_keeps_the_product() -> None:
    for before, updates, after, _ in rounds_of(built("fedsvd")):
        total = sum(u.examples for u in updates)
        for m in modules(after["adapter"]):
            b = sum(u.examples / total * u.groups["adapter"][m + B].double().numpy() for u in updates)
            expected = ADAPTER_INFO.alpha / 2 * b @ before["adapter"][m + A].double().numpy()
            assert_close({m: whole(after)[m]}, {m: expected}, 1e-5)
            rows = after["adapter"][m + A].double()
            torch.testing.assert_close(rows @ rows.T, torch.eye(2).double(), rtol=0, atol=1e-5)


def naive_hetlora(state: State, updates: Sequence[Update]) -> Dense:
    """Zero-pad, weigh by ‖s B A‖_F of all modules together, average the factors, multiply."""
    rank = rank_of(state["adapter"])
    norms = [np.sqrt(sum((d**2).sum() for d in effective(u.groups["adapter"]).values())) for u in updates]
    product = {}
    for m in modules(state["adapter"]):
        a, b = np.zeros((rank, 3)), np.zeros((4, rank))
        for u, size in zip(updates, norms, strict=True):
            own = u.groups["adapter"]
            r = rank_of(own)
            a[:r] += size / sum(norms) * own[m + A].double().numpy()
            b[:, :r] += size / sum(norms) * own[m + B].double().numpy() * (rank / r)  # α/r_k = (r/r_k)·α/r
        product[m] = ADAPTER_INFO.alpha / rank * b @ a
    return product


def naive_fedilora(state: State, updates: Sequence[Update]) -> Dense:
    """Row by row, over those that have it."""
    rank = rank_of(state["adapter"])
    product = {}
    for m in modules(state["adapter"]):
        a, b = state["adapter"][m + A].double().numpy().copy(), state["adapter"][m + B].double().numpy().copy()
        for row in range(rank):
            having = [u for u in updates if rank_of(u.groups["adapter"]) > row]
            if not having:
                continue
            total = sum(u.examples for u in having)
            a[row], b[:, row] = 0, 0
            for u in having:
                own, r = u.groups["adapter"], rank_of(u.groups["adapter"])
                a[row] += u.examples / total * own[m + A][row].double().numpy()
                b[:, row] += u.examples / total * own[m + B][:, row].double().numpy() * (rank / r)
        product[m] = ADAPTER_INFO.alpha / rank * b @ a
    return product


@pytest.mark.parametrize("ranks", [None, RANKS, {0: 1, 1: 1, 3: 2}], ids=["equal", "unequal", "none reaches the last"])
@pytest.mark.parametrize(("name", "twin"), [("hetlora", naive_hetlora), ("fedilora", naive_fedilora)])
def test_equals_its_naive_twin(name: str, twin, ranks: dict[int, int] | None) -> None:
    for before, updates, after, _ in rounds_of(built(name), adapter=lora_adapter(rank=3), ranks=ranks):
        assert_close(whole(after), twin(before, updates))


def test_hetlora_weighs_by_what_was_learnt() -> None:
    """‖BA‖ of 1 and 3 (s = 1): A = 1 in both, so B̄ = ¼·1 + ¾·3 = 2.5."""
    info = replace(round_info(), adapter=AdapterInfo(alpha=1.0))
    algorithm = built("hetlora")
    state = algorithm.init(tensors(**{"m" + A: [[1.0]], "m" + B: [[0.0]]}))
    updates = [update(c, tensors(**{"m" + A: [[1.0]], "m" + B: [[value]]}), 7 * c + 1) for c, value in enumerate((1.0, 3.0))]
    assert float(algorithm.aggregate(state, updates, info)["adapter"]["m" + B]) == 2.5
    idle = [update(c, clone(state["adapter"])) for c in range(2)]
    assert same(algorithm.aggregate(state, idle, info), state)


def test_fedilora_does_not_dilute() -> None:
    """Clients of rank 1 and 2: the second row is the second client's alone, where padding with zeros would halve it."""
    info = replace(round_info(ranks={0: 1, 1: 2}), adapter=AdapterInfo(alpha=1.0))
    algorithm = built("fedilora")
    state = algorithm.init(tensors(**{"m" + A: [[0.0], [0.0]], "m" + B: [[0.0, 0.0]]}))
    updates = [
        update(0, tensors(**{"m" + A: [[2.0]], "m" + B: [[1.0]]})),
        update(1, tensors(**{"m" + A: [[4.0], [6.0]], "m" + B: [[3.0, 5.0]]})),
    ]
    found = algorithm.aggregate(state, updates, info)["adapter"]
    assert found["m" + A].tolist() == [[3.0], [6.0]]
    assert found["m" + B].tolist() == [[2.5, 5.0]]  # client 0's B counts (2/1)·1: its own scale is α/1, the server's α/2


def test_fedilora_repairs_the_layer_that_strayed_furthest() -> None:
    received = {n: torch.ones_like(t) for n, t in lora_adapter(layers=3).items()}
    first, second, third = (m + A for m in modules(received))
    trained = clone(received)
    trained[second] = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 1.0]])  # cosine with ones: 4/6
    trained[third] = trained[third] * 5  # longer, but in the same direction: cosine 1
    mended = repaired(trained, received)
    assert mended[first].equal(trained[first])
    assert mended[third].equal(trained[third])
    torch.testing.assert_close(mended[second], 4 / 6 * trained[second] + 2 / 6 * received[second])
    assert all(mended[n].equal(trained[n]) for n in mended if n.endswith(B))
    opposite = {**trained, second: -trained[third]}  # cosine −1, cut to 0: replaced whole
    torch.testing.assert_close(repaired(opposite, received)[second], received[second])


REPAIRS = [(1, 0.5, True, True), (0, 0.5, True, False), (1, 0.0, True, False), (1, 0.5, False, False)]


@pytest.mark.parametrize(("round", "gap", "repair", "mended"), REPAIRS)
def test_fedilora_repairs_where_modalities_lack_and_something_was_learnt(
    round: int, gap: float, repair: bool, mended: bool
) -> None:
    algorithm, start = built("fedilora", repair=repair), lora_adapter()
    trained = {n: t - 0.5 for n, t in start.items()}
    result = LocalResult(start, trained, None, 1, 1, 0.1, {})
    info = round_info(round, client=ClientInfo(0, gap))
    upload, _ = algorithm.finish(result, {"adapter": start}, {}, info)
    assert same(upload, {"adapter": trained}) != mended


# One half at a time


def test_ffa_lora_leaves_a_bit_for_bit_and_averages_exactly() -> None:
    start = lora_adapter()
    for before, updates, after, _ in rounds_of(built("ffa-lora")):
        for m in modules(start):
            assert after["adapter"][m + A].equal(start[m + A])
        full = [update(u.client, {**before["adapter"], **u.groups["adapter"]}, u.examples) for u in updates]
        assert_close(whole(after), mean_of_products(full))


def test_ffa_lora_clients_start_from_the_a_they_all_know() -> None:
    algorithm, start = built("ffa-lora"), lora_adapter()
    message = algorithm.message(algorithm.init(start), 0, round_info())
    assert all(n.endswith(B) for n in message["adapter"])


@pytest.mark.parametrize("algorithm", [built("rolora"), built("ffa-lora")], ids=["rolora", "ffa-lora"])
def test_products_are_averaged_exactly_when_one_half_is_fixed(algorithm: Algorithm) -> None:
    for before, updates, after, _ in rounds_of(algorithm, rounds=5):
        full = [update(u.client, {**before["adapter"], **u.groups["adapter"]}, u.examples) for u in updates]
        assert_close(whole(after), mean_of_products(full))


def test_rolora_takes_turns() -> None:
    for before, updates, after, info in rounds_of(built("rolora"), rounds=5):
        moving, fixed = (A, B) if info.round % 2 else (B, A)
        for u in updates:
            assert all(n.endswith(moving) for n in u.groups["adapter"])
        for m in modules(before["adapter"]):
            assert after["adapter"][m + fixed].equal(before["adapter"][m + fixed])
            assert not after["adapter"][m + moving].equal(before["adapter"][m + moving])


def test_fedsa_lora_keeps_b_at_home() -> None:
    algorithm, start = built("fedsa-lora"), lora_adapter()
    assert algorithm.personal
    state, memories = algorithm.init(start), dict[int, State]()
    for number in range(3):
        info = round_info(number, CLIENTS)
        before = dict(memories)
        updates = a_round(algorithm, state, memories, info)
        state = algorithm.aggregate(state, updates, info)
        total = sum(u.examples for u in updates)
        for m in modules(start):
            assert state["adapter"][m + B].equal(start[m + B])
            mean = sum(u.groups["adapter"][m + A].double() * (u.examples / total) for u in updates)
            torch.testing.assert_close(state["adapter"][m + A].double(), mean, rtol=1e-6, atol=1e-7)
        for client in CLIENTS:
            assert all(n.endswith(B) for n in memories[client]["adapter"])
            received = complete(algorithm.message(state, client, info), before.get(client, {}), start)["adapter"]
            own = before[client]["adapter"] if client in before else start
            assert all(received[n].equal(own[n]) for n in start if n.endswith(B))
    b = [memories[client]["adapter"] for client in CLIENTS]
    assert not same({"adapter": b[0]}, {"adapter": b[1]})


# Factors


@quick
@given(rank=st.integers(1, 6), k=st.integers(1, 8), seed=st.integers(0, 1000))
def test_best_factors_are_the_truncated_svd(rank: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((5, k), (k, 7)))
    b, a = best_factors(left, right, rank)
    np.testing.assert_allclose((b @ a).numpy(), truncation((left @ right).numpy(), rank), atol=1e-9)
    torch.testing.assert_close(a @ a.T, torch.eye(len(a)).double(), rtol=0, atol=1e-9)
    largest = a.gather(1, a.abs().argmax(1, keepdim=True))
    assert bool((largest > 0).all())


def test_best_factors_of_nothing_are_finite() -> None:
    b, a = best_factors(torch.zeros(5, 3).double(), torch.randn(3, 7).double(), 2)
    assert not bool(b.any())
    torch.testing.assert_close(a @ a.T, torch.eye(2).double(), rtol=0, atol=1e-9)


@quick
@given(old=st.integers(1, 5), new=st.integers(1, 5), stabilised=st.booleans())
def test_resizing_keeps_the_effective_product_of_the_rows_that_stay(old: int, new: int, stabilised: bool) -> None:
    info = AdapterInfo(alpha=3.0, rank_stabilised=stabilised)
    adapter = {n: t + 0.5 for n, t in lora_adapter(layers=1, rank=old).items()}
    found = resized(adapter, new, info)
    assert rank_of(found) == new
    kept = min(old, new)
    for m in modules(adapter):
        expected = info.scale(old) * adapter[m + B][:, :kept] @ adapter[m + A][:kept]
        torch.testing.assert_close(info.scale(new) * found[m + B] @ found[m + A], expected)


def test_scales_are_pefts() -> None:
    assert AdapterInfo(alpha=16.0).scale(8) == 2.0
    assert AdapterInfo(alpha=16.0, rank_stabilised=True).scale(4) == 8.0


def test_folding_nothing_and_folding_twice() -> None:
    left, right = torch.randn(6, 1).double(), torch.randn(1, 6).double()
    once = folded({}, {"m": (left, right)})
    assert set(once) == {"m.fold_A", "m.fold_B"}
    thrice = folded(folded(once, {"m": (left, right)}), {"m": (left, right)})
    assert thrice["m.fold_A"].shape == (3, 6)  # 3·(6 + 6) = 6·6: no longer than the dense one yet
    four = folded(thrice, {"m": (left, right)})
    assert set(four) == {"m.fold"}
    torch.testing.assert_close(four["m.fold"], 4 * (left @ right).float())


@pytest.mark.parametrize("name", [n for n in algorithms.names() if algorithms.build(n, {}).needs_lora])
def test_what_is_no_lora_adapter_is_refused(name: str) -> None:
    for odd in (tensors(x=1), {"m" + A: torch.ones(2, 3)}, {**lora_adapter(), "m.lora_magnitude_vector": torch.ones(3)}):
        with pytest.raises(ValueError, match="not a LoRA adapter of pairs A and B"):
            built(name).init(odd)


def test_these_take_unequal_ranks() -> None:
    assert set(UNEQUAL) >= {"fedilora", "fedmomentum", "flexlora", "flora", "hetlora"}
