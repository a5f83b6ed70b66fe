"""Reading data files: paths stay inside the folder, no line is lost, and errors are not tracebacks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmllm.data.files import Entry, EntryError, find_file, json_lines, json_list, path_inside, tab_separated
from fedmllm.data.samples import Problem
from fedmllm.errors import DataError
from helpers import quick


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder `data/` with `in.png`, `sub/in.png` and links, next to `secret.png`."""
    root = tmp_path_factory.mktemp("world")
    (root / "data" / "sub").mkdir(parents=True)
    for name in ("data/in.png", "data/sub/in.png", "secret.png", "data-other.png"):
        (root / name).write_bytes(b"x")
    (root / "data" / "out").symlink_to(root)
    (root / "data" / "out.png").symlink_to(root / "secret.png")
    (root / "data" / "within.png").symlink_to(root / "data" / "sub" / "in.png")
    (root / "data" / "circle").symlink_to(root / "data" / "circle")
    return root


@pytest.mark.parametrize("name", ["in.png", "sub/in.png", "./in.png", "sub/../in.png", "within.png", "nowhere.png", "…é東.png"])
def test_paths_inside_the_folder_are_returned_unchanged(world: Path, name: str) -> None:
    assert path_inside(world / "data", name) == world / "data" / name


LEAVING = [
    "../secret.png",
    "sub/../../secret.png",
    "out/secret.png",
    "out.png",
    "..",
    "../data-other.png",
    "sub/../../data-other.png",
]


@pytest.mark.parametrize("name", LEAVING)
def test_paths_that_lead_out_are_refused(world: Path, name: str) -> None:
    with pytest.raises(EntryError, match=r"leads out of .*; put the file inside") as caught:
        path_inside(world / "data", name)
    assert caught.value.kind == "path outside the folder"


def test_absolute_paths_are_refused_even_if_they_lead_inside(world: Path) -> None:
    for name in (str(world / "secret.png"), str(world / "data" / "in.png"), "C:\\secret.png", "C:secret.png"):
        with pytest.raises(EntryError, match="is absolute; write it relative to"):
            path_inside(world / "data", name)
    assert path_inside(world / "data", str(world / "data" / "in.png"), absolute=True) == world / "data" / "in.png"
    with pytest.raises(EntryError, match="leads out of"):
        path_inside(world / "data", str(world / "secret.png"), absolute=True)


def test_a_second_name_may_not_lead_out_or_be_absolute(world: Path) -> None:
    assert path_inside(world / "data", "sub", "in.png") == world / "data" / "sub" / "in.png"
    for name in ("../../secret.png", "/etc/hostname"):
        with pytest.raises(EntryError):
            path_inside(world / "data", "sub", name)


@pytest.mark.parametrize("name", ["a\0b.png", "\ud800.png", "circle", "x" * 5000])
def test_names_that_no_file_can_have_are_errors(world: Path, name: str) -> None:
    with pytest.raises(EntryError, match="cannot be used") as caught:
        path_inside(world / "data", name)
    assert caught.value.kind == "missing picture"


def test_a_folder_may_be_a_link(world: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(world / "data")
    assert path_inside(tmp_path / "link", "in.png").is_file()


PIECES = st.sampled_from(["..", ".", "sub", "out", "in.png", "secret.png", "", "/", "~", "out.png", "within.png", "\\", "C:"])


@quick
@given(pieces=st.lists(PIECES, min_size=1, max_size=7), absolute=st.booleans())
def test_no_crafted_path_escapes(world: Path, pieces: list[str], absolute: bool) -> None:
    """The operating system resolves every accepted path to one inside the folder."""
    folder = world / "data"
    try:
        path = path_inside(folder, "/".join(pieces), absolute=absolute)
    except EntryError:
        return
    real = os.path.realpath(path)
    assert os.path.commonpath([real, os.path.realpath(folder)]) == os.path.realpath(folder)


def test_a_folder_one_level_off_gets_a_suggestion(tmp_path: Path) -> None:
    (tmp_path / "download" / "memes").mkdir(parents=True)
    (tmp_path / "download" / "memes" / "img").mkdir()
    (tmp_path / "download" / "memes" / "train.jsonl").write_text("")
    right = tmp_path / "download" / "memes"
    assert find_file("t", right, "train.jsonl") == right / "train.jsonl"
    for wrong in (right / "img", tmp_path / "download"):
        with pytest.raises(DataError) as caught:
            find_file("t", wrong, "train.jsonl")
        assert str(caught.value) == (
            f"task 't': there is no file {wrong / 'train.jsonl'}; did you mean data_dir = {str(right)!r}?"
        )
    with pytest.raises(
        DataError, match=r"there is no file .*dev\.jsonl; data_dir must be the folder that contains 'dev\.jsonl'"
    ):
        find_file("t", right, "dev.jsonl")
    for nowhere in (tmp_path / "nowhere", right / "train.jsonl", tmp_path / ("x" * 5000)):
        with pytest.raises(
            DataError, match=r"is not a readable folder \(.*\); give the folder that contains 'train\.jsonl'\.$"
        ):
            find_file("t", nowhere, "train.jsonl")


def test_line_endings_vary_and_empty_lines_count(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"id": 1}\r\n\r\n  \n{"id": "z\xc3\xbc"}\n[1]\n{"id"')
    first, second, third, fourth = json_lines(path)
    assert isinstance(first, Entry)
    assert isinstance(second, Entry)
    assert (first.values, first.index, second.values, second.where) == ({"id": 1}, 1, {"id": "zü"}, f"{path}, line 4")
    assert third == Problem(f"{path}, line 5", "the line is not a JSON object", "unreadable entry")
    assert isinstance(fourth, Problem)
    assert "line 6: the line is not valid JSON (" in str(fourth)


def test_a_list_gives_its_objects_and_a_problem_for_any_other_value(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf[{"qid": 1},\r\n 7]')
    assert json_list(path) == [
        Entry(f"{path}, index 0", {"qid": 1}, 0),
        Problem(f"{path}, index 1", "the entry is not a JSON object", "unreadable entry"),
    ]


def test_an_object_with_a_key_twice_is_one_bad_entry(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"qid": 1, "answer": "yes", "answer": "no"}, {"qid": 2, "x": {"y": 1, "y": 2}}]')
    first, second = json_list(path)
    assert first == Problem(f"{path}, index 0", "the entry has the key 'answer' twice", "unreadable entry")
    assert isinstance(second, Entry)
    assert second.values["qid"] == 2


@pytest.mark.parametrize("content", [b"", b'[{"qid": 1}, {"qi', b'[{"qid": 1}', b"\xff\xfe", b"[" * 100_000])
def test_a_truncated_json_file_is_reported(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        json_list(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: not valid JSON, perhaps cut off (")
    assert message.endswith("); download it again.")
    assert "\n" not in message


def test_a_json_file_must_be_a_list(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"qid": 1}')
    with pytest.raises(DataError, match=r"a\.json: must be a JSON list of objects"):
        json_list(tmp_path / "a.json")


def test_quotes_in_a_table_are_ordinary_characters(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    text = '\ufeffa\tb\r\n"he said\t1\r\n\n""twice""\t"2"\r\nu\u2028v\x85w\t3\n'
    path.write_bytes(text.encode())
    rows = [entry for entry in tab_separated(path, ("a", "b")) if isinstance(entry, Entry)]
    assert [dict(row.values) for row in rows] == [
        {"a": '"he said', "b": "1"},
        {"a": '""twice""', "b": '"2"'},
        {"a": "u\u2028v\x85w", "b": "3"},
    ]
    assert [row.index for row in rows] == [2, 4, 5]


def test_rows_that_do_not_fit_the_header_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes(b"a\tb\nx\ny\t1\t2\nz\xff\t3\n")
    assert [str(entry).split(": ", 1)[0] for entry in tab_separated(path, ("a",))] == [f"{path}, line {n}" for n in (2, 3, 4)]
    assert [entry.what[:25] for entry in tab_separated(path, ("a",)) if isinstance(entry, Problem)] == [
        "the line has 1 fields, no", "the line has 3 fields, no", "the line is not UTF-8 ('u",
    ]  # fmt: skip


def test_a_table_must_have_its_columns(tmp_path: Path) -> None:
    for content in ("", "a,b\n1,2\n"):
        (tmp_path / "a.tsv").write_text(content)
        with pytest.raises(DataError, match=r"a\.tsv, line 1: there is no column 'a' among .*; is it a different file\?$"):
            list(tab_separated(tmp_path / "a.tsv", ("a",)))


@pytest.mark.parametrize(
    ("value", "text"), [("yes ", "yes"), (3, "3"), (2.5, "2.5"), (0, "0"), ("\u3000有 ", "有"), (1e300, "1e+300")]
)
def test_values_become_text(value: object, text: str) -> None:
    assert Entry("here", {"k": value}, 0).text("k") == text


@pytest.mark.parametrize("value", [True, ["a"], {"a": 1}, None, "", "  ", float("nan"), float("inf")])
def test_values_that_are_no_text_are_refused(value: object) -> None:
    with pytest.raises(EntryError, match="'k'"):
        Entry("here", {"k": value}, 0).text("k")
    if value in (None, "", "  "):
        assert Entry("here", {"k": value}, 0).text("k", required=False) == ""
