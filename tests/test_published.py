"""Each published layout gives the right samples, and each damaged entry gives one bad sample."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedmllm.data.loading import read_split
from fedmllm.data.samples import Loaded, Sample, Split
from fedmllm.data.tasks import tasks
from fedmllm.data.tasks.crisismmd import CHOICES, without_urls
from fedmllm.errors import ConfigError, DataError
from helpers import load_samples
from layouts import (
    LAYOUTS,
    TSV_COLUMNS,
    picture,
    rad_entry,
    slake_entry,
    tweet,
    write_json,
    write_lines,
    write_table,
)

Folder = Callable[[str], Path]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """A function that creates the folder of a layout."""

    def make(name: str) -> Path:
        (tmp_path / name).mkdir()
        LAYOUTS[name](tmp_path / name)
        return tmp_path / name

    return make


def load(name: str, data_dir: Path, split: Split = "train", on_bad_sample: Any = "error", **options: Any) -> Loaded:
    return load_samples(tasks.build(name, {"data_dir": str(data_dir), **options}), split, on_bad_sample)


def by_id(loaded: Loaded) -> dict[str, Sample]:
    return {s.id: s for s in loaded.samples}


def test_hateful_memes(folder: Folder) -> None:
    data = folder("hateful-memes")
    samples = load("hateful-memes", data).samples
    assert [s.id for s in samples] == [f"hateful-memes/{40000 + i}" for i in range(1, 9)]
    assert samples[0] == Sample(
        id="hateful-memes/40001",
        question="is this meme hateful?",
        answer="hateful",
        image=data / "img" / "40001.png",
        text="look at number 40001",
        choices=("not hateful", "hateful"),
        lettered=True,
        label="hateful",
        source="hateful-memes",
        where=f"{data / 'train.jsonl'}, line 1",
    )
    assert samples[1].answer == "not hateful"
    assert len(load("hateful-memes", data, "test").samples) == 4
    assert len(load("hateful-memes", data, "test", test_set="dev_seen").samples) == 3
    task = tasks.build("hateful-memes", {"data_dir": str(data)})
    assert (task.metric, task.positive) == ("auc", "hateful")


def test_crisismmd(folder: Folder) -> None:
    data = folder("crisismmd")
    samples = load("crisismmd", data).samples
    name = "crisismmd_datasplit_all/task_humanitarian_text_img_train.tsv"
    assert samples[0] == Sample(
        id="crisismmd/917791044158185473_0",
        question="which kind of humanitarian information is this?",
        answer="affected individuals",  # the label of the image; that of the tweet differs
        image=data / "data_image" / "hurricane_irma" / "6_9_2017" / "0_0.jpg",
        text='RT @someone: "Water everywhere, no. 0',
        choices=CHOICES,
        lettered=True,
        label="affected individuals",
        source="hurricane_irma",
        where=f"{data / name}, line 2",
    )
    assert len(samples) == 8
    assert len(CHOICES) == 8
    assert {s.source for s in samples} == {"hurricane_irma", "mexico_earthquake"}
    assert len(load("crisismmd", data, "test").samples) == 4
    assert len(load("crisismmd", data, "test", test_set="dev").samples) == 2
    agreed = load("crisismmd", data, split_set="agreed").samples
    assert [s.image.name for s in agreed if isinstance(s.image, Path)] == [f"{100 + i}_0.jpg" for i in range(8)]


def test_without_an_image_label_the_label_of_the_tweet_is_used(folder: Folder) -> None:
    data = folder("crisismmd")
    path = data / "crisismmd_datasplit_all" / "task_humanitarian_text_img_train.tsv"
    write_table(path, [{**tweet(0), "label_image": ""}, tweet(4)])
    assert [s.answer for s in load("crisismmd", data).samples] == ["vehicle damage", "affected individuals"]
    write_table(path, [tweet(0)], [c for c in TSV_COLUMNS if c != "label_image"])
    assert [s.answer for s in load("crisismmd", data).samples] == ["vehicle damage"]


@pytest.mark.parametrize(
    ("tweet", "text"),
    [
        ("RT @a: help https://t.co/x1 now", "RT @a: help now"),
        ("HTTP://T.CO/A, and www.aid.org.", "and"),
        ("gonehttps://t.co/x?y=z#w pic.twitter.com/abc", "gone"),
        ("cut off https…", "cut off"),
        ("a https://t.co/…", "a"),
        ("https is a protocol; see  wwwhat", "https is a protocol; see wwwhat"),
        ("https://t.co/x", ""),
    ],
)
def test_urls_are_removed_from_tweets(tweet: str, text: str) -> None:
    assert without_urls(tweet) == text


def test_a_tweet_that_is_only_a_url_has_no_text(folder: Folder) -> None:
    data = folder("crisismmd")
    path = data / "crisismmd_datasplit_all" / "task_humanitarian_text_img_train.tsv"
    write_table(path, [{**tweet(0), "tweet_text": "https://t.co/x"}])
    (only,) = load("crisismmd", data).samples
    assert only.modalities == {"image"}


def test_vqa_rad(folder: Folder) -> None:
    data = folder("vqa-rad")
    train, test = by_id(load("vqa-rad", data)), by_id(load("vqa-rad", data, "test"))
    assert set(train) == {f"vqa-rad/{i}" for i in range(8)}
    assert set(test) == {f"vqa-rad/{i}" for i in range(8, 14)}
    assert train["vqa-rad/0"] == Sample(
        id="vqa-rad/0",
        question="are regions of the brain infarcted in no. 0?",
        answer="yes",
        image=data / "VQA_RAD Image Folder" / "synpic54610.jpg",
        choices=("yes", "no"),
        label="PRES",
        source="HEAD",
        where=f"{data / 'VQA_RAD Dataset Public.json'}, index 0",
        closed=True,
    )
    three, either = train["vqa-rad/3"], test["vqa-rad/10"]
    assert (three.answer, three.choices, three.is_closed, three.lettered) == ("3", None, False, False)
    assert (either.answer, either.choices, either.is_closed) == ("CT", None, True)


@pytest.mark.parametrize(
    ("kind", "answer", "expected"),
    [
        ("CLOSED", "no", ("no", ("yes", "no"), True)),
        ("closed ", " No. ", ("no", ("yes", "no"), True)),
        ("CLOSED ", "axial", ("axial", None, True)),
        ("CLOSED", 2, ("2", None, True)),
        ("OPEN ", "Yes", ("Yes", None, False)),
        ("OPEN", 5.6, ("5.6", None, False)),
    ],
)
def test_closed_and_open_are_as_published(folder: Folder, kind: str, answer: Any, expected: tuple[Any, ...]) -> None:
    data = folder("vqa-rad")
    write_json(data / "VQA_RAD Dataset Public.json", [rad_entry(0, answer_type=kind, answer=answer)])
    (only,) = load("vqa-rad", data).samples
    assert (only.answer, only.choices, only.is_closed) == expected


def test_slake_reads_one_language(folder: Folder) -> None:
    data = folder("slake")
    english, chinese = by_id(load("slake", data)), by_id(load("slake", data, language="zh"))
    assert set(english) == {f"slake/{i}" for i in (0, 1, 4, 5, 8, 9)}
    assert set(chinese) == {f"slake/{i}" for i in (2, 3, 6, 7, 10, 11)}
    assert english["slake/4"] == Sample(
        id="slake/4",
        question="Is there a liver?",
        answer="yes",
        image=data / "imgs" / "xmlab1" / "source.jpg",
        choices=("yes", "no"),
        label="Organ",
        source="Abdomen",
        where=f"{data / 'train.json'}, index 4",
        closed=True,
    )
    assert (chinese["slake/2"].answer, chinese["slake/2"].choices, chinese["slake/2"].is_closed) == ("有", None, True)
    assert len(load("slake", data, "test").samples) == 4
    assert len(load("slake", data, "test", test_set="validate").samples) == 2


def test_medalpaca(folder: Folder) -> None:
    data = folder("medalpaca")
    samples = load("medalpaca", data).samples
    assert [s.id for s in samples] == [f"medalpaca/{i:05d}" for i in range(6)]
    assert (samples[1].question, samples[1].text) == ("Answer this question truthfully", "What is sign no. 1?")
    assert (samples[1].answer, samples[1].choices, samples[1].is_closed) == ("A sign of 1.", None, False)
    task = tasks.build("medalpaca", {"data_dir": str(data)})
    assert list(task.load("test")) == []
    assert task.splits == ("train",)


def test_a_card_without_input_has_its_instruction_as_text(folder: Folder) -> None:
    data = folder("medalpaca")
    cards = [{"instruction": "What is it?", "input": "", "output": "It."}]
    write_json(data / "medical_meadow_wikidoc_medical_flashcards.json", cards)
    (only,) = load("medalpaca", data).samples
    assert (only.text, only.question, only.modalities) == ("What is it?", "", {"text"})


MEMES, RAD, SLAKE = "train.jsonl", "VQA_RAD Dataset Public.json", "train.json"
TWEETS, CARDS = "crisismmd_datasplit_all/task_humanitarian_text_img_train.tsv", "medical_meadow_wikidoc_medical_flashcards.json"
MEME = {"id": 1, "img": "img/40001.png", "label": 0, "text": "a"}
ROW, ENTRY, PAIR = tweet(0), rad_entry(1), slake_entry(1)
CARD = {"instruction": "answer", "input": "what?", "output": "that"}
BAD: list[tuple[str, str, Any, Any, str, str]] = [
    ("hateful-memes", MEMES, MEME, {"label": 2}, "id 1: 'label' must be 0 or 1, not 2", "wrong value"),
    ("hateful-memes", MEMES, MEME, {"label": True}, "id 1: 'label' must be 0 or 1, not True", "wrong value"),
    ("hateful-memes", MEMES, MEME, {"label": "1"}, "id 1: 'label' must be 0 or 1, not '1'", "wrong value"),
    ("hateful-memes", MEMES, MEME, {"label": [1]}, "id 1: 'label' must be 0 or 1, not [1]", "wrong value"),
    ("hateful-memes", MEMES, MEME, {"img": None}, "id 1: 'img' is missing or is neither text", "wrong value"),
    ("hateful-memes", MEMES, MEME, {"img": "img/no.png"}, "img/no.png is missing", "missing picture"),
    ("hateful-memes", MEMES, MEME, {"img": "../x.png"}, "id 1: the path '../x.png' leads out of", "path outside the folder"),
    ("hateful-memes", MEMES, MEME, {"img": "/x.png"}, "id 1: the path '/x.png' is absolute", "path outside the folder"),
    ("hateful-memes", MEMES, MEME, {"img": "train.jsonl"}, "train.jsonl cannot be decoded", "undecodable picture"),
    ("hateful-memes", MEMES, MEME, {"id": 40002}, "'hateful-memes/40002' is used twice", "duplicate id"),
    ("crisismmd", TWEETS, ROW, {"label_image": "flood"}, "'label_image' is 'flood', which is not one of", "wrong value"),
    ("crisismmd", TWEETS, ROW, {"label_image": "", "label": ""}, "'label' is empty", "wrong value"),
    ("crisismmd", TWEETS, ROW, {"image": "../../x.jpg"}, "the path '../../x.jpg' leads out of", "path outside the folder"),
    ("crisismmd", TWEETS, ROW, {"image": "data_image/no.jpg"}, "data_image/no.jpg is missing", "missing picture"),
    ("crisismmd", TWEETS, ROW, {"image_id": " "}, "'image_id' is empty", "wrong value"),
    ("crisismmd", TWEETS, ROW, {"tweet_text": "a\tb"}, "the line has 10 fields, not 9", "unreadable entry"),
    ("vqa-rad", RAD, ENTRY, {"answer_type": "YES"}, "id 1: 'answer_type' is 'YES', neither OPEN nor CLOSED", "wrong value"),
    ("vqa-rad", RAD, ENTRY, {"phrase_type": "poem"}, "id 1: 'phrase_type' is 'poem', which is not one of", "wrong value"),
    ("vqa-rad", RAD, ENTRY, {"phrase_type": 4}, "id 1: 'phrase_type' is '4', which is not one of", "wrong value"),
    ("vqa-rad", RAD, ENTRY, {"question": ["what?"]}, "id 1: 'question' is missing or is neither", "wrong value"),
    ("vqa-rad", RAD, ENTRY, {"answer": "  "}, "id 'vqa-rad/1': the answer is empty", "empty answer"),
    ("vqa-rad", RAD, ENTRY, {"answer": False}, "id 1: 'answer' is missing or is neither", "wrong value"),
    ("vqa-rad", RAD, ENTRY, {"image_name": "../../x"}, "Folder/../../x' leads out of", "path outside the folder"),
    ("slake", SLAKE, PAIR, {"q_lang": "fr"}, "id 1: 'q_lang' is 'fr', neither en nor zh", "wrong value"),
    ("slake", SLAKE, PAIR, {"img_name": "/etc/hostname"}, "'imgs//etc/hostname' is absolute", "path outside the folder"),
    ("slake", SLAKE, PAIR, {"qid": None}, "id None: 'qid' is missing", "wrong value"),
    ("medalpaca", CARDS, CARD, {"output": ""}, "the answer is empty", "empty answer"),
    ("medalpaca", CARDS, CARD, {"input": "", "instruction": ""}, "'instruction' is empty", "wrong value"),
    ("medalpaca", CARDS, CARD, {"input": 1.5, "output": {}}, "'output' is missing or is neither", "wrong value"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "file", "good", "change", "message", "kind"), BAD)
def test_each_damaged_entry_is_one_bad_sample(
    folder: Folder, name: str, file: str, good: dict[str, Any], change: dict[str, Any], message: str, kind: str
) -> None:
    data = folder(name)
    bad = {**good, **change}
    other = {key: f"{value}9" if key in ("id", "image_id", "qid") else value for key, value in good.items()}
    entries = [{**other, "id": 40002} if "id" in other else other, bad]
    if file.endswith(".tsv"):
        write_table(data / file, entries)
    else:
        (write_lines if file.endswith(".jsonl") else write_json)(data / file, entries)
    where = f"{data / file}, {'index 1' if file.endswith('.json') else 'line 3' if file.endswith('.tsv') else 'line 2'}"
    with pytest.raises(DataError) as caught:
        load(name, data)
    assert str(caught.value).startswith(where)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    loaded = load(name, data, on_bad_sample="skip")
    assert len(loaded.samples) == 1
    assert [p.kind for p in loaded.problems] == [kind]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_folder_that_is_missing_or_one_level_off(folder: Folder, name: str) -> None:
    data = folder(name)
    with pytest.raises(DataError, match=f"^task '{name}': data_dir = .* is not a readable folder"):
        load(name, data / "nowhere", on_bad_sample="skip")
    for wrong in (data.parent, next(p for p in sorted(data.iterdir()) if p.is_dir()) if name != "medalpaca" else data.parent):
        with pytest.raises(DataError, match=f"^task '{name}': there is no file .*; did you mean data_dir = '{data}'"):
            load(name, wrong, on_bad_sample="skip")


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_folder_must_be_given(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^task.data_dir: this key is required by task '{name}'"):
        tasks.build(name, {})


@pytest.mark.parametrize(("name", "file"), [("vqa-rad", RAD), ("slake", SLAKE), ("medalpaca", CARDS)])
def test_an_incomplete_download_is_reported(folder: Folder, name: str, file: str) -> None:
    path = folder(name) / file
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"not valid JSON, perhaps cut off \(.*\); download it again\.$"):
        load(name, path.parent, on_bad_sample="skip")


def test_a_bad_entry_of_a_file_with_both_splits_counts_once(folder: Folder) -> None:
    data = folder("vqa-rad")
    write_json(data / RAD, [rad_entry(0), rad_entry(1, "test_para"), 7, rad_entry(2, "poem")])
    task = tasks.build("vqa-rad", {"data_dir": str(data)})
    assert [len(read_split(task, split).problems) for split in ("train", "test")] == [2, 0]


@pytest.mark.parametrize("name", ["hateful-memes", "crisismmd", "vqa-rad", "slake"])
def test_a_byte_order_mark_and_windows_line_ends_change_nothing(folder: Folder, name: str) -> None:
    data = folder(name)
    before = [load(name, data, split).samples for split in ("train", "test")]
    for path in data.rglob("*.*"):
        if path.suffix in (".json", ".jsonl", ".tsv"):
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert [load(name, data, split).samples for split in ("train", "test")] == before


def test_a_picture_linked_from_elsewhere_is_a_bad_sample(folder: Folder) -> None:
    data = folder("hateful-memes")
    picture(data.parent / "secret.png")
    (data / "img" / "40001.png").unlink()
    (data / "img" / "40001.png").symlink_to(data.parent / "secret.png")
    (bad,) = load("hateful-memes", data, on_bad_sample="skip").problems
    assert bad.kind == "path outside the folder"
