"""Clients whose modalities change over the rounds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from commands import run
from fedmllm.data import manifest as manifests
from fedmllm.data.dealing import draw
from fedmllm.data.manifest import Manifest
from fedmllm.data.partitions import partitions
from fedmllm.data.scenarios import BOTH, IMAGE, NONE, TEXT, Change, Modalities, composed, scenarios
from fedmllm.data.schedule import Schedule
from fedmllm.data.summary import modality_shares
from fedmllm.errors import ConfigError, DataError
from helpers import sample

SAMPLES = [replace(sample(f"s{i:03d}"), label="ab"[i % 2]) for i in range(100)]


def drawn(rounds: int = 10, number: int = 10, seed: int = 0, **options: object) -> Manifest:
    return draw(SAMPLES, partitions.build("iid", {}), scenarios.build("drift", options), number, 1, seed, rounds)


def seen(manifest: Manifest, number: int) -> list[Modalities]:
    return [manifest.schedule.visible(client, number) for client in range(manifest.clients)]


def test_in_a_step_some_clients_lose_a_modality() -> None:
    manifest = drawn(at=4, modality="text")
    assert seen(manifest, 3) == [BOTH] * 10
    assert Counter(seen(manifest, 4)) == Counter(seen(manifest, 9)) == {BOTH: 5, IMAGE: 5}
    assert manifest.at(9).counts().sum(axis=0).tolist() == [100, 100, 50]


def test_gaining_is_losing_backwards() -> None:
    lose, gain = (drawn(at=0.5, direction=direction, modality="either") for direction in ("lose", "gain"))
    assert seen(lose, 0) == seen(gain, 9) == [BOTH] * 10
    assert seen(lose, 5) == seen(gain, 4)
    assert len({tuple(seen(drawn(at=0, modality="either", seed=seed), 0)) for seed in range(10)}) > 5


def test_a_chain_has_the_stated_rates_and_keeps_one_modality() -> None:
    manifest = drawn(400, 50, how="markov", lose=0.1, regain=0.3, modality="image")
    images = [["image" in has for has in (manifest.schedule.visible(c, r) for r in range(400))] for c in range(50)]
    assert sum(map(sum, images)) / 20_000 == pytest.approx(0.75, abs=0.02)
    pairs = Counter(pair for chain in images for pair in pairwise(chain))
    assert pairs[True, False] / (pairs[True, False] + pairs[True, True]) == pytest.approx(0.1, abs=0.01)
    assert pairs[False, True] / (pairs[False, True] + pairs[False, False]) == pytest.approx(0.3, abs=0.02)
    either = drawn(50, 20, how="markov", lose=0.9, regain=0.1, modality="either")
    assert set(Counter(has for number in range(50) for has in seen(either, number))) == {BOTH, IMAGE, TEXT}


def test_a_schedule_is_followed() -> None:
    manifest = drawn(5, 2, how="schedule", changes=[[3, 0, "none"], [1, 0, "text"], [4, 1, "image"]])
    assert [seen(manifest, number) for number in range(5)] == [
        [BOTH, BOTH], [TEXT, BOTH], [TEXT, BOTH], [NONE, BOTH], [NONE, IMAGE]
    ]  # fmt: skip
    assert list(manifest.schedule.stretches(0)) == [(0, 1, BOTH), (1, 2, TEXT), (3, 2, NONE)]
    assert list(manifest.schedule.stretches(1)) == [(0, 4, BOTH), (4, 1, IMAGE)]
    assert list(Schedule().stretches(0)) == [(0, 1, BOTH)]


def test_what_changes_nothing_is_left_out_and_a_shorter_run_passes_through_faster() -> None:
    schedule = Schedule.of([Change(0, 4, TEXT), Change(0, 0, BOTH), Change(0, 6, TEXT), Change(1, 2, BOTH)], 8)
    assert schedule.changes == (Change(0, 4, TEXT),)
    assert [schedule.visible(0, number) for number in (0, 3, 4, 7)] == [BOTH, BOTH, TEXT, TEXT]
    assert [schedule.visible(0, number, 4) for number in range(4)] == [BOTH, BOTH, TEXT, TEXT]
    assert schedule.visible(1, 5) == BOTH


def test_the_shares_are_means_over_the_rounds() -> None:
    manifest = drawn(10, 10, at=0.8, modality="image", clients=10)
    shares = modality_shares(manifest, SAMPLES, scenarios.build("drift", {}))
    assert shares["drawn"] == {"both": 0.8, "image": 0.0, "text": 0.2, "none": 0.0}
    assert shares["expected"] is None


def test_the_manifest_keeps_the_schedule(tmp_path: Path) -> None:
    manifest = drawn(how="markov")
    manifest.write(tmp_path / "m.parquet")
    assert manifests.read(tmp_path / "m.parquet") == manifest
    static = drawn(how="schedule", changes=[])
    assert static.digest() == draw(SAMPLES, partitions.build("iid", {}), scenarios.build("aligned", {}), 10, 1, 0).digest()
    assert manifest.digest() != static.digest()
    assert len({drawn(how="markov", seed=seed).digest() for seed in range(5)}) == 5


def test_drift_is_laid_over_another_scenario() -> None:
    laid = composed(scenarios.build("cross", {}), [("drift", scenarios.build("drift", {"clients": 10, "at": 5}))])
    manifest = draw(SAMPLES, partitions.build("iid", {}), laid, 10, 1, 0, 10)
    assert manifest.patterns().tolist() == manifest.at(0).patterns().tolist()
    assert manifest.at(5).patterns().sum(axis=0).tolist() == [0, 0, 50, 50]
    with pytest.raises(ValueError, match="two of the scenarios change over the rounds"):
        composed(laid, [("drift", scenarios.build("drift", {}))])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lose": 1.5}, "lose = 1.5 must be between 0 and 1"),
        ({"how": "markov", "lose": 0.0, "regain": 0.0}, "nothing would change"),
        ({"how": "schedule"}, "belong together"),
        ({"changes": [[0, 0, "text"]]}, "belong together"),
        ({"how": "schedule", "changes": [[0, 0, "sound"]]}, "changes: .* must be .round, client, and one of 'both', 'none', "),
        ({"how": "schedule", "changes": [[0, "text"]]}, "must be .round"),
        ({"clients": 1.5}, "clients = 1.5 must be a count"),
        ({"at": -1}, "at = -1 must be a count"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        scenarios.build("drift", options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clients": 11}, "clients = 11 is more than the number of clients, 10"),
        ({"at": 11}, "at = 11 is after the last of 10 rounds"),
        ({"how": "schedule", "changes": [[0, 10, "text"]]}, "names client 10, and the clients are 0 to 9"),
        ({"how": "schedule", "changes": [[10, 0, "text"]]}, "names round 10, and the rounds are 0 to 9"),
        ({"how": "schedule", "changes": [[1, 0, "text"], [1, 0, "image"]]}, "a client twice in one round"),
    ],
)
def test_numbers_that_do_not_suit_the_run_are_refused(options: dict[str, Any], message: str) -> None:
    scenario = scenarios.build("drift", options)
    with pytest.raises(DataError, match=message):
        draw(SAMPLES, partitions.build("iid", {}), scenario, 10, 1, 0, 10)


@pytest.mark.parametrize("damaged", ["[]", '{"rounds": 2}', "no", '{"rounds": 1, "changes": [[1, 2]]}', "[" * 100_000])
def test_a_damaged_schedule_is_no_schedule(damaged: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Schedule.of_json(damaged)


def test_a_constant_schedule_trains_the_static_scenario(
    write_experiment: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients that never see one modality train as in `cross`, bit for bit; clients that lose it later do not."""
    monkeypatch.chdir(tmp_path)
    file = write_experiment(rounds=2)
    task = ("task.name=pocket-memes", "task.n=24", "task.test=8")
    settings = [part for setting in task for part in ("--set", setting)]
    cross = run("run", file, *settings, "--set", "scenario.name=cross", "--out", "cross")
    has = {row["client"]: "image" if row["image"] else "text" for row in cross["per_client"]}

    def drifting(kind: str, first: int) -> dict[str, Any]:
        changes = ", ".join(f'[{first}, {client}, "{modality}"]' for client, modality in has.items())
        scenario = ("scenario.name=drift", 'scenario.how="schedule"', f"scenario.changes=[{changes}]")
        return run(*kind.split(), file, *settings, *(p for s in scenario for p in ("--set", s)), "--out", f"{kind}-{first}")

    static, later = drifting("run", 0), drifting("run", 1)
    assert static["adapter_sha256"] == cross["adapter_sha256"]
    assert later["adapter_sha256"] != cross["adapter_sha256"]
    assert static["modalities"]["drawn"] == cross["modalities"]["drawn"]
    alone = drifting("baseline local", 1)
    assert alone["modalities"] == later["modalities"]
