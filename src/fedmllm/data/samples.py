"""The sample schema, picture decoding, and what happens to a sample that cannot be used."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from fedmllm.errors import DataError

Modality = Literal["image", "text"]
MODALITIES: tuple[Modality, ...] = ("image", "text")
Split = Literal["train", "test"]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""A lettered sample has no more choices than there are letters."""


@dataclass(frozen=True)
class Sample:
    """One question with its answer, and the picture and text it is about.

    `image` is a file or the bytes of one. `text` is the text modality (a tweet, a report); `question` is always there and
    is no modality. `choices` closes the set of answers; `lettered` shows them in the prompt as (A), (B), … `label` is what
    partitions by label go by. `source` is the natural owner (a site, an author) for partitions by source.
    """

    id: str
    question: str
    answer: str
    image: Path | bytes | None = None
    text: str | None = None
    choices: tuple[str, ...] | None = None
    lettered: bool = False
    label: str = ""
    source: str = ""
    where: str = ""  # file and line, for messages

    @property
    def modalities(self) -> frozenset[Modality]:
        """What the sample itself has, before a scenario takes something away."""
        return frozenset(m for m in MODALITIES if getattr(self, m) is not None)


@dataclass(frozen=True)
class Problem:
    """A sample that cannot be used: `where` names file, line and id; `what` says what is wrong with it."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True)
class Task:
    """A data set: `load(split)` yields its samples, and a Problem in place of each that cannot be used."""

    name: str
    metric: Literal["accuracy", "macro-f1", "auc"]
    load: Callable[[Split], Iterable[Sample | Problem]]
    positive: str | None = None
    """For AUC: the answer whose probability is the score."""


@dataclass(frozen=True)
class Loaded:
    samples: list[Sample]
    skipped: list[Problem] = field(default_factory=list)


def decode(image: Path | bytes) -> Image.Image:
    """The picture in RGB. Raises OSError or ValueError where the file is missing or is no picture."""
    with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
        opened.load()
        if opened.mode.startswith("I;16"):  # Pillow would cut every grey value above 255 to white
            return Image.fromarray((np.asarray(opened) >> 8).astype(np.uint8)).convert("RGB")
        if opened.mode in ("I", "F"):
            raise ValueError(f"its pixels are of mode {opened.mode}, whose range is unknown; save it as a PNG of 8 or 16 bits")
        return opened.convert("RGB")


def image_key(image: Path | bytes) -> str:
    """SHA-256 of the file's bytes: the same picture under two names is the same picture."""
    return hashlib.sha256(image if isinstance(image, bytes) else image.read_bytes()).hexdigest()


def _undecodable(image: Path | bytes) -> str | None:
    if isinstance(image, Path) and not image.is_file():
        return f"the picture {image} is missing"
    try:
        decode(image)
    except (OSError, ValueError, SyntaxError, NotImplementedError, Image.DecompressionBombError) as error:
        return f"the picture {image if isinstance(image, Path) else '(in memory)'} cannot be decoded ({error})"
    return None


def _flaws(entries: Sequence[Sample | Problem]) -> Iterator[tuple[int, str]]:
    """(index, what is wrong) for samples that parse but cannot be used."""
    samples = {index: entry for index, entry in enumerate(entries) if isinstance(entry, Sample)}
    pictures = list(dict.fromkeys(s.image for s in samples.values() if s.image is not None))
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        broken = dict(zip(pictures, pool.map(_undecodable, pictures), strict=True))
    seen: set[str] = set()
    for index, sample in samples.items():
        if sample.id in seen:
            yield index, f"the id {sample.id!r} is used twice"
        elif not sample.answer:
            yield index, "the answer is empty"
        elif sample.choices is not None and sample.answer not in sample.choices:
            yield index, f"the answer {sample.answer!r} is not among the choices {', '.join(sample.choices)}"
        elif sample.lettered and len(sample.choices or ()) > len(LETTERS):
            yield index, f"{len(sample.choices or ())} choices are more than the {len(LETTERS)} letters"
        elif sample.image is not None and (what := broken[sample.image]):
            yield index, what
        seen.add(sample.id)


def collect(
    task: Task,
    split: Split,
    on_bad_sample: Literal["error", "skip"],
    choose: Callable[[list[Sample]], list[Sample]] = lambda samples: samples,
) -> Loaded:
    """The usable samples of a split in the order of their ids, so that no file system's order shows.

    `choose` picks the ones to keep; only their pictures are decoded. Raises DataError that counts the bad samples and
    names the first, unless they are to be skipped; and where nothing usable is left.
    """
    entries = list(task.load(split))
    kept = {id(s) for s in choose(sorted((e for e in entries if isinstance(e, Sample)), key=lambda s: s.id))}
    entries = [e for e in entries if isinstance(e, Problem) or id(e) in kept]
    flaws = dict(_flaws(entries))
    usable: list[Sample] = []
    problems: list[Problem] = []
    for index, entry in enumerate(entries):
        if isinstance(entry, Problem):
            problems.append(entry)
        elif index in flaws:
            problems.append(Problem(f"{entry.where or task.name}, id {entry.id!r}", flaws[index]))
        else:
            usable.append(entry)
    if problems and on_bad_sample == "error":
        count = f"{len(problems)} bad samples, the first: " if len(problems) > 1 else ""
        raise DataError(f'{count}{problems[0]}; mend it, or set task.on_bad_sample = "skip" to go on without.')
    if not usable:
        first = f"; the first problem: {problems[0]}" if problems else ""
        raise DataError(f"task {task.name!r} has no usable sample in its {split} split{first}.")
    return Loaded(sorted(usable, key=lambda s: s.id), problems)
