"""What a sweep file may not say, because two cells or two settings could not be told apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fedmllm.errors import ConfigError
from fedmllm.experiment.sweep import plan_sweep

Plan = Callable[..., int]

LR = """[[axes]]
name = "lr"
cells = [{ name = "1e-4", set = { "train.lr" = 1e-4 } }, { name = "1e-2", set = { "train.lr" = 1e-2 } }]
"""
METHOD = """[[axes]]
name = "method"
cells = [
    { name = "zero-shot", kind = "zero-shot" },
    { name = "local", kind = "local" },
    { name = "FedAvg" },
    { name = "FedYogi", set = { "algorithm.name" = "fedyogi" } },
]
"""


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """A function that plans a sweep with these axes and returns the number of its runs."""
    (tmp_path / "base.toml").write_text(
        '[task]\nname = "shapes-qa"\n[train]\nlr = 0.01\nrounds = 7\n[model.lora]\nalpha = 16\n'
    )

    def plan_axes(axes: str, *overrides: str, head: str = "") -> int:
        (tmp_path / "grid.toml").write_text(f'name = "grid"\nbase = "base.toml"\n{head}\n{axes}')
        return len(plan_sweep(tmp_path / "grid.toml", overrides)[1])

    return plan_axes


def axis(name: str, *cells: str) -> str:
    """An axis; each cell is the rest of its table after its braces are opened."""
    return f'[[axes]]\nname = "{name}"\ncells = [{", ".join(f"{{ {cell} }}" for cell in cells)}]\n'


A_AND_B = "the cells 'A' and 'B' of the axis 'm'"
REFUSED = [
    (axis("m", 'name = "A"', 'name = "A", kind = "local"'), "axes.0.cells.0 and axes.0.cells.1 are both named 'A'"),
    (axis("m", 'name = "A  B"', 'name = " A B", kind = "local"'), "axes.0.cells.0 and axes.0.cells.1 are both named ' A B'"),
    (axis("m", 'name = "é"', 'name = "e\u0301", kind = "local"'), "axes.0.cells.0 and axes.0.cells.1 are both named"),
    (LR + METHOD + LR, "axes.0 and axes.2 are both named 'lr'"),
    (axis("m", 'name = " "'), "axes.0.cells.0.name: must have 1 to 100 printable characters"),
    (axis("m", f'name = "{"x" * 101}"'), "axes.0.cells.0.name: must have 1 to 100 printable characters"),
    (axis("", 'name = "A"'), "axes.0.name: must have 1 to 100 printable characters"),
    (axis("m", 'name = "A\u202e"'), "axes.0.cells.0.name: must have 1 to 100 printable characters"),
    (LR + axis("m", 'name = "A", set = { "train.lr" = 0.5 }'),
     "train.lr is set by the cell '1e-4' of the axis 'lr' and by the cell 'A' of the axis 'm'; set each key in one place."),
    (LR + axis("m", 'name = "A", set = { train = { rounds = 3, lr = 0.5 } }'), "train.lr is set by the cell '1e-4'"),
    (LR + axis("m", 'name = "A", set = { train.lr = 0.5 }'), "train.lr is set by the cell '1e-4'"),
    (axis("m", 'name = "A", set = { "train.lr" = 0.5, train = { lr = 0.1 } }'),
     "the cell 'A' of the axis 'm' sets train.lr twice"),
    (axis("m", 'name = "A", set = { "task.companion" = { name = "easy-vqa" }, "task.companion.test_samples" = 5 }'),
     "the cell 'A' of the axis 'm' sets task.companion.test_samples twice"),
    (axis("m", 'name = "A"', 'name = "B", set = { seed = 3 }'), "the cell 'B' of the axis 'm' sets seed"),
    (axis("m", 'name = "A"', 'name = "B", set = { "algorithm.name" = "fedavg" }'),
     f"{A_AND_B} are the same run federated-"),
    (axis("m", 'name = "A", set = { "train.lr" = 1 }', 'name = "B", set = { "train.lr" = 1.0 }'),
     f"{A_AND_B} have the same settings"),
    (axis("m", 'name = "A"', 'name = "B", kind = "federated"'), f"{A_AND_B} are the same run federated-"),
    (axis("m", 'name = "A", kind = "local"', 'name = "B", kind = "local"'), f"{A_AND_B} have the same settings"),
    (axis("m", 'name = "A", kind = "zero-shot"', 'name = "B", kind = "zero-shot", set = { "train.lr" = 3 }'),
     f"{A_AND_B} are the same run zero-shot-"),
    (axis("m", 'name = "A", set = { "scenario.name" = "missing", "scenario.rate" = 0.3 }',
          'name = "B", set = { "scenario.name" = "missing" }'), f"{A_AND_B} are the same run federated-"),
]  # fmt: skip


@pytest.mark.parametrize(("axes", "sentence"), REFUSED, ids=[sentence[:60] for _, sentence in REFUSED])
def test_cells_that_cannot_be_told_apart_are_refused(plan: Plan, axes: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        plan(axes)
    assert f"grid.toml: {sentence}" in str(refused.value)


@pytest.mark.parametrize(
    ("head", "sentence"),
    [
        ("seeds = [0, 0, 0]", "seeds: 0 is given 3 times"),
        ("seeds = [4, 2, 3, 2, 3]", "seeds: 2 is given 2 times"),
        ("replicates = 1000000000", "replicates: must be at most 10000, because each is a run of every cell"),
        ("seeds = [-1]", "seeds.0: input should be greater than or equal to 0"),
        ("set = { seed = 5 }", "`set` sets seed, which `seeds` sets for every cell"),
        ('set = { "train.lr" = 0.5 }', "train.lr is set by `set` and by the cell '1e-4' of the axis 'lr'"),
        ("set = { train.lr = 0.5 }", "train.lr is set by `set` and by the cell '1e-4' of the axis 'lr'"),
    ],
)
def test_seeds_and_common_settings(plan: Plan, head: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        plan(LR, head=head)
    assert f"grid.toml: {sentence}" in str(refused.value)


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        ('"task.companion" = { name = "pocket-memes" }', "task.companion: 'pocket-memes' is measured by auc"),
        ('task = { name = "medalpaca", data_dir = "." }', "task.name: 'medalpaca' has no test split"),
        ('"eval.transfer" = [{ name = "medalpaca", data_dir = "." }]', "eval.transfer.0.name: 'medalpaca' has no test split"),
    ],
)
def test_a_cell_whose_run_would_be_refused_is_refused_before_any_is_run(plan: Plan, task: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        plan(axis("m", f'name = "A", set = {{ {task} }}'))
    assert f"grid.toml: the cell A: {sentence}" in str(refused.value)


@pytest.mark.parametrize("name", ["", "../../x", "a/b", "x" * 300, "a\\u0007"])
def test_a_sweeps_name_is_that_of_a_folder(plan: Plan, tmp_path: Path, name: str) -> None:
    (tmp_path / "grid.toml").write_text(f'name = "{name}"\nbase = "base.toml"\n')
    with pytest.raises(ConfigError, match=r"grid\.toml: name: "):
        plan_sweep(tmp_path / "grid.toml")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.lr=0.5", "--set train.lr: the axis 'lr' of "),
        ("train={lr=0.5}", "--set train.lr: the axis 'lr' of "),
        ("algorithm.name=fedavg", "--set algorithm.name: the axis 'method' of "),
        ("seed=3", "--set seed: "),
        ("train.ruonds=3", "--set train.ruonds: unknown key; did you mean 'rounds'?"),
        ("scenario.rate=2", "--set scenario.rate: unknown key for scenario 'aligned'"),
        ("scenario.name=crss", "--set scenario.name: there is no scenario 'crss'; did you mean 'cross'?"),
    ],
)
def test_an_override_that_makes_cells_equal_or_is_wrong_is_refused(plan: Plan, override: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        plan(LR + METHOD, override)
    assert str(refused.value).startswith(sentence)


def test_what_is_meant_to_share_a_run_may(plan: Plan) -> None:
    assert plan(LR + METHOD, "scenario.name=hybrid", "train.rounds=3", head="seeds = [0, 1]") == 2 * 4 * 2
    two_prompts = axis("prompt", 'name = "A"', 'name = "B", set = { "prompt.name" = "modality-specific" }')
    assert plan(two_prompts + METHOD) == 2 * 4
    assert plan(axis("m", 'name = "FedAvg"', 'name = "fedavg", set = { "algorithm.server_lr" = 0.5 }')) == 2
    assert plan("") == 1


def test_a_table_of_settings_changes_the_base_and_does_not_replace_its_tables(plan: Plan, tmp_path: Path) -> None:
    plan(axis("m", 'name = "A", set = { train.lr = 0.5, model = { lora.rank = 4 } }'))
    [planned] = plan_sweep(tmp_path / "grid.toml")[1]
    train, lora = planned.experiment.train, planned.experiment.model.lora
    assert (train.lr, train.rounds, lora.rank, lora.alpha) == (0.5, 7, 4, 16)
