"""The benchmark of the fleets gives all of them the same work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fleets
from federations import write_samples
from fedmllm.config import apply_overrides, read, validate
from fedmllm.experiment import options_of, prepare, with_defaults


def test_whoever_trains_holds_what_a_site_holds(tmp_path: Path) -> None:
    counts = {"east": 9, "north": 6, "south": 3}
    for name, count in counts.items():
        write_samples(tmp_path / name, "train", count)
    write_samples(tmp_path / "server", "test", 6)
    text = (fleets.ROOT / "examples" / "hospitals" / "experiment.toml").read_text()
    file = tmp_path / "server" / "experiment.toml"
    file.write_text(text)
    fleets.gather(tmp_path)
    raw, _ = apply_overrides(read(file), ["fleet.name=in-process", *fleets.settings(tmp_path, 2)], options_of)
    data = prepare(with_defaults(validate(raw)))
    held = [{h.sample_id.rsplit("-", 2)[0] for h in data.manifest.of_client(client)} for client in range(3)]
    assert held == [{name} for name in fleets.ORDER]
    assert [len(list(data.manifest.of_client(client))) for client in range(3)] == list(counts.values())


def test_the_first_round_is_apart(tmp_path: Path) -> None:
    (tmp_path / "rounds.jsonl").write_text("".join(json.dumps({"seconds": s}) + "\n" for s in (9.0, 2.0, 3.0, 7.0)))
    assert fleets.seconds(tmp_path) == pytest.approx((9.0, 3.0))
