"""Fairness as an objective: clients, or groups of clients, on which the model is bad count more.

q-FedAvg: Li et al. 2020, "Fair Resource Allocation in Federated Learning" (1905.10497), Algorithm 2, which minimises
Σ_k F_k^(q+1) / (q + 1). With F_k the loss of the received adapter over the client's samples and L = 1 / lr:

    d_k = L (w − w_k),   w ← w − Σ F_k^q d_k / Σ (q F_k^(q−1) ‖d_k‖² + L F_k^q)

The norm is over all tensors together, and sums are unweighted. L stands for the Lipschitz constant of plain SGD; under AdamW
it is the same formula and a heuristic.

Group DRO: Sagawa et al. 2020 (1911.08731), and for federations Mohri et al. 2019, "Agnostic Federated Learning" (1902.00146).
The groups are clients that see images only, texts only, both, and neither:

    λ_g ← λ_g exp(η mean F of group g), normalised;   w ← w + Σ_g λ_g (mean of w_k − w over group g) / Σ λ_g of those present

The step is relative to the mean loss, so a group's weight does not drift in rounds in which it is absent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fedmllm.algorithms.base import (
    Algorithm,
    ClientInfo,
    LocalResult,
    LocalRule,
    RoundInfo,
    Update,
    algorithms,
    in_order,
    not_negative,
    positive,
    send_adapter,
)
from fedmllm.tensors import State, Tensors, add, clone, norm, scale, subtract, weighted_mean

_TINY = 1e-10
"""Added to every loss, so that a negative power of a loss of 0 is finite."""
GROUPS = ("none", "image", "text", "both")


def _observe(received: State, memory: State, info: RoundInfo) -> LocalRule:
    return LocalRule(observe_loss=True)


def _loss(update: Update) -> float:
    return float(update.groups["loss"]["before"])


def _refuse(update: Update, state: State, info: RoundInfo) -> str | None:
    return None if _loss(update) >= 0 else f"a negative loss before training, {_loss(update):g}"


@algorithms.register("qfedavg")
def qfedavg(*, q: float = 1.0) -> Algorithm:
    """Clients with a larger loss count more: their updates are weighted by loss^q; 0 is the uniform mean (1905.10497)."""
    not_negative(q=q)

    def finish(result: LocalResult, received: State, memory: State, info: RoundInfo) -> tuple[State, State]:
        assert result.loss_before is not None
        return {**send_adapter(result, received, memory, info)[0], "loss": {"before": torch.tensor([result.loss_before])}}, {}

    def aggregate(state: State, updates: Sequence[Update], info: RoundInfo) -> State:
        ordered, w = in_order(updates), state["adapter"]
        steps = [scale(subtract(w, update.groups["adapter"]), 1 / info.lr) for update in ordered]
        losses = [_loss(update) + _TINY for update in ordered]
        lengths = [q * f ** (q - 1) * norm(d) ** 2 + f**q / info.lr for f, d in zip(losses, steps, strict=True)]
        shares = [f**q for f in losses]
        step = scale(weighted_mean(steps, shares), sum(shares) / sum(lengths))
        return {**state, "adapter": subtract(w, step)}

    return Algorithm(
        init=lambda adapter: {"adapter": clone(adapter)},
        aggregate=aggregate,
        rule=_observe,
        finish=finish,
        uploads=lambda state, client, info: {"adapter": state["adapter"], "loss": {"before": torch.zeros(1)}},
        refuse=_refuse,
    )


def group_of(client: ClientInfo) -> int:
    """The position of the client's group in `GROUPS`."""
    return (client.shows.get("image", 0) > 0) + 2 * (client.shows.get("text", 0) > 0)


@algorithms.register("group-dro")
def group_dro(*, server_lr: float = 1.0, step: float = 0.1) -> Algorithm:
    """Groups of clients that see images, texts or both are weighted up as long as their loss is the largest (1911.08731).

    `step` is how fast the weights move; at 0 every group counts alike, however many clients it has.
    """
    positive(server_lr=server_lr)
    not_negative(step=step)

    def init(adapter: Tensors) -> State:
        return {"adapter": clone(adapter), "groups": {"weights": torch.full((len(GROUPS),), 1 / len(GROUPS))}}

    def finish(result: LocalResult, received: State, memory: State, info: RoundInfo) -> tuple[State, State]:
        assert result.loss_before is not None
        group = torch.zeros(len(GROUPS))
        group[group_of(info.me)] = 1.0
        loss = {"before": torch.tensor([result.loss_before]), "group": group}
        return {**send_adapter(result, received, memory, info)[0], "loss": loss}, {}

    def refuse(update: Update, state: State, info: RoundInfo) -> str | None:
        if sorted(update.groups["loss"]["group"].tolist()) != [0.0] * (len(GROUPS) - 1) + [1.0]:
            return "it names no group of clients, or several"
        return _refuse(update, state, info)

    def aggregate(state: State, updates: Sequence[Update], info: RoundInfo) -> State:
        members: dict[int, list[Update]] = {}
        for update in in_order(updates):
            members.setdefault(int(update.groups["loss"]["group"].argmax()), []).append(update)
        mean_loss = {group: sum(map(_loss, own)) / len(own) for group, own in members.items()}
        middle = sum(mean_loss.values()) / len(mean_loss)
        weights = state["groups"]["weights"].double()
        for group, loss in mean_loss.items():
            weights[group] *= math.exp(min(step * (loss - middle), 50.0))
        weights = weights / weights.sum()
        means = [weighted_mean([u.groups["adapter"] for u in own], [1.0] * len(own)) for own in members.values()]
        target = weighted_mean(means, [float(weights[group]) for group in members])
        adapter = add(state["adapter"], scale(subtract(target, state["adapter"]), server_lr))
        return {**state, "adapter": adapter, "groups": {"weights": weights.float()}}

    return Algorithm(
        init=init,
        aggregate=aggregate,
        rule=_observe,
        finish=finish,
        uploads=lambda state, client, info: {
            "adapter": state["adapter"], "loss": {"before": torch.zeros(1), "group": torch.zeros(len(GROUPS))}
        },
        refuse=refuse,
    )  # fmt: skip
