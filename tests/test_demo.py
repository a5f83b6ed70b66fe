"""What the demo promises, on three seeds. Minutes each: `make test-all`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_federated_beats_zero_shot_and_clients_alone(seed: int, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "demo.py"), "--seed", str(seed), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    score = {}
    for kind in ("zero-shot", "local", "federated"):
        both = json.loads((tmp_path / f"quickstart-{kind}-seed{seed}" / "result.json").read_text())["metrics"]["both"]
        low, high = both["accuracy_ci"]
        assert low < both["accuracy"] < high
        assert f"{100 * both['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]" in done.stdout
        score[kind] = 100 * both["accuracy"]
    assert score["federated"] >= score["zero-shot"] + 15
    assert score["federated"] >= score["local"] + 3
