"""The task `hub` on folders as the `datasets` library writes them; nothing is downloaded."""

from __future__ import annotations

import builtins
import io
import json
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from commands import run
from fedmllm.data.images import StoredPicture, decode, image_key, upright_size
from fedmllm.data.loading import read_split
from fedmllm.data.samples import Loaded, Split
from fedmllm.data.tasks import tasks
from fedmllm.errors import ConfigError, DataError
from helpers import load_samples, png

FEATURES = datasets.Features(
    {
        "pic": datasets.Image(),
        "ask": datasets.Value("string"),
        "reply": datasets.ClassLabel(names=["cat", "dog", "bird"]),
        "options": datasets.List(datasets.Value("string")),
        "right": datasets.Value("int64"),
        "caption": datasets.Value("string"),
        "key": datasets.Value("int64"),
        "site": datasets.ClassLabel(names=["north", "south"]),
        "path": datasets.Value("string"),
    }
)
MAP = {"image": "pic", "question": "ask", "answer": "reply", "text": "caption", "id": "key"}


def rows(first: int, count: int, **changes: Any) -> list[dict[str, Any]]:
    return [
        {
            "pic": {"bytes": png((i, 0, 0)), "path": None},
            "ask": f"what is no. {i}?",
            "reply": i % 3,
            "options": ["two", "one", "none"],
            "right": i % 3,
            "caption": f"caption {i}",
            "key": i,
            "site": i % 2,
            "path": "a.png",
            **changes,
        }
        for i in range(first, first + count)
    ]


@pytest.fixture(autouse=True)
def _library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a folder like a repository on the hub: Parquet files in `data/`."""

    def write(**changes: Any) -> Path:
        path = tmp_path / "pets"
        for split, (first, count) in {"train": (0, 9), "test": (9, 4)}.items():
            (path / "data").mkdir(parents=True, exist_ok=True)
            dataset = datasets.Dataset.from_list(rows(first, count, **changes), features=FEATURES)
            dataset.to_parquet(path / "data" / f"{split}-00000-of-00001.parquet")
        return path

    return write


def load(path: Path, split: Split = "train", on_bad_sample: Any = "error", **options: Any) -> Loaded:
    return load_samples(tasks.build("hub", {"dataset": str(path), **options}), split, on_bad_sample)


def test_columns_become_parts_of_a_sample(folder: Callable[..., Path]) -> None:
    path = folder()
    samples = load(path, **MAP, label="site", source="site").samples
    assert [s.id for s in samples] == [str(i) for i in range(9)]
    sample = samples[1]
    assert (sample.question, sample.text) == ("what is no. 1?", "caption 1")
    assert isinstance(sample.image, StoredPicture)
    assert sample.image.read() == png((1, 0, 0))
    assert (sample.answer, sample.choices, sample.lettered) == ("dog", ("cat", "dog", "bird"), True)
    assert (sample.label, sample.source, sample.where) == ("south", "south", f"{path}, split 'train', row 1")
    assert [s.id for s in load(path, "test", **MAP).samples] == ["10", "11", "12", "9"]


def test_pictures_stay_on_disk_and_equal_ones_compare_equal(folder: Callable[..., Path]) -> None:
    picture = io.BytesIO()
    Image.effect_noise((200, 200), 90).convert("RGB").save(picture, "PNG")
    path = folder(pic={"bytes": picture.getvalue(), "path": None})
    load(path, **MAP)  # the library imports and caches
    tracemalloc.start()
    samples = load(path, **MAP).samples
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < len(picture.getvalue())
    first, second = samples[0].image, samples[1].image
    assert isinstance(first, StoredPicture)
    assert first == second
    assert image_key(first) == image_key(picture.getvalue())
    assert decode(first).tobytes() == decode(picture.getvalue()).tobytes()
    assert upright_size(first) == (200, 200)


def test_optional_columns_may_be_absent(folder: Callable[..., Path]) -> None:
    samples = load(folder(), answer="caption", ask="what is it?").samples
    assert (samples[3].id, samples[3].question, samples[3].answer) == ("pets/train/000003", "what is it?", "caption 3")
    assert (samples[3].modalities, samples[3].choices, samples[3].label) == (frozenset(), None, "caption 3")


def test_names_and_choices_with_spaces_around_are_cleaned(tmp_path: Path) -> None:
    features = datasets.Features(
        {"reply": datasets.ClassLabel(names=["cat ", " dog", "bi  rd"]), "options": datasets.List(datasets.Value("string")),
         "right": datasets.Value("int64"), "word": datasets.Value("string")}
    )  # fmt: skip
    lines = [{"reply": i, "options": [" one", "two\n"], "right": i % 2, "word": ["one", " two", "one "][i]} for i in range(3)]
    splits = {split: datasets.Dataset.from_list(lines, features=features) for split in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    for options, choices, answers in (
        ({"answer": "reply"}, ("cat", "dog", "bi  rd"), ["cat", "dog", "bi  rd"]),
        ({"answer": "right", "choices": "options", "answer_is_index": True}, ("one", "two"), ["one", "two", "one"]),
        ({"answer": "word", "choices": "options"}, ("one", "two"), ["one", "two", "one"]),
        ({"answer": "word", "choices": ["two ", " one"]}, ("two", "one"), ["one", "two", "one"]),
    ):
        samples = load(tmp_path / "saved", ask="which?", **options).samples  # type: ignore[arg-type]
        assert [s.answer for s in samples] == [s.label for s in samples] == answers
        assert {s.choices for s in samples} == {choices}
    task = tasks.build("hub", {"dataset": "a", "metric": "auc", "positive": " cat"})
    assert task.positive == "cat"
    features["reply"] = datasets.ClassLabel(names=["cat", "cat ", "dog"])
    splits = {split: datasets.Dataset.from_list(lines, features=features) for split in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "twice")
    with pytest.raises(DataError, match=r"split 'train', row 0, id 'twice/train/000000': the choice 'cat' occurs twice"):
        load(tmp_path / "twice", answer="reply", ask="which?")


@pytest.mark.parametrize(
    ("dataset", "subset", "first"),
    [
        ("owner/pets", None, "owner/pets/train/000000"),
        ("other/pets", None, "other/pets/train/000000"),
        ("owner/pets", "small", "owner/pets/small/train/000000"),
        ("pets", None, "pets/train/000000"),
        ("data/pets", None, "pets/train/000000"),
        ("data/../data/pets", "small", "pets/small/train/000000"),
    ],
)
def test_ids_carry_owner_and_subset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: str, subset: str | None, first: str
) -> None:
    (tmp_path / "data" / "pets").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    table = datasets.Dataset.from_list(rows(0, 2), features=FEATURES)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    options = {"dataset": dataset, "answer": "reply", "question": "ask", **({"subset": subset} if subset else {})}
    assert read_split(tasks.build("hub", options), "train").samples[0].id == first


def test_choices_come_from_a_column_or_are_given(folder: Callable[..., Path]) -> None:
    path = folder()
    given = load(path, answer="reply", choices=["cat", "dog", "bird", "fish"]).samples[1]
    assert (given.answer, given.choices) == ("dog", ("cat", "dog", "bird", "fish"))
    indexed = load(path, answer="right", choices="options", answer_is_index=True).samples[1]
    assert (indexed.answer, indexed.choices) == ("one", ("two", "one", "none"))
    bare = load(path, answer="reply", question="ask", lettered=False).samples[1]
    assert (bare.choices, bare.lettered) == (("cat", "dog", "bird"), False)


def test_a_folder_of_save_to_disk_can_be_read(tmp_path: Path) -> None:
    splits = {split: datasets.Dataset.from_list(rows(0, 3), features=FEATURES) for split in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert len(load(tmp_path / "saved", **MAP).samples) == 3
    splits["train"].save_to_disk(tmp_path / "alone")
    with pytest.raises(DataError, match="is a single split; save a DatasetDict"):
        load(tmp_path / "alone", **MAP)


def test_an_image_folder_is_read_by_its_paths(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "pets" / split / name).mkdir(parents=True)
            (tmp_path / "pets" / split / name / f"{split}.png").write_bytes(png())
    samples = load(tmp_path / "pets", image="image", answer="label").samples
    assert [(s.answer, s.choices) for s in samples] == [("cat", ("cat", "dog")), ("dog", ("cat", "dog"))]
    assert samples[0].image == tmp_path / "pets" / "train" / "cat" / "train.png"


@pytest.mark.parametrize(
    ("changes", "options", "message", "kind"),
    [
        ({"path": "no.png"}, {"image": "path"}, "pets/no.png is missing", "missing picture"),
        ({"path": "../a.png"}, {"image": "path"}, "the path '../a.png' leads out of", "path outside the folder"),
        ({"path": "/etc/hostname"}, {"image": "path"}, "'/etc/hostname' leads out of", "path outside the folder"),
        ({"pic": {"bytes": None, "path": "/etc/hostname"}}, {"image": "pic"}, "leads out of", "path outside the folder"),
        ({"pic": {"bytes": b"no picture", "path": None}}, {"image": "pic"}, "cannot be decoded", "undecodable picture"),
        ({}, {"image": "right"}, "the picture is of type int, neither bytes nor a path", "wrong value"),
        ({}, {"image": "options"}, "picture 1 of 3: the picture", "missing picture"),
        ({"reply": None}, {}, "'answer' is missing", "wrong value"),
        ({"reply": -1}, {}, "'answer' is missing", "wrong value"),
        ({"right": 3}, {"answer": "right", "choices": "options", "answer_is_index": True}, "not an index into", "wrong value"),
        ({"options": ["one"]}, {"choices": "options"}, "the choices must be a list of at least two texts", "wrong value"),
        ({"options": ["one", "one"]}, {"choices": "options"}, "must not contain the same text twice", "wrong value"),
        ({"options": ["one", "two"]}, {"choices": "options"}, "is not among the choices", "answer not among the choices"),
        ({"key": 7}, {"id": "key"}, "the id '7' is used twice", "duplicate id"),
        ({}, {"answer": "caption"}, "there is no question: set task.question to a column", "wrong value"),
    ],
)  # fmt: skip
def test_bad_rows_are_bad_samples(
    folder: Callable[..., Path], changes: dict[str, Any], options: dict[str, Any], message: str, kind: str
) -> None:
    path = folder(**changes)
    with pytest.raises(DataError) as caught:
        load(path, **{"answer": "reply", **options})
    assert f"{path}, split 'train', row {1 if 'key' in changes else 0}" in str(caught.value)
    assert message in str(caught.value)
    loaded = read_split(tasks.build("hub", {"dataset": str(path), "answer": "reply", **options}), "train")
    assert {p.kind for p in loaded.problems} == {kind}


def test_a_sample_has_the_pictures_of_a_list_or_of_several_columns(tmp_path: Path) -> None:
    pixels = [png((level, 0, 0)) for level in range(4)]
    stored = [{"bytes": content, "path": None} for content in pixels]
    lines = [
        {"scans": stored[:2], "first": stored[3], "second": stored[1]},
        {"scans": stored[2:3], "first": stored[2], "second": None},
        {"scans": [], "first": None, "second": None},
        {"scans": None, "first": None, "second": stored[0]},
    ]
    features = datasets.Features(
        {"scans": datasets.List(datasets.Image()), "first": datasets.Image(), "second": datasets.Image()}
    )
    splits = {split: datasets.Dataset.from_list(lines, features=features) for split in ("train", "test")}
    splits = {split: dataset.add_column("reply", ["yes"] * 4) for split, dataset in splits.items()}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    columns: dict[tuple[str, ...], dict[str, Any]] = {
        ("01", "2", "", ""): {"images": "scans"},
        ("31", "2", "", "0"): {"images": ["first", "second"]},
        ("13", "2", "", "0"): {"images": ["second", "first"]},
        ("301", "22", "", ""): {"images": ["first", "scans"]},
    }
    for expected, options in columns.items():
        samples = load(tmp_path / "saved", answer="reply", ask="what?", **options).samples
        shown = [[p.read() for p in s.pictures if isinstance(p, StoredPicture)] for s in samples]
        assert shown == [[pixels[int(digit)] for digit in digits] for digits in expected]
        assert [isinstance(s.image, tuple) for s in samples] == [len(digits) > 1 for digits in expected]
    in_list, alone = (load(tmp_path / "saved", answer="reply", ask="what?", image=c).samples[1] for c in ("scans", "first"))
    assert in_list == alone, "a list of one picture is that picture"
    with pytest.raises(ConfigError, match=r"^task\.images: '.*saved' has no column 'scan'; did you mean 'scans'\?$"):
        load(tmp_path / "saved", answer="reply", images=["first", "scan"])
    with pytest.raises(ConfigError, match="image and images both name columns of pictures; set one of them"):
        load(tmp_path / "saved", answer="reply", image="first", images="scans")


def test_an_unknown_column_gets_a_suggestion(folder: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"^task\.text: '.*pets' has no column 'captoin'; did you mean 'caption'\?$"):
        load(folder(), answer="reply", text="captoin")


def test_a_data_set_that_cannot_be_loaded_is_one_sentence(folder: Callable[..., Path], tmp_path: Path) -> None:
    for path, split in ((tmp_path / "nowhere", "train"), (folder(), "validation")):
        with pytest.raises(DataError, match=f"^task 'hub': the split '{split}' of '{path}' cannot be loaded") as caught:
            load(path, answer="reply", train_split=split)
        assert "\n" not in str(caught.value)


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r'install it with pip install "fedmllm\[hub\]"\.$'):
        load(Path("anything"))


def test_the_library_is_imported_only_when_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        assert name.partition(".")[0] != "datasets"
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    tasks.build("hub", {"dataset": "some/name"})


def test_auc_needs_the_positive_answer_and_a_task_may_lack_a_test_split() -> None:
    with pytest.raises(ConfigError, match="positive"):
        tasks.build("hub", {"dataset": "a", "metric": "auc"})
    assert tasks.build("hub", {"dataset": "a", "test_split": ""}).splits == ("train",)


def test_a_run_on_a_folder_of_the_hub(
    folder: Callable[..., Path], write_experiment: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    data = folder()
    options = [f"task.{key}={json.dumps(value)}" for key, value in {**MAP, "dataset": str(data)}.items()]
    sets = [word for option in ["task.name=hub", *options] for word in ("--set", option)]
    file = write_experiment(rounds=2)
    assert run("check", file, *sets)["splits"]["train"]["classes"] == {"bird": 3, "cat": 3, "dog": 3}
    assert run("run", file, *sets)["metrics"]["both"]["n"] == 4


def test_pictures_are_not_decoded_by_the_library(folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *_, **__: pytest.fail("decoded"))
    (first, *_) = load(folder(), **MAP).samples
    assert isinstance(first.image, StoredPicture)
    assert first.image.read() == png((0, 0, 0))
