"""User-level differential privacy in whole runs: the figures in files and tables, the end of a budget, and refusals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from commands import call, run
from fedmllm import config as files
from fedmllm.config import Named
from fedmllm.errors import ConfigError
from fedmllm.experiment.compatibility import check_privacy
from fedmllm.experiment.parts import build, with_defaults
from fedmllm.privacy.accountant import epsilon_after
from fedmllm.remote.actors import split
from fedmllm.remote.fleet import RemoteFleet
from fedmllm.remote.protocol import Job, Reply
from fedmllm.report.grids import GridRow, row_score
from fedmllm.report.scores import Spread
from fedmllm.runs.kinds import execute
from fedmllm.runs.session import Session
from fedmllm.storage.run_dir import RunDir
from helpers import round_info

PRIVATE = '[privacy]\nname = "user-level"\nepsilon = 8\ndelta = 1e-2\n'
Write = Callable[..., Path]


def arguments(settings: Mapping[str, object]) -> list[str]:
    return [argument for key, value in settings.items() for argument in ("--set", f"{key}={value}")]


def test_a_private_run_resumed_and_its_figures(write_experiment: Write, tmp_path: Path) -> None:
    """One client of four is expected, so some rounds have none; interrupted, the run continues to the same bits."""
    file = write_experiment(PRIVATE, rounds=6)
    one = ["--set", "train.clients_per_round=1"]
    result = run("run", file, "--out", tmp_path / "whole", *one)
    records = RunDir(tmp_path / "whole").rounds()
    sizes = [len(record["sampled"]) for record in records]
    assert min(sizes) == 0 < max(sizes)
    assert all(math.isnan(record["loss"]) == (not record["sampled"]) for record in records)
    spent = result["privacy_spent"]
    noise = spent["noise"]
    assert 0.99 * 8 < spent["epsilon"] <= 8
    assert spent == {
        "epsilon": records[-1]["privacy"]["epsilon"],
        "delta": 1e-2,
        "noise": noise,
        "clip": 0.1,
        "clipping": "adaptive",
        "sampling": "poisson",
        "probability": 0.25,
        "unit": "client",
        "neighbours": "add or remove one",
    }
    assert [record["privacy"]["epsilon"] for record in records] == [epsilon_after(n, noise, 0.25, 1e-2) for n in range(1, 7)]
    table = call("compare", tmp_path / "whole").stdout
    assert "fedavg + user-level + ε = 7.99" in " ".join(table.split())

    parts = build(files.validate(files.read(tmp_path / "whole" / "config.toml")))
    directory = RunDir(tmp_path / "interrupted")

    def interrupt(stage: str, done: int, total: int, note: str) -> None:
        if stage == "rounds" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute("federated", Session(parts, parts.prepare(), interrupt), directory)
    resumed = run("run", file, "--out", directory.path, "--resume", *one)
    assert resumed["adapter_sha256"] == result["adapter_sha256"]
    assert resumed["privacy_spent"] == spent
    assert [r["privacy"] for r in directory.rounds()] == [r["privacy"] for r in records]


def test_the_run_ends_with_its_budget_and_says_so(write_experiment: Write, tmp_path: Path) -> None:
    extra = PRIVATE + 'noise = 1.0\nclipping = "fixed"\n'
    limited = write_experiment(extra, rounds=9)
    completed = call("run", limited, "--out", tmp_path / "run", "--set", "privacy.epsilon=3")
    assert completed.exit_code == 0, completed.output
    records = RunDir(tmp_path / "run").rounds()
    fit = max(n for n in range(10) if epsilon_after(n, 1.0, 0.5, 1e-2) <= 3)
    assert 0 < len(records) == fit < 9
    assert f"the budget ends after {fit} of 9 rounds, and so does the run" in completed.output
    assert all(set(record["privacy"]) == {"clip", "epsilon"} for record in records)
    checked = run("check", limited, "--set", "privacy.epsilon=3")
    assert checked["privacy_spent"] == RunDir(tmp_path / "run").result()["privacy_spent"]


def test_what_is_planned_is_shown_before_the_run(write_experiment: Write) -> None:
    shown = " ".join(call("check", write_experiment(PRIVATE)).output.split())
    assert "privacy: epsilon = 7.99 at delta = 0.01 after 3 rounds of 2 expected clients, with noise of 0." in shown
    without = PRIVATE.replace("epsilon = 8", "noise = 0")
    assert "privacy: no epsilon after 3 rounds" in call("check", write_experiment(without)).output
    assert run("check", write_experiment(without))["privacy_spent"]["epsilon"] is None
    assert run("check", write_experiment())["privacy_spent"] is None


def test_baselines_have_no_noise_and_no_epsilon(write_experiment: Write, tmp_path: Path) -> None:
    private, plain = (
        run("baseline", "centralised", write_experiment(extra), "--out", tmp_path / name)
        for extra, name in ((PRIVATE, "private"), ("", "plain"))
    )
    assert private["adapter_sha256"] == plain["adapter_sha256"]
    assert private["privacy_spent"] is None


CAPABLE = (
    "choose one of fedadagrad, fedadam, fedavg, fedavgm, fedprox, fedrot-lora, fedsvd, fedyogi, ffa-lora, frlora, rolora, yoco."
)
MEAN = "uses more of the updates than the mean of the adapters, to which noise is added"
MEMORY = "lets clients remember earlier rounds, which no clip bounds"
REFUSED: list[tuple[dict[str, object], str]] = [
    ({"secure.name": "pairwise"}, "because secure.name = 'pairwise' hides the single updates, which the server must clip"),
    ({"compression.name": "int8"}, "compression.name = 'int8' cannot pack the noisy mean; set it to \"none\"."),
    ({"compression.name": "top-k"}, "compression.name = 'top-k' cannot pack the noisy mean"),
    ({"algorithm.name": "scaffold"}, f"algorithm.name = 'scaffold' {MEAN}; {CAPABLE}"),
    ({"algorithm.name": "feddyn"}, f"algorithm.name = 'feddyn' {MEMORY}; {CAPABLE}"),
    ({"algorithm.name": "fedsa-lora"}, "leaves part of every model with its client, without noise"),
    ({"algorithm.name": "flora"}, MEAN),
    ({"algorithm.name": "fednova"}, MEAN),
    ({"algorithm.name": "fedmomentum"}, MEAN),
    ({"algorithm.name": "flora-na"}, MEAN),
    ({"algorithm.name": "hetlora"}, MEAN),
    ({"algorithm.name": "hetlora", "clients.rank": [1, 2]}, "clients.rank gives clients unequal ranks, which may tell"),
    ({"fleet.name": "flower"}, "fleet.name = \"flower\" tells every site which others take part"),
    ({"train.min_updates": 2}, "train.min_updates = 2 ends the run if few clients take part; leave it out."),
    ({"privacy.delta": 0.25}, "privacy.delta = 0.25 is not below 1 / 4 clients"),
    ({"privacy.delta": 0.0}, "privacy: delta = 0.0 must be at least 1e-15 and below 1"),
    ({"privacy.delta": 1.0}, "privacy: delta = 1.0 must be at least 1e-15 and below 1"),
    ({"privacy.epsilon": 0}, "privacy: epsilon = 0.0 must be above 0"),
    ({"privacy.epsilon": -1}, "privacy: epsilon = -1.0 must be above 0"),
    ({"privacy.epsilon": 501}, "privacy: epsilon = 501.0 must be at most 500"),
    ({"privacy.epsilon": "inf"}, "privacy.epsilon: "),
    ({"privacy.epsilon": "nan"}, "privacy.epsilon: "),
    ({"privacy.noise": -0.5}, "privacy: noise = -0.5 must not be negative"),
    ({"privacy.noise": 0.2}, "privacy.epsilon = 8.0 is less than the first round spends with privacy.noise = 0.2"),
    ({"privacy.clip": 0}, "privacy: clip = 0.0 must be above 0"),
    ({"privacy.quantile": 1}, "privacy: quantile = 1.0 must be above 0 and below 1"),
    ({"privacy.clip_lr": 0}, "privacy: clip_lr = 0.0 must be above 0"),
    ({"privacy.count_noise": 0}, "privacy: count_noise = 0.0 must be above 0"),
    ({"privacy.count_noise": 0.01}, "privacy.count_noise = 0.01 must be more than half of the noise, which is "),
    ({"privacy.clipping": "none"}, "privacy.clipping: input should be 'fixed' or 'adaptive'"),
    ({"privacy.epsilom": 2}, "privacy.epsilom: unknown key for privacy 'user-level'; did you mean 'epsilon'?"),
    ({"privacy.name": "user-levle"}, "privacy.name: there is no privacy 'user-levle'; did you mean 'user-level'?"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "reason"), REFUSED, ids=[str(settings) for settings, _ in REFUSED])
def test_what_would_void_the_guarantee_is_refused(settings: dict[str, object], reason: str, write_experiment: Write) -> None:
    completed = call("check", write_experiment(PRIVATE), *arguments(settings))
    assert completed.exit_code == 2
    assert reason in " ".join(completed.output.split())


def test_a_robust_estimate_is_refused(write_experiment: Write) -> None:
    config = with_defaults(files.validate(files.read(write_experiment(PRIVATE))))
    parts = build(config)
    assert parts.privacy is not None
    robust = config.model_copy(update={"robust": Named(name="median")})
    with pytest.raises(ConfigError, match=r"robust\.name = 'median' chooses among updates, so that one client changes what"):
        check_privacy(robust, parts.algorithm, parts.privacy)


def test_a_budget_or_a_noise_is_required(write_experiment: Write) -> None:
    completed = call("check", write_experiment('[privacy]\nname = "user-level"\ndelta = 1e-3\n'))
    assert completed.exit_code == 2
    assert "privacy: epsilon or noise is required" in " ".join(completed.output.split())
    completed = call("check", write_experiment('[privacy]\nname = "user-level"\nepsilon = 3\n'))
    assert "privacy.delta: this key is required by privacy 'user-level'" in " ".join(completed.output.split())


def test_a_missing_accountant_is_named(write_experiment: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmllm.experiment.compatibility.find_spec", lambda name: None)
    completed = call("run", write_experiment(PRIVATE))
    assert completed.exit_code == 2
    assert 'pip install "fedmllm[privacy]"' in " ".join(completed.output.split())


def test_nobody_is_asked_in_a_round_without_clients() -> None:
    class Silent:
        def exchange(self, jobs: Mapping[int, Job], timeout: float) -> Mapping[int, Reply]:
            assert not jobs
            return {}

    fleet = RemoteFleet(Silent(), "run", "", 1.0)
    info: Any = round_info(sampled=())
    assert fleet.train(info, {}) == []
    fleet.forget(0, [])
    assert split([], 3) == []


@pytest.mark.parametrize(("epsilon", "expected"), [(None, "71.0"), (7.994, "71.0 (ε = 7.99)"), (0.5, "71.0 (ε = 0.5)")])
def test_a_score_says_what_it_cost(epsilon: float | None, expected: str) -> None:
    row = GridRow({}, "federated", ids=["a"], scores=[0.71], spread=Spread.of([0.71]), epsilon=epsilon)
    assert row_score(row) == expected
    assert row.to_json().get("epsilon") == epsilon
