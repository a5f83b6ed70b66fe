"""The classic server algorithms: numbers worked out by hand, identities, and naive twins of whole federations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fedmllm.algorithms import Algorithm, LocalResult, algorithms
from fedmllm.algorithms.fednova import effective_steps
from fedmllm.tensors import State, Tensors, add
from helpers import (
    LR,
    a_round,
    built,
    lora_adapter,
    round_info,
    rounds_of,
    same,
    steps_of,
    target,
    tensors,
    update,
)

# Two rounds by hand for every server: w = (0, 1). The clients' changes, examples, steps and changes of their variates:
#
#   round 0   client 0: (4, −8), n = 1, τ = 2, (1, 2)   client 1: (0, 0), n = 3, τ = 6, (4, 3)    Δ̄ = (1, −2)
#   round 1   client 1: (2, 2), n = 1, τ = 1, (−2, 0)   client 2: (4, −4), n = 1, τ = 4, (7, 5)   Δ̄ = (3, −1)

ROUNDS = [
    [(0, (4, -8), 1, 2, (1, 2)), (1, (0, 0), 3, 6, (4, 3))],
    [(1, (2, 2), 1, 1, (-2, 0)), (2, (4, -4), 1, 4, (7, 5))],
]

MEANS = [[1.0, -2.0], [3.0, -1.0]]
"""Δ̄ of both rounds."""


def by_hand(algorithm: Algorithm) -> list[State]:
    state, states = algorithm.init(tensors(w=[0, 1])), []
    for number, clients in enumerate(ROUNDS):
        updates = []
        for client, change, examples, steps, control in clients:
            extra = {"control": tensors(w=control)} if "control" in state else {}
            if "normaliser" in algorithm.uploads(state, client, round_info()):
                extra = {"normaliser": tensors(a=[steps])}
            updates.append(update(client, add(state["adapter"], tensors(w=change)), examples, steps, **extra))
        state = algorithm.aggregate(state, updates, round_info(number))
        states.append(state)
    return states


def close(found: Tensors, expected: list[float]) -> None:
    torch.testing.assert_close(found["w"], torch.tensor(expected, dtype=torch.float64).float(), rtol=1e-6, atol=1e-6)


def test_fedavgm_by_hand() -> None:
    # β = ½, η = 2.   m = (1, −2),              w = (0, 1) + 2 m = (2, −3)
    #                 m = (½ + 3, −1 − 1),      w = (2, −3) + 2 (3.5, −2) = (9, −7)
    first, second = by_hand(algorithms.build("fedavgm", {"momentum": 0.5, "server_lr": 2.0}))
    close(first["adapter"], [2, -3])
    close(second["m"], [3.5, -2])
    close(second["adapter"], [9, -7])


def test_dampened_fedavgm_by_hand() -> None:
    # β = d = ¾, η = 1.   m = (1, −2), the first round undamped,   w = (0, 1) + m = (1, −1)
    #                     m = ¾ (1, −2) + ¼ (3, −1) = (1.5, −1.75),   w = (2.5, −2.75)
    first, second = by_hand(algorithms.build("fedavgm", {"momentum": 0.75, "dampening": 0.75}))
    close(first["adapter"], [1, -1])
    close(second["m"], [1.5, -1.75])
    close(second["adapter"], [2.5, -2.75])


def test_dampening_is_that_of_pytorchs_sgd() -> None:
    weight = torch.nn.Parameter(torch.tensor([0.0, 1.0]))
    optimizer = torch.optim.SGD([weight], lr=2.0, momentum=0.9, dampening=0.3)
    for state, change in zip(by_hand(algorithms.build("fedavgm", {"server_lr": 2.0, "dampening": 0.3})), MEANS, strict=True):
        weight.grad = -torch.tensor(change)
        optimizer.step()
        close(state["adapter"], weight.tolist())


def test_fedadagrad_by_hand() -> None:
    # β₁ = 0, τ = 1, η = 1, v₀ = 1.   v = (1 + 1, 1 + 4),     w = (0 + 1/(√2 + 1), 1 − 2/(√5 + 1))
    #                                 v = (2 + 9, 5 + 1),     w += (3/(√11 + 1), −1/(√6 + 1))
    first, second = by_hand(algorithms.build("fedadagrad", {"server_lr": 1.0, "tau": 1.0}))
    w = [1 / (math.sqrt(2) + 1), 1 - 2 / (math.sqrt(5) + 1)]
    close(first["adapter"], w)
    close(second["v"], [11, 6])
    close(second["adapter"], [w[0] + 3 / (math.sqrt(11) + 1), w[1] - 1 / (math.sqrt(6) + 1)])


def test_fedyogi_by_hand() -> None:
    # β₁ = β₂ = ½, τ = 1, η = 1, v₀ = 1, Δ̄² = (1, 4) then (9, 1).
    # m = (½, −1);          v − Δ̄² = (0, −3):   v = (1 − 0, 1 + 2) = (1, 3);        w = (½/(1 + 1), 1 − 1/(√3 + 1))
    # m = (¼ + 1.5, −1);    v − Δ̄² = (−8, 2):   v = (1 + 4.5, 3 − ½) = (5.5, 2.5);  w += (1.75/(√5.5 + 1), −1/(√2.5 + 1))
    halves = {"beta1": 0.5, "beta2": 0.5, "server_lr": 1.0, "tau": 1.0}
    first, second = by_hand(algorithms.build("fedyogi", halves))
    w = [0.25, 1 - 1 / (math.sqrt(3) + 1)]
    close(first["v"], [1, 3])
    close(first["adapter"], w)
    close(second["v"], [5.5, 2.5])
    close(second["adapter"], [w[0] + 1.75 / (math.sqrt(5.5) + 1), w[1] - 1 / (math.sqrt(2.5) + 1)])


def test_fedadam_by_hand() -> None:
    # β₁ = β₂ = ½, τ = 1, η = 1, v₀ = 1; the square is of Δ̄, not of the momentum.
    # m = (½, −1);        v = (½ + ½, ½ + 2) = (1, 2.5);          w = (½/(1 + 1), 1 − 1/(√2.5 + 1))
    # m = (1.75, −1);     v = (½ + 4.5, 1.25 + ½) = (5, 1.75);    w += (1.75/(√5 + 1), −1/(√1.75 + 1))
    halves = {"beta1": 0.5, "beta2": 0.5, "server_lr": 1.0, "tau": 1.0}
    first, second = by_hand(algorithms.build("fedadam", halves))
    w = [0.25, 1 - 1 / (math.sqrt(2.5) + 1)]
    close(first["adapter"], w)
    close(second["m"], [1.75, -1])
    close(second["v"], [5, 1.75])
    close(second["adapter"], [w[0] + 1.75 / (math.sqrt(5) + 1), w[1] - 1 / (math.sqrt(1.75) + 1)])


def test_fednova_by_hand() -> None:
    # a_eff = ¼·2 + ¾·6 = 5;    Σ p d = ¼ (4, −8)/2 = (½, −1);                    w = (0, 1) + 5 (½, −1) = (2.5, −4)
    # a_eff = ½·1 + ½·4 = 2.5;  Σ p d = ½ (2, 2) + ½ (4, −4)/4 = (1.5, ½);        w = (2.5 + 3.75, −4 + 1.25)
    first, second = by_hand(algorithms.build("fednova", {}))
    close(first["adapter"], [2.5, -4])
    close(second["adapter"], [6.25, -2.75])


def test_scaffold_by_hand() -> None:
    # K = 5, plain means.   w = (0, 1) + ½ (4, −8) = (2, −3);    c = (1 + 4, 2 + 3)/5 = (1, 1)
    #                       w = (2, −3) + (3, −1) = (5, −4);     c = (1, 1) + (−2 + 7, 0 + 5)/5 = (2, 2)
    first, second = by_hand(algorithms.build("scaffold", {}))
    close(first["adapter"], [2, -3])
    close(first["control"], [1, 1])
    close(second["adapter"], [5, -4])
    close(second["control"], [2, 2])


def test_feddyn_by_hand() -> None:
    # a = ½, K = 5, plain means.
    # Σ Δ = (4, −8):   h = −½·(4, −8)/5 = (−0.4, 0.8);                  w = (0 + 2, 1 − 4) − 2 h = (2.8, −4.6)
    # Σ Δ = (6, −2):   h = (−0.4, 0.8) − (0.6, −0.2) = (−1, 1);         w = (2.8 + 3, −4.6 − 1) − 2 h = (7.8, −7.6)
    first, second = by_hand(algorithms.build("feddyn", {"a": 0.5}))
    close(first["h"], [-0.4, 0.8])
    close(first["adapter"], [2.8, -4.6])
    close(second["h"], [-1, 1])
    close(second["adapter"], [7.8, -7.6])


# Identities


def last(algorithm: Algorithm, **settings: Any) -> State:
    *_, (_, _, state, _) = rounds_of(algorithm, **settings)
    return state


def test_fedavgm_without_momentum_is_fedavg() -> None:
    assert same({"adapter": last(built("fedavgm", momentum=0.0))["adapter"]}, last(built("fedavg")))


def test_fednova_with_equal_steps_is_fedavg() -> None:
    # Clients 1 and 4 take 3 steps each; clients 0 and 1 do not take as many as each other.
    for clients, equal in (((1, 4), True), ((0, 1), False)):
        found, expected = (last(built(name), sampled=lambda _, c=clients: c)["adapter"] for name in ("fednova", "fedavg"))
        alike = all(torch.allclose(found[n], expected[n], rtol=1e-6, atol=1e-7) for n in found)
        assert alike == equal


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_effective_steps_are_the_summed_weights_of_the_gradients(momentum: float, steps: int) -> None:
    """A naive twin: run SGD with momentum on gradients of 1 and see how far it gets."""
    path = velocity = 0.0
    for _ in range(steps):
        velocity = momentum * velocity + 1.0
        path += velocity
    assert effective_steps(steps, momentum) == pytest.approx(path, rel=1e-12)


def test_fednova_reports_the_effective_steps_of_its_optimizer() -> None:
    algorithm = built("fednova")
    for momentum, expected in ((0.0, 4.0), (0.5, effective_steps(4, 0.5))):
        result = LocalResult(tensors(w=0), tensors(w=1), None, 1, 4, 0.1, {}, momentum)
        upload, _ = algorithm.finish(result, {"adapter": tensors(w=0)}, {}, round_info())
        assert float(upload["normaliser"]["a"]) == pytest.approx(expected)


@pytest.mark.parametrize("a", [0.0, -3.0, 1e-30, 0.5, 16.0, 1e30])
def test_fednova_refuses_effective_steps_that_its_steps_cannot_give(a: float) -> None:
    algorithm = built("fednova")
    bad = update(0, tensors(w=1), examples=5, steps=5, normaliser=tensors(a=[a]))
    why = algorithm.refuse(bad, algorithm.init(tensors(w=0)), round_info())
    assert why == f"effective steps {a:g} do not result from 5 steps"


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("steps", [1, 2, 5, 300])
def test_fednova_accepts_the_effective_steps_of_every_optimizer(steps: int, momentum: float) -> None:
    algorithm = built("fednova")
    good = update(0, tensors(w=1), examples=300, steps=steps, normaliser=tensors(a=[effective_steps(steps, momentum)]))
    assert algorithm.refuse(good, algorithm.init(tensors(w=0)), round_info()) is None


def test_scaffold_with_one_client_is_fedavg() -> None:
    def alone(name: str) -> Tensors:
        algorithm, memories, start = built(name), dict[int, State](), lora_adapter()
        state = algorithm.init(start)
        for number in range(4):
            info = round_info(number, (2,), clients=1)
            state = algorithm.aggregate(state, a_round(algorithm, state, memories, info), info)
        return state["adapter"]

    found, expected = alone("scaffold"), alone("fedavg")
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6)


def test_scaffold_under_full_participation_keeps_the_mean_of_the_variates() -> None:
    algorithm, memories, start = built("scaffold"), dict[int, State](), lora_adapter()
    state = algorithm.init(start)
    for number in range(3):
        info = round_info(number, (0, 1, 2), clients=3)
        state = algorithm.aggregate(state, a_round(algorithm, state, memories, info), info)
        for name, c in state["control"].items():
            mean = sum(memory["control"][name] for memory in memories.values()) / 3
            torch.testing.assert_close(c, mean, rtol=1e-6, atol=1e-7)
    assert all(bool(c.any()) for c in state["control"].values()), "the variates never moved"
    assert all(bool(c.any()) for memory in memories.values() for c in memory["control"].values())


def test_feddyn_local_rule_becomes_plain_but_the_servers_step_does_not() -> None:
    """h / a does not depend on a, so that a → 0 does not give FedAvg; what does is the local rule."""
    small, smaller = (last(built("feddyn", a=a))["adapter"] for a in (1e-4, 1e-5))
    plain = last(built("fedavg", weighting="uniform"))["adapter"]
    for name in small:
        torch.testing.assert_close(small[name], smaller[name], rtol=1e-3, atol=1e-3)
        assert not torch.allclose(smaller[name], plain[name], rtol=0.1)
    received, memory = {"adapter": tensors(w=1)}, {"h": tensors(w=1e-6)}
    rule = built("feddyn", a=1e-6).rule(received, memory, round_info())
    assert max(rule.proximal.values()) == 1e-6
    assert float(rule.offset["w"].abs()) <= 1e-6


# Naive twins: whole federations of 7 rounds in which only some take part, one number at a time


def sampled(number: int) -> tuple[int, ...]:
    return ((0, 1), (1, 2, 3), (0, 4), (2,), (0, 1, 2, 3, 4), (1, 3), (0, 2))[number]


def goals(client: int) -> dict[str, np.ndarray]:
    return {n: target(client, n, t.shape).double().numpy() for n, t in lora_adapter().items()}


def naive_scaffold() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The paper's Algorithm 1 with option II as it stands."""
    x = {n: t.double().numpy() for n, t in lora_adapter().items()}
    c = {n: np.zeros_like(t) for n, t in x.items()}
    c_of = {client: {n: np.zeros_like(t) for n, t in x.items()} for client in range(5)}
    for number in range(7):
        new_x, new_c = dict(x), dict(c)
        for client in sampled(number):
            for n, goal in goals(client).items():
                y = x[n]
                for _ in range(steps_of(client)):
                    y = y - LR * ((y - goal) - c_of[client][n] + c[n])
                plus = c_of[client][n] - c[n] + (x[n] - y) / (steps_of(client) * LR)
                new_x[n] = new_x[n] + (y - x[n]) / len(sampled(number))
                new_c[n] = new_c[n] + (plus - c_of[client][n]) / 5
                c_of[client][n] = plus
        x, c = new_x, new_c
    return x, c


def naive_feddyn(a: float) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The paper's Algorithm 1, its minimisation replaced by the same gradient steps."""
    w = {n: t.double().numpy() for n, t in lora_adapter().items()}
    h = {n: np.zeros_like(t) for n, t in w.items()}
    h_of = {client: {n: np.zeros_like(t) for n, t in w.items()} for client in range(5)}
    for number in range(7):
        ended: dict[str, list[np.ndarray]] = {n: [] for n in w}
        for client in sampled(number):
            for n, goal in goals(client).items():
                y = w[n]
                for _ in range(steps_of(client)):
                    y = y - LR * ((y - goal) - h_of[client][n] + a * (y - w[n]))
                h_of[client][n] = h_of[client][n] - a * (y - w[n])
                ended[n].append(y)
        for n, ys in ended.items():
            h[n] = h[n] - a / 5 * sum(y - w[n] for y in ys)
            w[n] = sum(ys) / len(ys) - h[n] / a
    return w, h


@pytest.mark.parametrize(
    ("name", "options", "group", "twin"),
    [("scaffold", {}, "control", naive_scaffold), ("feddyn", {"a": 0.3}, "h", lambda: naive_feddyn(0.3))],
    ids=["scaffold", "feddyn"],
)
def test_equals_its_naive_twin(name: str, options: dict[str, float], group: str, twin: Callable[[], Any]) -> None:
    found = last(built(name, **options), rounds=7, sampled=sampled)
    w, other = twin()
    for n in w:
        torch.testing.assert_close(found["adapter"][n].double(), torch.from_numpy(w[n]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[group][n].double(), torch.from_numpy(other[n]), rtol=1e-5, atol=1e-5)


def test_scaffold_finds_the_common_optimum_that_drift_hides_from_fedavg() -> None:
    """Clients of unequal steps pull FedAvg off the mean of the targets for ever; the variates take that away."""
    everyone = range(5)
    start = lora_adapter(layers=1)

    def distance_left(name: str) -> float:
        algorithm = algorithms.build(name, {} if name == "scaffold" else {"weighting": "uniform"})
        found = last(algorithm, rounds=150, adapter=start, sampled=lambda _: everyone)["adapter"]
        best = {n: sum(target(c, n, t.shape) for c in everyone) / 5 for n, t in found.items()}
        return max(float((found[n] - best[n]).abs().max()) for n in found)

    assert distance_left("scaffold") < 1e-4 < 1e-2 < distance_left("fedavg")
