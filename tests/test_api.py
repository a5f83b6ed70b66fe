"""The Python API, and the notebook of docs/api.md."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedmllm
from commands import call, run
from fedmllm import api
from fedmllm.errors import ConfigError, RunError
from made_runs import make_run

Write = Callable[..., Path]
ROOT = Path(__file__).parents[1]
PAGE, NOTEBOOK = ROOT / "docs" / "api.md", ROOT / "examples" / "quickstart.ipynb"


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its code is that of the page, so that one of them has to be executed."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert ["".join(cell["source"]) + "\n" for cell in code] == blocks
    assert [cell["outputs"] for cell in code] == [[]] * len(blocks), "its output is cleared"
    for block in blocks:
        exec(block, names)
    shown = capsys.readouterr().out
    assert "points above the untrained model" in shown
    assert (tmp_path / "runs" / "quickstart-federated-seed0" / "result.json").is_file()


def test_overrides_are_nested_or_dotted(write_experiment: Write) -> None:
    file = write_experiment()
    nested = fedmllm.load(file, seed=3, train={"rounds": 5, "lr": 0.1})
    assert (nested.seed, nested.train.rounds, nested.train.lr) == (3, 5, 0.1)
    assert nested == fedmllm.load(file, **{"seed": 3, "train.rounds": 5, "train.lr": 0.1})
    assert fedmllm.load(file, scenario={"name": "cross"}).scenario.options == {"image_clients": 0.5}
    with pytest.raises(ConfigError, match="did you mean 'rounds'"):
        fedmllm.load(file, **{"train.round": 5})


def test_a_run_is_that_of_the_command_line(write_experiment: Write, tmp_path: Path) -> None:
    file = write_experiment(rounds=1)
    result = fedmllm.run(fedmllm.load(file), out=tmp_path / "api")
    assert result.json["adapter_sha256"] == run("run", file, "--out", tmp_path / "cli")["adapter_sha256"]
    assert result.path == tmp_path / "api"
    with pytest.raises(RunError, match="is not empty"):
        fedmllm.run(fedmllm.load(file), out=tmp_path / "api")
    again = fedmllm.run(fedmllm.load(file), out=tmp_path / "api", resume=True)
    assert again.metrics == result.metrics


def test_a_run_reports_its_progress(write_experiment: Write, tmp_path: Path) -> None:
    stages = []
    fedmllm.run(
        fedmllm.load(write_experiment(rounds=1)), "zero-shot", tmp_path / "run", progress=lambda *at: stages.append(at[0])
    )
    assert "loading the model" in stages


def test_the_quickstart_ships_with_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert fedmllm.load("quickstart").name == "quickstart"
    assert run("partition", "quickstart", "--set", "task.train_samples=40")["clients"]
    (tmp_path / "quickstart").write_text("x = 1")
    assert "unknown key" in call("check", "quickstart").stderr, "a file of that name comes first"


def test_what_is_public() -> None:
    assert set(fedmllm.__all__) == {"Model", "Result", "__version__", "load", "run"}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fedmllm.nothing  # noqa: B018


# Data frames


def a_result(folder: Path) -> fedmllm.Result:
    """A made run of two rounds, of which the second was scored."""
    make_run(folder / "run", {"both": 0.5, "text": 0.25}, seed=3)
    path = folder / "run" / "result.json"
    changed = json.loads(path.read_text())
    changed["metrics"]["both"]["accuracy_ci"] = [0.35, 0.65]
    changed["transfer"] = {"other": {"primary_metric": "auc", "metrics": {"both": {"auc": 0.75, "n": 8}}}}
    path.write_text(json.dumps(changed))
    record = {
        "round": 0,
        "lr": 0.1,
        "sampled": [0, 1],
        "refused": [],
        "loss": 0.5,
        "bytes_up": {"adapter": 7},
        "bytes_down": {},
    }
    scored = {**record, "round": 1, "loss": 0.25, "metrics": {"both": {"accuracy": 0.5, "accuracy_ci": [0.4, 0.6]}}}
    (folder / "run" / "rounds.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (record, scored)))
    return fedmllm.Result(folder / "run", changed)


def test_metrics_as_a_frame(tmp_path: Path) -> None:
    pd = pytest.importorskip("pandas")
    result = a_result(tmp_path)
    frame = result.to_pandas()
    assert list(frame.columns) == "run kind scenario algorithm seed task pattern metric value low high n".split()
    assert set(frame.run) == {"run"}
    assert set(frame.seed) == {3}
    by_metric = frame.set_index(["task", "pattern", "metric"])
    assert by_metric.loc[("jsonl", "both", "accuracy"), ["value", "low", "high", "n"]].tolist() == [0.5, 0.35, 0.65, 40]
    assert by_metric.loc[("jsonl", "text", "accuracy"), "value"] == 0.25
    value, low, high, n = by_metric.loc[("other", "both", "auc"), ["value", "low", "high", "n"]]
    assert (value, math.isnan(low), math.isnan(high), n) == (0.75, True, True, 8)
    assert not {"n", "accuracy_ci"} & set(frame.metric)
    assert len(pd.concat([frame, frame])) == 2 * len(frame)


def test_rounds_as_a_frame(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    result = a_result(tmp_path)
    frame = result.to_pandas("rounds")
    assert frame["round"].tolist() == [1, 2]
    assert frame["train/loss"].tolist() == [0.5, 0.25]
    assert frame["bytes/up"].tolist() == [7, 7]
    assert [math.isnan(score) for score in frame["eval/both/accuracy"]] == [True, False]
    (result.path / "rounds.jsonl").unlink()
    empty = result.to_pandas("rounds")
    assert (list(empty.columns), len(empty)) == (["run", "round"], 0), "a run without rounds, such as zero-shot"


def test_a_frame_needs_pandas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"to_pandas: there is no frame 'round'; did you mean 'rounds'\?"):
        fedmllm.Result(tmp_path, {}).to_pandas("round")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r'pandas is not installed; run pip install "fedmllm\[pandas\]"'):
        fedmllm.Result(tmp_path, {}).to_pandas()
