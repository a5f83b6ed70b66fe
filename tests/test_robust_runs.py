"""Robust aggregation in experiments: what it excludes, what a run records of it, and the report's table."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from commands import run
from fedmllm.config import Experiment, validate
from fedmllm.errors import ConfigError
from fedmllm.experiment.parts import build
from fedmllm.runs.kept import kept_by_group
from robust_rounds import METHODS

Write = Callable[..., Path]


def experiment(settings: dict[str, dict[str, Any]]) -> Experiment:
    """An experiment of ten clients of which seven take part in a round."""
    tables: dict[str, Any] = {
        "name": "robust",
        "task": {"name": "pocket-memes"},
        "partition": {"clients": 10},
        "train": {"clients_per_round": 7},
        "model": {"name": "pocket"},
    }
    return validate({**tables, **{key: {**tables.get(key, {}), **table} for key, table in settings.items()}})


REFUSED: list[tuple[str, dict[str, dict[str, Any]], str]] = [
    ("median", {"secure": {"name": "pairwise"}}, "'median' compares single updates, which secure.name = 'pairwise' hides"),
    ("median", {"algorithm": {"name": "flora"}}, "'median' estimates a mean, and algorithm.name = 'flora' works on single"),
    ("krum", {"algorithm": {"name": "fednova"}}, 'choose one of fedadagrad, fedadam, fedavg, fedavgm, feddyn, fedprox, fedr'),
    ("krum", {"algorithm": {"name": "fedsa-lora"}}, "'krum' sees half of each adapter under algorithm.name = 'fedsa-lora'"),
    ("centered-clip", {"algorithm": {"name": "fedsvd"}}, "algorithm.name = 'fedsvd' makes new factors in between"),
    ("krum", {"robust": {"on": "product"}, "model": {"adapter": {"kind": "dora"}}}, "model.adapter.kind = 'dora' has others"),
    ("krum", {"robust": {"on": "both"}}, "robust.on: input should be 'factors' or 'product', got 'both'"),
    ("krum", {"robust": {"attackers": 3}}, "needs 9 updates a round with these settings, and train.clients_per_round = 7"),
    ("krum", {"robust": {"attackers": -1}}, "robust: attackers = -1 must not be negative"),
    ("multi-krum", {"robust": {"select": 7}}, "'multi-krum' needs 8 updates a round with these settings"),
    ("multi-krum", {"robust": {"select": -1}}, "robust: select = -1 must not be negative"),
    ("trimmed-mean", {"robust": {"share": 0.5}}, "robust: share = 0.5 must be at least 0 and below 0.5"),
    ("trimmed-mean", {"robust": {"share": -0.1}}, "robust: share = -0.1 must be at least 0 and below 0.5"),
    ("trimmed-mean", {"robust": {"share": 0.1}}, "train.clients_per_round = 7; raise it or raise robust.share"),
    ("norm-clip", {"robust": {"factor": 0.0}}, "robust: factor = 0.0 must be above 0"),
    ("norm-clip", {"robust": {"bound": -1.0}}, "robust: bound = -1.0 must not be negative"),
    ("centered-clip", {"robust": {"iterations": 0}}, "robust: iterations = 0 must be above 0"),
    ("geometric-median", {"robust": {"smoothing": 0.0}}, "robust: smoothing = 0.0 must be above 0"),
    ("krumm", {}, "robust.name: there is no robust 'krumm'; did you mean 'krum'?"),
    ("krum", {"robust": {"f": 2}}, "robust.f: unknown key for robust 'krum'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "settings", "reason"), REFUSED, ids=[f"{name}-{settings}" for name, settings, _ in REFUSED])
def test_what_cannot_be_combined_is_refused(name: str, settings: dict[str, dict[str, Any]], reason: str) -> None:
    table = {"name": name, **settings.get("robust", {})}
    with pytest.raises(ConfigError) as error:
        build(experiment({**settings, "robust": table}))
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("compression", ["none", "int8"])
@pytest.mark.parametrize("name", METHODS)
def test_what_can_be_combined(name: str, compression: str) -> None:
    settings = {"robust": {"name": name}, "compression": {"name": compression}}
    assert build(experiment(settings)).robust is not None
    if name == "norm-clip":
        for algorithm in ("flora", "fednova", "fedsa-lora"):
            assert build(experiment({**settings, "algorithm": {"name": algorithm}})).robust is not None


def test_share_and_attackers_at_their_limits() -> None:
    for table in ({"name": "krum", "attackers": 2}, {"name": "multi-krum", "attackers": 2, "select": 5},
                  {"name": "trimmed-mean", "share": 1 / 7}, {"name": "trimmed-mean", "share": 0.0}):  # fmt: skip
        assert build(experiment({"robust": table})).robust is not None


# What a run records


def client(number: int, image: int, text: int, samples: int = 4, **more: Any) -> dict[str, Any]:
    return {"client": number, "samples": samples, "image": image, "text": text, "gap": 0.0, **more}


def record(kept: dict[int, float], sampled: list[int]) -> dict[str, Any]:
    """As `rounds.jsonl` gives it back: the keys of an object are text."""
    return {"sampled": sampled, "kept": {str(number): share for number, share in kept.items()}}


def test_what_each_group_keeps() -> None:
    rows = [
        client(0, 4, 4), client(1, 4, 0), client(2, 0, 4), client(3, 4, 2), client(4, 4, 4, attacker=True), client(5, 4, 4),
        client(6, 2, 2), client(7, 0, 0),
    ]  # fmt: skip
    records = [
        record({0: 1.0, 1: 0.2, 2: 0.6, 3: 1.0, 4: 0.0}, [0, 1, 2, 3, 4]),
        record({0: 0.5, 1: 0.4, 3: 0.9}, [0, 1, 3, 4]),  # the update of client 4 was refused
        record({6: 0.3, 7: 0.1}, [6, 7]),
    ]
    found = {(row.pop("group"), row.pop("attacker")): row for row in kept_by_group(records, rows)}
    assert found == {
        ("paired", False): {"clients": 1, "updates": 2, "refused": 0, "kept": 0.75, "below_half": 0.0},
        ("paired", True): {"clients": 1, "updates": 1, "refused": 1, "kept": 0.0, "below_half": 1.0},
        ("image only", False): {"clients": 1, "updates": 2, "refused": 0, "kept": 0.3, "below_half": 1.0},
        ("text only", False): {"clients": 1, "updates": 1, "refused": 0, "kept": 0.6, "below_half": 0.0},
        ("mixed", False): {"clients": 2, "updates": 3, "refused": 0, "kept": 0.733333, "below_half": 0.333333},
        ("neither", False): {"clients": 1, "updates": 1, "refused": 0, "kept": 0.1, "below_half": 1.0},
    }
    assert next(iter(found)) == ("paired", False)
    # The second record is as earlier versions wrote it.
    assert kept_by_group([{"sampled": [0, 1], "kept": {}}, {"sampled": [2]}], rows) == []


def test_a_group_of_which_nothing_was_valid_has_no_mean() -> None:
    found = kept_by_group([record({0: 1.0}, [0, 1])], [client(0, 4, 4), client(1, 4, 0)])
    assert found[1] == {
        "group": "image only", "attacker": False, "clients": 1, "updates": 0, "refused": 1, "kept": None, "below_half": None
    }  # fmt: skip


def test_a_run_records_what_it_kept(write_experiment: Write, tmp_path: Path) -> None:
    file = write_experiment('[robust]\nname = "centered-clip"\n', name="clipped", rounds=2)
    result = run("run", file, "--out", tmp_path / "run")
    assert result["robust"] == "centered-clip"
    records = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert all(list(record["kept"]) == [str(number) for number in record["sampled"]] for record in records)
    shares = [share for record in records for share in record["kept"].values()]
    assert all(0 < share <= 1 for share in shares)
    assert min(shares) < 1
    assert sum(row["updates"] for row in result["kept"]) == len(shares)
    mean = sum(row["kept"] * row["updates"] for row in result["kept"]) / len(shares)
    assert math.isclose(mean, sum(shares) / len(shares), abs_tol=1e-5)
