"""A server's step whose result is no number any more ends the run, and says which settings make steps smaller."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fedmllm.algorithms import Update, algorithms
from fedmllm.algorithms.fedavg import fedavg
from fedmllm.config import validate
from fedmllm.errors import RunError
from fedmllm.experiment.parts import with_defaults
from fedmllm.federation import FederationPlan, each_alone, federate
from fedmllm.runs.rounds import smaller_steps
from helpers import ADAPTER_INFO, FakeFleet, lora_adapter, update

PLAN = FederationPlan(tuple(range(8)), 3, 4, 0.1, "cosine", 1, seed=0, adapter=ADAPTER_INFO)
ADAPTER = lora_adapter()


def sending(value: float | None) -> Callable[[int, list[Update]], list[Update]]:
    """From round 1 on, all entries of the clients' adapters are `value`; None: the adapters that they received at first."""

    def change(number: int, updates: list[Update]) -> list[Update]:
        adapter = ADAPTER if value is None else {name: torch.full_like(t, value) for name, t in ADAPTER.items()}
        return updates if number < 1 else [replace(u, groups={**u.groups, "adapter": adapter}) for u in updates]

    return change


@pytest.mark.parametrize(
    ("name", "options", "value"),
    [
        ("fedavg", {"server_lr": 10.0}, 3e38),
        ("fedavg", {"server_lr": 1e39}, 1e-5),
        ("fedavgm", {"server_lr": 10.0}, 1e38),
        ("fedprox", {"server_lr": 10.0}, 3e38),
        ("scaffold", {"server_lr": 10.0}, 3e38),
        ("fednova", {"server_lr": 10.0}, 3e38),
        ("fedadam", {}, 3e38),
        ("fedadagrad", {}, 3e38),
        ("fedyogi", {"server_lr": 1e37}, 1e15),
        ("feddyn", {"a": 1e-300}, 1e-5),
        ("flora", {}, 3e38),
        ("flexlora", {}, 3e38),
    ],
)
def test_an_overflow_fails_the_round_in_which_it_happens(name: str, options: dict[str, float], value: float) -> None:
    fleet = FakeFleet(algorithms.build(name, options), sending(value))
    first_step = replace(fleet.algorithm, aggregate=lambda state, updates, info: state)
    calls = iter([first_step, *[fleet.algorithm] * 3])
    algorithm = replace(fleet.algorithm, aggregate=lambda *args: next(calls).aggregate(*args))
    rounds = federate(algorithm, fleet, replace(PLAN, remedy="lower something"), ADAPTER)
    next(rounds)
    with pytest.raises(RunError) as failed:
        next(rounds)
    start, end = "round 1: the server's step overflowed (NaN or infinity in '", "; lower something, and start a new run"
    assert str(failed.value).startswith(start)
    assert str(failed.value).endswith(f", from finite updates){end} (the state after round 0 is kept).")
    assert fleet.committed == []


def test_a_division_by_zero_in_the_first_round_is_an_overflow() -> None:
    fleet = FakeFleet(
        algorithms.build("fedadam", {"tau": 1e-300}), lambda _, updates: [update(u.client, ADAPTER) for u in updates]
    )
    with pytest.raises(RunError, match=r"^round 0: the server's step overflowed .* \(nothing was trained before\)\.$"):
        list(federate(fleet.algorithm, fleet, PLAN, ADAPTER))


def test_an_overflow_of_a_client_alone_names_the_learning_rate() -> None:
    start = {name: torch.full_like(tensor, -3e38) for name, tensor in ADAPTER.items()}

    def with_finite_losses(number: int, updates: list[Update]) -> list[Update]:
        return [replace(update, metrics={"loss": 1.0}) for update in sending(3e38)(number, updates)]

    rounds = each_alone(fedavg(), FakeFleet(fedavg(), with_finite_losses), PLAN, {2: ADAPTER, 5: start})
    with pytest.raises(RunError, match=r"round 1: the server's step overflowed .*; lower train\.lr = 0\.1, and start"):
        list(rounds)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("fedavg", {"server_lr": 1e39}, "lower algorithm.server_lr = 1e+39 or train.lr = 0.5"),
        ("fedavgm", {}, "lower algorithm.server_lr = 1.0 or algorithm.momentum = 0.9 or train.lr = 0.5"),
        ("fedadam", {"tau": 1e-300},
         "lower algorithm.server_lr = 0.001 or train.lr = 0.5, or raise algorithm.tau = 1e-300"),
        ("feddyn", {"a": 1e-300}, "lower train.lr = 0.5, or raise algorithm.a = 1e-300"),
        ("flora", {}, "lower train.lr = 0.5"),
    ],
)  # fmt: skip
def test_the_remedy_has_the_settings_of_the_servers_step(name: str, options: dict[str, float], expected: str) -> None:
    raw = {"task": {"name": "easy-vqa"}, "algorithm": {"name": name, **options}, "train": {"lr": 0.5}}
    assert smaller_steps(with_defaults(validate(raw))) == expected
