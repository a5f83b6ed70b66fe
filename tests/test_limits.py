"""What the model cannot take is a bad sample: a text over the limit, a picture that its processor refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from commands import call, run
from fedmllm.config import LoraTable, ModelTable
from fedmllm.data.files import EntryError
from fedmllm.data.prompts import Conversation
from fedmllm.errors import DataError
from fedmllm.models import processors
from fedmllm.models.mllm import MLLM
from fedmllm.storage.run_dir import RunDir
from tiny_families import save

Write = Callable[..., Path]
LIMIT = "train.max_length=300"


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def changed(dataset: Path) -> Callable[..., list[str]]:
    """A function that writes the data set with some lines changed and gives the settings for it."""

    def write(train: dict[str, dict[str, Any]] | None = None, test: dict[str, dict[str, Any]] | None = None) -> list[str]:
        folder = Path("changed").absolute()
        shutil.copytree(dataset, folder, dirs_exist_ok=True)
        Image.new("RGB", (1200, 4)).save(folder / "strip.png")
        for split, changes in (("train", train or {}), ("test", test or {})):
            lines = [json.loads(line) for line in (dataset / f"{split}.jsonl").read_text().splitlines()]
            changed = [line | changes.get(line["id"], {}) for line in lines]
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))
        words = [f"task.train={folder}/train.jsonl", f"task.test={folder}/test.jsonl", LIMIT, "partition.name=iid"]
        return [part for word in (*words, "partition.clients=3", "scenario.name=aligned") for part in ("--set", word)]

    return write


SKIP = ["--set", "task.on_bad_sample=skip"]
LONG = "is it red? " * 150


@pytest.mark.parametrize(("split", "line"), [("train", 8), ("test", 8)])
def test_a_prompt_that_is_too_long_is_a_bad_sample(
    write_experiment: Write, changed: Callable[..., list[str]], split: str, line: int
) -> None:
    file, words = write_experiment(rounds=1), changed(**{split: {f"{split}-07": {"question": LONG}}})
    for command in ("check", "run"):
        refused = call(command, file, *words, "--set", "train.clients_per_round=3")
        assert refused.exit_code == 2
        assert f"changed/{split}.jsonl, line {line}, id '{split}-07': a prompt has " in refused.stderr
        assert "more than train.max_length = 300 (it begins " in refused.stderr
        assert refused.stderr.endswith('; fix it, or set task.on_bad_sample = "skip" to continue without it.\n')
    assert not Path("runs").exists()
    report = run("check", file, *words, *SKIP)
    assert report["skipped_samples"] == 1
    assert report["splits"][split]["bad_samples"] == {"prompt too long": 1}
    assert (
        f"{split}: bad samples that the model cannot take (1): prompt too long 1" in call("check", file, *words, *SKIP).stdout
    )
    result = run("baseline", "centralised", file, *words, *SKIP, "--out", "a")
    assert result["skipped_samples"] == 1
    assert result["metrics"]["both"]["n"] == (11 if split == "test" else 12)
    assert run("baseline", "zero-shot", file, *words, *SKIP, "--out", "b")["skipped_samples"] == (split == "test")


def test_a_test_sample_is_left_out_of_every_pattern(write_experiment: Write, changed: Callable[..., list[str]]) -> None:
    words = changed(test={"test-01": {"text": LONG}})
    result = run("baseline", "zero-shot", write_experiment(), *words, *SKIP, "--out", "a")
    whole = run("baseline", "zero-shot", write_experiment(), *changed(), "--out", "b")
    assert {pattern: whole["metrics"][pattern]["n"] - result["metrics"][pattern]["n"] for pattern in result["metrics"]} == {
        "both": 1, "image": 1, "text": 1,
    }  # fmt: skip
    lines = (RunDir(Path("a")).path / "predictions.jsonl").read_text().splitlines()
    assert "test-01" not in {json.loads(line)["id"] for line in lines}


def test_a_reference_is_not_measured_and_an_option_is(write_experiment: Write, changed: Callable[..., list[str]]) -> None:
    file = write_experiment()
    open_question = changed(test={"test-00": {"answer": LONG}})
    assert run("baseline", "zero-shot", file, *open_question, "--out", "a")["metrics"]["both"]["n"] == 12
    closed = changed(test={"test-01": {"choices": ["red", "blue", "green", LONG]}})
    assert "id 'test-01': a prompt has " in call("check", file, *closed).stderr
    trained = changed(train={"train-00": {"answer": LONG}})
    assert "id 'train-00': a prompt has " in call("check", file, *trained).stderr


def test_a_client_that_would_keep_no_sample_is_named(write_experiment: Write, changed: Callable[..., list[str]]) -> None:
    every = {f"train-{i:02d}": {"question": LONG} for i in range(30)}
    words = changed(train=every)
    for policy in ([], SKIP):
        refused = call("run", write_experiment(), *words, *policy)
        assert refused.exit_code == 2
        assert "the model can use none of the 10 samples of client " in refused.stderr
        assert "train.jsonl, line " in refused.stderr
        assert "task.on_bad_sample" not in refused.stderr, "skipping would leave nothing"
    words = changed(test={f"test-{i:02d}": {"question": LONG} for i in range(12)})
    refused = call("check", write_experiment(), *words, *SKIP)
    assert "error: the model can be asked about no test sample of task 'jsonl'; the first problem: " in refused.stderr


# Pictures


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny checkpoint of a family whose processor refuses pictures of more than 1:200."""
    folder = tmp_path_factory.mktemp("qwen")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processors, "is_torchvision_available", lambda: False)
        save("qwen2_vl", folder)
        yield folder


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_picture_that_the_processor_refuses_is_a_bad_sample(
    write_experiment: Write, changed: Callable[..., list[str]], qwen: Path, split: str
) -> None:
    words = [*changed(**{split: {f"{split}-05": {"image": "strip.png"}}}), "--set", f"model.name={qwen}"]
    file = write_experiment(rounds=1)
    refused = call("check", file, *words)
    assert refused.exit_code == 2
    assert f"changed/{split}.jsonl, line 6, id '{split}-05': the model's processor refuses a picture of 1200 × 4 pixels (" in (
        refused.stderr
    )
    report = run("check", file, *words, *SKIP)
    assert report["splits"][split]["bad_samples"] == {"picture the model refuses": 1}
    assert run("run", file, *words, *SKIP, "--set", "train.clients_per_round=3")["skipped_samples"] == 1


def test_a_refused_picture_of_another_client_does_not_stop_a_run(qwen: Path, dataset: Path) -> None:
    """A run encodes the pictures of all clients if those that take part hold most of the samples."""
    Image.new("RGB", (4, 1200)).save("strip.png")
    shown = Conversation("which color is it?", "red", image=True)
    settings = ModelTable(name=str(qwen), lora=LoraTable(rank=2), precision="fp32")
    model, other = MLLM.load(settings, seed=0), MLLM.load(settings, seed=0)
    (sample,) = model.encode([shown], [dataset / "red.png"], 300)
    model.register_pictures([[Path("strip.png").absolute()], [dataset / "blue.png"]])
    assert model.prepare_features() == 3
    (expected,) = other.encode([shown], [dataset / "red.png"], 300)
    other.prepare_features()
    with torch.no_grad():
        assert torch.equal(model.loss([sample]), other.loss([expected]))
    with pytest.raises(EntryError, match="refuses a picture of 4 × 1200 pixels"):
        model.encode([shown], [Path("strip.png").absolute()], 300)
    with pytest.raises(
        EntryError, match=r"refuses 2 pictures of 64 × 64 and 4 × 1200 pixels \(.*\); resize them or show fewer"
    ):
        model.encode([replace(shown, image=2)], [(dataset / "red.png", Path("strip.png").absolute())], 300)
    model.encode([replace(shown, image=0)], [Path("strip.png").absolute()], 300)


def test_the_model_names_the_limit_and_what_is_over_it(model: MLLM) -> None:
    talk = Conversation("name it.", "red " * 90, image=False, options=("red", "blue " * 120))
    alone = model.encode_one(talk, None, 400, asks=False)
    asked = model.encode_one(talk, None, 400, asks=True)
    assert alone.length == len(alone.prompt) + len(alone.answer)
    assert asked.answer == ()
    longest = max(map(len, asked.options))
    for asks, length in ((False, alone.length), (True, len(asked.prompt) + longest)):
        model.encode_one(talk, None, length, asks)
        with pytest.raises(
            DataError, match=f"a prompt has {length} tokens, more than train.max_length = {length - 1} "
        ) as caught:
            model.encode_one(talk, None, length - 1, asks)
        assert isinstance(caught.value, EntryError)
        assert caught.value.kind == "prompt too long"
