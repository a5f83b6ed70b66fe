"""The experiment files of the paper's setting choose what the published code does, where there is an option for it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fedmllm.experiment.sweep import PlannedRun, plan_sweep
from fedmllm.report.published import published, setting_of

PAPER = Path(__file__).parents[1] / "experiments" / "paper"
PAIRED, MEDICAL = ("hateful-memes", "crisismmd"), ("vqa-rad", "slake")
tasks = pytest.mark.parametrize("task", [*PAIRED, *MEDICAL])


@cache
def cells_of(task: str) -> list[PlannedRun]:
    return [planned for planned in plan_sweep(PAPER / f"{task}.sweep.toml")[1] if planned.kind == "federated"]


@tasks
def test_every_cell_is_the_published_setting_that_its_name_says(task: str) -> None:
    """`setting_of` is empty for draws by another rule, such as samples that never lose everything."""
    for planned in cells_of(task):
        assert setting_of(planned.experiment.resolved()) == planned.axes["heterogeneity"].replace(" =", "")
    settings = {setting_of(planned.experiment.resolved()) for planned in cells_of(task)}
    assert settings >= set(published()[task]["fedyogi"])


@tasks
def test_modalities_are_lost_as_in_the_published_code(task: str) -> None:
    scenarios = [planned.experiment.scenario for planned in cells_of(task)]
    assert {s.options["empty"] for s in scenarios if s.name == "missing"} == ({"keep"} if task in PAIRED else set())
    assert {s.options["coin"] for s in scenarios if s.name == "hybrid"} == {"sample" if task in PAIRED else "client"}


@tasks
def test_samples_are_distributed_as_in_the_published_code(task: str) -> None:
    partitions = [planned.experiment.partition for planned in cells_of(task)]
    assert {p.name for p in partitions} == {"dirichlet" if task in PAIRED else "iid"}
    assert {p.options.get("min_per_label") for p in partitions} == {1 if task in PAIRED else None}


@tasks
def test_the_servers_step_is_that_of_the_published_code(task: str) -> None:
    adaptive = {"server_lr": 1e-3, "tau": 1e-3, "weighting": "uniform"}
    moments = adaptive | {"beta1": 0.9, "beta2": 0.99}
    expected = {
        "fedavgm": {"server_lr": 1.0, "momentum": 0.9, "dampening": 0.9, "weighting": "examples"},
        "fedadagrad": adaptive | {"beta1": 0.0},
        "fedyogi": moments,
        "fedadam": moments,
    }
    algorithms = [planned.experiment.algorithm for planned in cells_of(task)]
    assert {a.name for a in algorithms} == set(expected)
    assert all(a.options == expected[a.name] for a in algorithms)


@tasks
def test_clients_train_as_in_the_published_code(task: str) -> None:
    for planned in cells_of(task):
        train, prompt = planned.experiment.train, planned.experiment.prompt
        assert (train.batching, train.batch_size * train.accumulate, train.beta2, train.weight_decay) == (
            "random",
            4,
            0.95,
            0.1,
        )
        # Its warm-up takes 1 % of the rounds, and divides the first round's rate by that number.
        assert train.first_round_factor == pytest.approx(1 / (0.01 * train.rounds))
        assert task in MEDICAL or prompt.options == {"wording": "published"}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"scenario": {"name": "aligned"}, "partition": {"name": "dirichlet", "alpha": 5, "clients": 10}}, "α 5.0"),
        ({"scenario": {"name": "aligned"}, "partition": {"name": "iid", "clients": 10}}, ""),
        ({"scenario": {"name": "cross", "image_clients": 0.3}, "partition": {"name": "iid", "clients": 10}}, "I:T 3:7"),
        ({"scenario": {"name": "cross"}, "partition": {"name": "iid", "clients": 10}}, "I:T 5:5"),
        ({"scenario": {"name": "hybrid", "presence": 0.6}, "partition": {"name": "iid", "clients": 10}}, "p 0.6"),
        ({"scenario": {"name": "hybrid", "coin": "client"}, "partition": {"name": "iid", "clients": 10}}, ""),
        (
            {
                "scenario": {"name": "hybrid", "coin": "client"},
                "partition": {"name": "iid"},
                "task": {"companion": {"name": "t"}},
            },
            "p 0.7",
        ),
        ({"scenario": {"name": "missing", "rate": 0.4}, "partition": {"name": "iid", "clients": 10}}, "β 0.4"),
        ({"scenario": {"name": "missing", "empty": "keep"}, "partition": {"name": "iid", "clients": 10}}, "β 0.3"),
        ({"scenario": {"name": "missing", "empty": "redraw"}, "partition": {"name": "iid", "clients": 10}}, ""),
        ({"scenario": {"name": "missing", "empty": "drop"}, "partition": {"name": "iid", "clients": 10}}, ""),
        ({"scenario": {"name": "missing", "never_empty": True}, "partition": {"name": "iid", "clients": 10}}, ""),
    ],
)
def test_settings_in_the_papers_notation(config: dict[str, Any], expected: str) -> None:
    assert setting_of(config) == expected
