"""The folder that `fedmllm init` writes: an experiment with comments, a small data set of one's own, and next steps."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from PIL import Image

from fedmllm.data.images import decode
from fedmllm.data.samples import Sample, Split
from fedmllm.data.tasks import tasks
from fedmllm.errors import RunError
from fedmllm.storage.atomic import write_atomically

Kind = Literal["classification", "qa"]
COUNTS: dict[Split, int] = {"train": 120, "test": 60}
_TEMPLATES = Path(__file__).parent


def write_starter(folder: Path, kind: Kind) -> None:
    """Write the starter into a new or empty folder. Raises RunError if it holds anything or cannot be created."""
    try:
        if folder.exists() and any(folder.iterdir()):
            raise RunError(f"{folder} is not empty; give a new folder.")
        (folder / "pictures").mkdir(parents=True)
    except OSError as error:
        raise RunError(f"{folder} cannot be created ({error.strerror}); give another folder.") from None
    for split, count in COUNTS.items():
        lines = [_line(folder, sample) for sample in itertools.islice(_samples(kind, split), count)]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_atomically(folder / f"{split}.jsonl", text.encode())
    for template, name in ((f"{kind}.toml", "experiment.toml"), ("README.md", "README.md")):
        write_atomically(folder / name, (_TEMPLATES / template).read_bytes())


def _samples(kind: Kind, split: Split) -> Iterator[Sample]:
    """Generated memes, or questions about pictures and about texts in turn."""
    if kind == "classification":
        memes = tasks.build("pocket-memes", {"p_image": 0.5, "p_text": 0.5})
        yield from (sample for sample in memes.load(split) if isinstance(sample, Sample))
        return
    # One in 37 of the questions, so that not all are about the first few pictures.
    about_pictures = itertools.islice(tasks.build("easy-vqa", {}).load(split), 0, None, 37)
    about_texts = tasks.build("shapes-qa", {}).load(split)
    for pair in zip(about_pictures, about_texts, strict=False):
        yield from (sample for sample in pair if isinstance(sample, Sample))


def _line(folder: Path, sample: Sample) -> dict[str, object]:
    """The sample as a line of the task `jsonl`; its picture is written beside it."""
    name = sample.id.replace("/", "-")
    line: dict[str, object] = {"id": name}
    for picture in sample.pictures:  # at most one
        line["image"] = f"pictures/{name}.png"
        write_atomically(folder / "pictures" / f"{name}.png", _png(decode(picture)))
    values = {"text": sample.text, "question": sample.question, "choices": sample.choices, "answer": sample.answer}
    return line | {key: value for key, value in values.items() if value}


def _png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()
