"""Tables and chats are read as samples, and what cannot be read is named by its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedmllm.data.samples import Loaded
from fedmllm.data.tasks import tasks
from fedmllm.errors import DataError
from helpers import load_samples, png


def load(path: Path) -> Loaded:
    return load_samples(tasks.build("jsonl", {"train": str(path), "test": str(path)}), "train", "skip")


def chat(*content: Any, answer: Any = "yes", **more: Any) -> str:
    turns = [{"role": "user", "content": content[0] if len(content) == 1 else list(content)}]
    return json.dumps({"messages": [*turns, {"role": "assistant", "content": answer}], **more})


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


IMAGE = {"type": "image", "image": "a.png"}


def test_a_table_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "data.csv").write_text(
        "\ufeffid,image,text,question,choices,answer,source\r\n"
        'x,a.png,"two lines,\nand ""quotes""",what?,red | blue,red,site-1\r\n'
        "\r\n"
        "y,,,how many?,,3,\r\n"
    )
    first, second = load(tmp_path / "data.csv").samples
    assert (first.id, first.image, first.source) == ("x", (tmp_path / "a.png").resolve(), "site-1")
    assert (first.text, first.choices, first.answer) == ('two lines,\nand "quotes"', ("red", "blue"), "red")
    assert (second.modalities, second.choices, second.answer, second.source) == (frozenset(), None, "3", "")


def test_rows_without_an_id_are_numbered_by_their_lines(tmp_path: Path) -> None:
    (tmp_path / "data.CSV").write_text('text,question,answer\n"a\nb",q,yes\nc,q,no\nd,q\ne,q,\n')
    loaded = load(tmp_path / "data.CSV")
    assert [sample.id for sample in loaded.samples] == ["2", "4"]
    assert [str(problem).partition("data.CSV, ")[2] for problem in loaded.problems] == [
        "line 5: the line has 2 cells, not 3",
        "line 6, id '6': the key 'answer' is missing or is neither text nor a whole number",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must name at least two columns"),
        (b"id;text;answer\na;b;c\n", "separated by commas; it is 'id;text;answer'"),
        (b"text,text,answer\n", "each once"),
        (b"text,,answer\n", "each once"),
        (b"text,answer\n\xff,b\n", "cannot be read as a table"),
        (b'text,answer\n"a,b\n', "cannot be read as a table"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "data.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(tmp_path / "data.csv")


def test_a_chat_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    lines = [
        chat("is it red?"),
        chat(IMAGE, text("a post"), text("is it hateful?"), choices=["no", "yes"], id="meme", source="site-2"),
        chat(IMAGE, IMAGE, text("which one?"), answer=[text("the first")]),
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    plain, several, meme = load(tmp_path / "data.jsonl").samples
    assert (plain.id, plain.question, plain.answer, plain.modalities) == ("1", "is it red?", "yes", frozenset())
    assert (several.id, len(several.pictures), several.text, several.answer) == ("3", 2, None, "the first")
    assert (meme.id, meme.text, meme.question, meme.source) == ("meme", "a post", "is it hateful?", "site-2")
    assert (meme.choices, meme.lettered, len(meme.pictures)) == (("no", "yes"), True, 1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": []}', "and they are none"),
        ('{"messages": "hi"}', "and they are none"),
        ('{"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]}', "they are system, user"),
        ('{"messages": [1, 2]}', "they are None, None"),
        (chat([IMAGE]), "must have a text of the user"),
        (chat("q", answer=[IMAGE]), "one text of the assistant"),
        (chat("q", answer=[]), "one text of the assistant"),
        (chat("q", answer=" "), "a part of 'messages' must be"),
        (chat([{"type": "image_url", "image_url": {"url": "https://x/y.png"}}]), "a part of 'messages' must be"),
        (chat({"type": "text"}), "a part of 'messages' must be"),
        (chat("q", question="p"), "the key 'question' is given beside 'messages'"),
        (chat("q", choices=["a", "b"]), "is not among the choices"),
        (chat("q", extra=1), "unknown key 'extra'"),
    ],
)
def test_another_conversation_is_a_bad_sample(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "data.jsonl").write_text(line + "\n" + chat("fine"))
    (problem,) = load(tmp_path / "data.jsonl").problems
    assert message in str(problem)
    assert "data.jsonl, line 1" in str(problem)
