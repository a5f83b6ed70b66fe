"""The benchmark of fleets gives the same work to all of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fleets
from federations import write_samples
from fedmllm.config import read, validate
from fedmllm.experiment.parts import build
from helpers import apply_overrides


def test_clients_have_the_same_samples_in_one_process_and_at_sites(tmp_path: Path) -> None:
    for name, count in {"east": 9, "north": 9, "south": 3}.items():
        write_samples(tmp_path / name, "train", count)
        (tmp_path / name / "pictures").mkdir()
        (tmp_path / name / "site.toml").write_text("")
    write_samples(tmp_path / "server", "test", 6)
    text = (fleets.ROOT / "examples" / "hospitals" / "experiment.toml").read_text()
    file = tmp_path / "server" / "experiment.toml"
    file.write_text(text)
    fleets.divide(tmp_path)
    raw, _ = apply_overrides(read(file), ["fleet.name=in-process", *fleets.settings(tmp_path, 2)])
    manifest = build(validate(raw)).prepare().manifest
    for client, name in enumerate(fleets.ORDER):
        ids = [json.loads(line)["id"] for line in (tmp_path / name / "train.jsonl").read_text().splitlines()]
        assert [h.sample_id for h in manifest.of_client(client)] == sorted(ids)
    assert manifest.counts()[:, 0].tolist() == [9, 6, 3]


def test_the_first_round_is_reported_separately(tmp_path: Path) -> None:
    (tmp_path / "rounds.jsonl").write_text(
        "".join(json.dumps({"round": i, "seconds": s}) + "\n" for i, s in enumerate((9.0, 2.0, 3.0, 7.0)))
    )
    assert fleets.seconds(tmp_path) == pytest.approx((9.0, 3.0))
