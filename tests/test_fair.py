"""Algorithms under which clients, or groups of clients, with a larger loss count more."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmllm.algorithms import Algorithm, ClientInfo, RoundInfo, Update, algorithms
from fedmllm.algorithms.fair import GROUPS, group_of
from fedmllm.algorithms.screening import screen
from fedmllm.algorithms.toy_federation import local_sgd, lora_adapter, round_info, run_rounds
from fedmllm.errors import ConfigError
from fedmllm.tensors import State, clone
from helpers import quick

START = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3.0]])}


def built(name: str, **options: float) -> Algorithm:
    return algorithms.build(name, options)


def update(client: int, change: float, loss: float, group: int | None = None) -> Update:
    extra = {"before": torch.tensor([loss])}
    if group is not None:
        extra["group"] = torch.nn.functional.one_hot(torch.tensor(group), len(GROUPS)).float()
    return Update(client, {"adapter": {n: t + change for n, t in START.items()}, "loss": extra}, 5, 1)


def info_at(lr: float = 0.5) -> RoundInfo:
    return replace(round_info(sampled=(0, 1, 2)), lr=lr)


def after(algorithm: Algorithm, updates: list[Update], lr: float = 0.5) -> State:
    return algorithm.aggregate(algorithm.init(START), updates, info_at(lr))


def test_qfedavg_by_hand() -> None:
    """L = 2, q = 2: losses 1 and 3, changes of −0.5 and +1 in three entries; d = ∓L · change."""
    result = after(built("qfedavg", q=2.0), [update(0, -0.5, 1.0), update(1, 1.0, 3.0)])["adapter"]
    # d_0 = 1 in each entry with squared norm 3, d_1 = −2 with squared norm 12.
    denominator = (2 * 1 * 3 + 2 * 1) + (2 * 3 * 12 + 2 * 9)
    step = (1 * 1 + 9 * -2) / denominator
    assert result["a"].tolist() == pytest.approx([1 - step, 2 - step], rel=1e-6)
    assert result["b"].item() == pytest.approx(3 - step, rel=1e-6)


@quick
@given(losses=st.lists(st.floats(0, 100), min_size=1, max_size=4), lr=st.floats(1e-4, 10))
def test_without_q_it_is_the_uniform_mean(losses: list[float], lr: float) -> None:
    updates = [update(client, 0.3 * client - 0.2, loss) for client, loss in enumerate(losses)]
    mean = sum(0.3 * client - 0.2 for client in range(len(losses))) / len(losses)
    result = after(built("qfedavg", q=0.0), updates, lr)["adapter"]
    assert result["a"].tolist() == pytest.approx([1 + mean, 2 + mean], rel=1e-5)


def test_a_larger_loss_counts_more() -> None:
    even, uneven = ([update(0, 1.0, 1.0), update(1, -1.0, loss)] for loss in (1.0, 5.0))
    algorithm = built("qfedavg", q=1.0)
    assert after(algorithm, even)["adapter"]["a"].tolist() == pytest.approx([1.0, 2.0])
    assert after(algorithm, uneven)["adapter"]["a"].tolist() < [1.0, 2.0]
    assert not after(algorithm, [update(0, 1.0, 0.0), update(1, -1.0, 0.0)])["adapter"]["a"].isnan().any()


def test_clients_send_the_loss_of_what_they_received() -> None:
    algorithm, start = built("qfedavg"), lora_adapter()
    rule = algorithm.rule({"adapter": start}, {}, round_info(client=ClientInfo(2, 0.0)))
    result = local_sgd(2, start, rule)
    upload, memory = algorithm.finish(result, {"adapter": start}, {}, round_info(client=ClientInfo(2, 0.0)))
    assert upload["loss"]["before"].tolist() == pytest.approx([result.loss_before])
    assert memory == {}


# Groups


@pytest.mark.parametrize(
    ("sees", "group"), [((), "none"), (("image",), "image"), (("text",), "text"), (("image", "text"), "both")]
)
def test_a_group_is_what_a_client_sees(sees: tuple[str, ...], group: str) -> None:
    assert GROUPS[group_of(ClientInfo(0, 0.0, dict.fromkeys(sees, 0.25)))] == group


def test_group_dro_by_hand() -> None:
    """Two image clients and one of texts, with losses 1, 3 and 4: the means are 2 and 4, so the weights change by e^∓0.1."""
    algorithm = built("group-dro", step=0.1)
    updates = [update(0, 1.0, 1.0, 1), update(1, 3.0, 3.0, 1), update(2, -1.0, 4.0, 2)]
    state = after(algorithm, updates)
    weights = [0.25, 0.25 * math.exp(-0.1), 0.25 * math.exp(0.1), 0.25]
    assert state["groups"]["weights"].tolist() == pytest.approx([w / sum(weights) for w in weights], rel=1e-6)
    change = (weights[1] * 2.0 + weights[2] * -1.0) / (weights[1] + weights[2])
    assert state["adapter"]["a"].tolist() == pytest.approx([1 + change, 2 + change], rel=1e-6)


def test_at_step_0_groups_count_alike() -> None:
    updates = [update(0, 1.0, 1.0, 1), update(1, 3.0, 9.0, 1), update(2, -1.0, 4.0, 2)]
    state = after(built("group-dro", step=0.0), updates)
    assert state["adapter"]["b"].item() == pytest.approx(3 + 0.5)
    one_group = after(built("group-dro"), [update(0, 1.0, 1.0, 3), update(1, 2.0, 5.0, 3)])
    assert one_group["adapter"]["b"].item() == pytest.approx(3 + 1.5)
    assert one_group["groups"]["weights"].tolist() == pytest.approx([0.25] * 4)


def test_the_worst_group_gains_weight_over_rounds() -> None:
    *_, (_, _, state, _) = run_rounds(built("group-dro", step=0.5), 6, sampled=lambda number: (0, 1, 2, 4))
    weights = state["groups"]["weights"]
    assert weights.sum().item() == pytest.approx(1.0)
    assert weights.max() > 1.1 / 4


@pytest.mark.parametrize("name", ["qfedavg", "group-dro"])
@pytest.mark.parametrize(
    "damage",
    [{"before": torch.tensor([-1.0])}, {"before": torch.tensor([math.nan])}, {"group": torch.tensor([1.0, 1.0, 0.0, 0.0])}],
)
def test_wrong_losses_and_groups_are_refused(name: str, damage: dict[str, Any]) -> None:
    algorithm = built(name)
    good = update(0, 1.0, 1.0, 1 if name == "group-dro" else None)
    wrong = replace(good, client=1, groups={**clone_state(good.groups), "loss": {**good.groups["loss"], **damage}})
    valid, refused = screen([good, wrong], algorithm, algorithm.init(START), info_at())
    assert [u.client for u in valid] == [0]
    assert [r["client"] for r in refused] == [1]


def clone_state(state: State) -> State:
    return {group: clone(tensors) for group, tensors in state.items()}


@pytest.mark.parametrize(("name", "options"), [("qfedavg", {"q": -1.0}), ("group-dro", {"step": -0.1})])
def test_options_out_of_range_are_refused(name: str, options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="must not be negative"):
        built(name, **options)
