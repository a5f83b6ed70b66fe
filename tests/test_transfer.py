"""Evaluation of a run's model on other tasks' test sets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from commands import call, run

Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def transfer_options(dataset: Path) -> tuple[str, str]:
    """The option eval.transfer: the run's own test set, as if it were another task's, and six samples of a different task."""
    own = f'{{name = "jsonl", train = "{dataset / "train.jsonl"}", test = "{dataset / "test.jsonl"}"}}'
    return "--set", f'eval.transfer=[{own}, {{name = "shapes-qa", test_samples = 6}}]'


@pytest.mark.parametrize(
    "command",
    [
        ("run",),
        ("run", "--set", "algorithm.name=fedex-lora"),
        ("run", "--set", "algorithm.name=fedsa-lora"),
        ("baseline", "zero-shot"),
        ("baseline", "local"),
        ("baseline", "centralised"),
    ],
    ids=lambda command: command[-1],
)
def test_the_final_model_is_evaluated_on_other_test_sets(
    command: tuple[str, ...], write_experiment: Write, dataset: Path
) -> None:
    head = command[:2] if command[0] == "baseline" else command[:1]
    file, rest = write_experiment(rounds=2), command[len(head) :]
    plain = run(*head, file, *rest)
    both = run(*head, file, *rest, *transfer_options(dataset))
    assert plain["transfer"] == {}
    assert set(both["transfer"]) == {"jsonl", "shapes-qa"}
    assert both["transfer"]["jsonl"] == {"primary_metric": "accuracy", "metrics": both["metrics"]}, "the same questions"
    assert both["transfer"]["shapes-qa"]["metrics"]["both"]["n"] == 6
    assert (both["metrics"], both["adapter_sha256"]) == (plain["metrics"], plain["adapter_sha256"]), "they are not trained on"


def test_resumed_local_training_keeps_the_predictions_of_finished_clients(
    write_experiment: Write, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedmllm.runs import kinds

    file, settings = write_experiment("clients = 3\n", rounds=2), transfer_options(dataset)
    whole = run("baseline", "local", file, *settings, "--out", "whole")
    train, calls = kinds.train_alone, []

    def once(state: kinds.Run, clients: list[int]) -> None:
        train(state, clients[:1])
        calls.append(clients)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(kinds, "train_alone", once)
        assert call("baseline", "local", file, *settings, "--out", "cut").exit_code == 130
    assert calls
    assert run("baseline", "local", file, *settings, "--out", "cut", "--resume")["transfer"] == whole["transfer"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('[{name = "nowhere"}]', "nowhere"),
        ('[{name = "shapes-qa", n = "many"}]', "eval.transfer.0"),
        ('[{name = "shapes-qa"}, {name = "shapes-qa"}]', "'shapes-qa' twice"),
        ("[]", "eval.transfer"),
        ('[{name = "medalpaca", data_dir = "x"}]', "eval.transfer.0.name: 'medalpaca' has no test split"),
    ],
)
def test_unusable_test_sets_are_rejected_before_anything_is_written(
    value: str, message: str, write_experiment: Write, tmp_path: Path
) -> None:
    done = call("run", write_experiment(), "--set", f"eval.transfer={value}")
    assert done.exit_code == 2
    assert message in done.stderr
    assert not list((tmp_path / "runs").glob("*/result.json"))
