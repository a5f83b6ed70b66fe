"""`check` and whole runs on every published layout, through the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from commands import call, run
from fedmllm import config
from fedmllm.experiment.parts import build
from layouts import LAYOUTS

Write = Callable[..., Path]
TESTED = {"vqa-rad": ["both", "image"], "slake": ["both", "image"], "medalpaca": ["both", "text"]}
"""The patterns that the test samples have, if not all."""


@pytest.fixture
def experiment(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A function that creates the folder of a layout and writes a small experiment that uses it."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, task: str = "", companion: str = "", scenario: str = "aligned", split: str = "test") -> Path:
        lines = [f'[task]\nname = "{name}"\ndata_dir = "data/{name}"\n{task}']
        for layout in filter(None, (name, companion)):
            folder = tmp_path / "data" / layout
            if not folder.exists():
                folder.mkdir(parents=True)
                LAYOUTS[layout](folder)
        if companion:
            lines.append(f'[task.companion]\nname = "{companion}"\ndata_dir = "data/{companion}"\n')
        path = tmp_path / f"{name}.toml"
        path.write_text(
            f'name = "{name}"\n'
            + "\n".join(lines)
            + f'[partition]\nname = "dirichlet"\nclients = 3\nalpha = 1.0\n[scenario]\nname = "{scenario}"\n'
            f'[model]\nname = "{tiny}"\nprecision = "fp32"\n[model.lora]\nrank = 2\nalpha = 4\n'
            "[train]\nrounds = 2\nclients_per_round = 2\nbatch_size = 4\n"
            f'[eval]\nsplit = "{split}"\npatterns = {json.dumps(TESTED.get(name, ["both", "image", "text"]))}\n'
            "max_new_tokens = 3\n"
        )
        return path

    return write


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "medalpaca"])
def test_every_layout_checks_and_runs(experiment: Write, name: str) -> None:
    file = experiment(name)
    report = run("check", file)
    result = run("run", file)
    assert result["task"] == name
    assert report["manifest_digest"] == result["manifest_digest"]
    assert report["train_samples"] == report["splits"]["train"]["samples"]
    assert report["test_samples"] == report["splits"]["test"]["samples"] == result["metrics"]["both"]["n"]
    metric = {"hateful-memes": "auc", "crisismmd": "macro_f1"}.get(name, "accuracy")
    assert result["primary_metric"] == metric
    assert metric in result["metrics"]["both"]


def test_open_and_closed_questions_are_as_published(experiment: Write) -> None:
    result = run("run", experiment("vqa-rad"))
    lines = Path("runs/vqa-rad-federated-seed0/predictions.jsonl").read_text().splitlines()
    closed = {p["id"]: p["closed"] for p in map(json.loads, lines)}
    assert closed == {f"vqa-rad/{i}": i % 2 == 0 for i in range(8, 14)}, "10 has no choices and is closed nevertheless"
    assert {"accuracy", "accuracy_open", "accuracy_closed", "token_f1_open"} <= result["metrics"]["both"].keys()


def test_medalpaca_is_the_text_only_companion_of_vqa_rad(experiment: Write) -> None:
    file = experiment("vqa-rad", companion="medalpaca", scenario="cross")
    splits = run("check", file)["splits"]
    assert splits["train"]["modalities"] == {"both": 0, "image": 8, "text": 6, "none": 0}
    assert splits["test"]["modalities"] == {"both": 0, "image": 6, "text": 0, "none": 0}
    assert run("run", file)["metrics"]["both"]["n"] == 6


def test_medalpaca_alone_has_no_test_split(experiment: Write) -> None:
    refused = call("check", experiment("medalpaca"))
    assert refused.exit_code == 2
    assert refused.stderr == (
        "error: task.name: 'medalpaca' has no test split; use it as the task.companion of another task, or set eval.split = "
        '"validation".\n'
    )
    assert run("check", experiment("medalpaca", split="validation"))["test_samples"] == 1


def test_check_counts_classes_and_modalities(experiment: Write) -> None:
    file = experiment("crisismmd")
    assert run("check", file)["splits"]["train"] == {
        "samples": 8,
        "classes": dict.fromkeys(
            ["affected individuals", "not humanitarian", "other relevant information", "vehicle damage"], 2
        ),
        "modalities": {"both": 8, "image": 0, "text": 0, "none": 0},
        "bad_samples": {},
        "majority": {"answer": "affected individuals", "share": 0.25},
        "stretched": 0,
    }
    lines = call("check", file).stdout.splitlines()
    assert lines[0] == "train: 8 samples, 8 with image and text"
    assert lines[1] == (
        "  classes (4): affected individuals 2, not humanitarian 2, other relevant information 2, vehicle damage 2"
    )
    assert lines[2] == "  most frequent answer: 'affected individuals', that of 25.0 % of the samples"
    assert lines[3] == "test: 4 samples, 4 with image and text"
    assert lines[6].startswith(f"{file} is valid: 8 training samples, 4 test samples,")


def damage_data(data: Path) -> None:
    """Remove two images and truncate one in the training data; add a line that is not JSON to the test data."""
    for number in (40001, 40003):
        (data / "img" / f"{number}.png").unlink()
    path = data / "img" / "40002.png"
    path.write_bytes(path.read_bytes()[:30])
    with (data / "test_seen.jsonl").open("a") as file:
        file.write('{"id"\n')


def test_check_counts_all_problems_before_it_fails(experiment: Write, tmp_path: Path) -> None:
    file = experiment("hateful-memes")
    damage_data(tmp_path / "data" / "hateful-memes")
    refused = call("check", file)
    assert refused.exit_code == 2
    assert refused.stdout.splitlines() == [
        "train: 5 samples, 5 with image and text",
        "  classes (2): not hateful 3, hateful 2",
        "  most frequent answer: 'not hateful', that of 60.0 % of the samples",
        "  bad samples (3): missing picture 2, undecodable picture 1",
        "test: 4 samples, 4 with image and text",
        "  classes (2): hateful 2, not hateful 2",
        "  most frequent answer: 'hateful', that of 50.0 % of the samples",
        "  bad samples (1): unreadable entry 1",
    ]
    assert refused.stderr.startswith(
        "error: 3 bad samples, the first: data/hateful-memes/train.jsonl, line 1, id 'hateful-memes/40001': the picture "
        "data/hateful-memes/img/40001.png is missing; fix it"
    )
    as_json = call("check", file, "--json")
    assert as_json.exit_code == 2
    splits = json.loads(as_json.stdout)["splits"]
    assert [splits[split]["bad_samples"] for split in ("train", "test")] == [
        {"missing picture": 2, "undecodable picture": 1},
        {"unreadable entry": 1},
    ]


def test_skipped_samples_are_counted_in_check_and_run(experiment: Write, tmp_path: Path) -> None:
    file = experiment("hateful-memes", 'on_bad_sample = "skip"\n')
    damage_data(tmp_path / "data" / "hateful-memes")
    assert run("check", file)["skipped_samples"] == 4
    result = run("run", file)
    assert result["skipped_samples"] == 4
    assert result["metrics"]["both"]["n"] == 4


def test_a_long_list_of_classes_is_shortened_only_in_the_text(experiment: Write, tmp_path: Path) -> None:
    file = experiment("vqa-rad")
    path = tmp_path / "data" / "vqa-rad" / "VQA_RAD Dataset Public.json"
    entries = json.loads(path.read_text())
    for number, entry in enumerate(entries):
        entry["question_type"] = f"type {number}"
    path.write_text(json.dumps(entries))
    assert "  classes (8): TYPE 0 1, TYPE 1 1, TYPE 2 1, TYPE 3 1, TYPE 4 1, and 3 more" in call("check", file).stdout
    assert len(run("check", file)["splits"]["train"]["classes"]) == 8


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "medalpaca"])
def test_the_manifest_does_not_depend_on_the_order_in_the_files(experiment: Write, tmp_path: Path, name: str) -> None:
    file = experiment(name)
    before = build(config.validate(config.read(file))).prepare().manifest.digest()
    for path in (tmp_path / "data" / name).rglob("*.*"):
        content = path.read_text("utf-8") if path.suffix in (".json", ".jsonl", ".tsv") else ""
        if path.suffix == ".json":
            path.write_text(json.dumps(json.loads(content)[::-1]))
        elif content:
            head = 1 if path.suffix == ".tsv" else 0
            lines = content.splitlines()
            path.write_text("\n".join(lines[:head] + lines[head:][::-1]) + "\n", "utf-8")
    assert build(config.validate(config.read(file))).prepare().manifest.digest() == before


def test_unusual_picture_formats_work_in_a_run(experiment: Write, tmp_path: Path) -> None:
    file = experiment("hateful-memes")
    folder = tmp_path / "data" / "hateful-memes" / "img"
    red = Image.new("RGB", (16, 16), (200, 0, 0))
    red.convert("CMYK").save(folder / "40001.png", "JPEG")
    red.convert("P").save(folder / "40002.png", "PNG", transparency=0)
    red.save(folder / "40003.png", "GIF", save_all=True, append_images=[Image.new("RGB", (16, 16))])
    exif = Image.Exif()
    exif[0x0112] = 6
    red.resize((40, 8)).save(folder / "40004.png", "JPEG", exif=exif)
    red.convert("RGBA").save(folder / "40005.png", "WEBP")
    Image.new("1", (2500, 2500)).save(folder / "40006.png", "PNG")
    assert run("run", file)["skipped_samples"] == 0
