"""The sample schema, picture decoding, and what happens to a sample that cannot be used."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from fedmllm.errors import DataError

Modality = Literal["image", "text"]
MODALITIES: tuple[Modality, ...] = ("image", "text")
Split = Literal["train", "test"]
ProblemKind = Literal[
    "missing picture", "undecodable picture", "picture too large", "path outside the folder", "unreadable entry", "wrong value",
    "duplicate id", "empty answer", "answer not among the choices", "too many choices", "bad sample",
]  # fmt: skip
"""Sorts of problems, by which `fedmllm check` counts them."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""A lettered sample has no more choices than there are letters."""


@dataclass(frozen=True)
class Stored:
    """A picture's file that stays where it is until it is read; two of the same digest are the same picture."""

    digest: str
    """SHA-256 of the bytes."""
    read: Callable[[], bytes] = field(compare=False, repr=False)


Picture = Path | bytes | Stored


@dataclass(frozen=True)
class Sample:
    """One question with its answer, and the picture and text it is about.

    `image` is a file or the bytes of one. `text` is the text modality (a tweet, a report); `question` is always there and
    is no modality. `choices` closes the set of answers; `lettered` shows them in the prompt as (A), (B), … `label` is what
    partitions by label go by. `source` is the natural owner (a site, an author) for partitions by source. `closed` is what
    the published data calls the question, where it does; else a question with choices counts as closed.
    """

    id: str
    question: str
    answer: str
    image: Picture | None = None
    text: str | None = None
    choices: tuple[str, ...] | None = None
    lettered: bool = False
    label: str = ""
    source: str = ""
    where: str = ""  # file and line, for messages
    closed: bool | None = None

    @property
    def modalities(self) -> frozenset[Modality]:
        """What the sample itself has, before a scenario takes something away."""
        return frozenset(m for m in MODALITIES if getattr(self, m) is not None)

    @property
    def is_closed(self) -> bool:
        """Whether its score counts among the closed questions. One without choices is answered freely all the same."""
        return self.choices is not None if self.closed is None else self.closed


@dataclass(frozen=True)
class Problem:
    """A sample that cannot be used: `where` names file, line and id; `what` says what is wrong, `kind` what sort of thing."""

    where: str
    what: str
    kind: ProblemKind = "bad sample"

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
    splits: tuple[Split, ...] = ("train", "test")
    """A task without a test split serves as a companion."""
    ceiling: Mapping[str, float] = field(default_factory=dict)
    """pattern -> the best score of `metric` that any model can reach, where the task knows it."""


@dataclass(frozen=True)
class Loaded:
    samples: list[Sample]
    skipped: list[Problem] = field(default_factory=list)


def _source(image: Picture) -> Path | io.BytesIO:
    if isinstance(image, Path):
        return image
    return io.BytesIO(image if isinstance(image, bytes) else image.read())


def decode(image: Picture) -> Image.Image:
    """The picture in RGB as a viewer shows it: upright, the first frame of many, transparent parts on white.

    Raises an exception of Pillow's where the file is missing or is no picture.
    """
    with Image.open(_source(image)) as opened:
        opened.load()
        _turn_upright(opened)
        if opened.mode.startswith("I;16"):  # Pillow would cut every grey value above 255 to white
            return Image.fromarray((np.asarray(opened) >> 8).astype(np.uint8)).convert("RGB")
        if opened.mode in ("I", "F"):
            raise ValueError(f"its pixels are of mode {opened.mode}, whose range is unknown; save it as a PNG of 8 or 16 bits")
        if opened.has_transparency_data:  # what is under a transparent pixel is often black, and never meant to be seen
            clear = opened.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
        return opened.convert("RGB")


def _turn_upright(picture: Image.Image) -> None:
    """Apply the rotation that a camera wrote into the EXIF data."""
    try:
        ImageOps.exif_transpose(picture, in_place=True)
    except Exception:  # whatever parsing damaged EXIF data raises: the picture itself may still be whole
        return


def upright_size(image: Picture) -> tuple[int, int]:
    """Width and height of what `decode` gives, from the file's head where that is enough."""
    with Image.open(_source(image)) as opened:
        if opened.format in _PLAIN_FORMATS and not (opened.format == "PNG" and _png_goes_on(image)):
            width, height = opened.size
            return (height, width) if _orientation(opened) in _LYING else (width, height)
    return decode(image).size


_PLAIN_FORMATS = ("JPEG", "MPO", "PNG", "GIF", "BMP", "WEBP")
"""Whose size does not change when the pixels are read."""
_ORIENTATION, _LYING = 0x0112, (5, 6, 7, 8)
"""The EXIF tag, and its values that swap width and height."""


def _orientation(opened: Image.Image) -> int:
    try:
        # Not the PNG plug-in's own getexif, which reads all pixels to see whether EXIF data come after them.
        return int(Image.Image.getexif(opened).get(_ORIENTATION, 1))
    except Exception:  # as in `_turn_upright`
        return 1


def _png_goes_on(image: Picture) -> bool:
    """Whether anything but the end comes after a PNG's pixels: EXIF data can be there, and are rare."""
    source = _source(image)
    with source.open("rb") if isinstance(source, Path) else source as file:
        file.seek(8)
        after = False
        while len(head := file.read(8)) == 8:
            length, kind = int.from_bytes(head[:4], "big"), head[4:]
            if after and kind != b"IDAT":
                return kind != b"IEND"
            after = after or kind == b"IDAT"
            file.seek(length + 4, io.SEEK_CUR)
    return True


def image_key(image: Picture) -> str:
    """SHA-256 of the file's bytes: the same picture under two names is the same picture."""
    if isinstance(image, Stored):
        return image.digest
    return hashlib.sha256(image if isinstance(image, bytes) else image.read_bytes()).hexdigest()


def _flaw_of_picture(image: Picture) -> tuple[str, ProblemKind] | None:
    name = image if isinstance(image, Path) else "(in memory)"
    try:
        if isinstance(image, Path) and not image.is_file():
            return f"the picture {name} is missing", "missing picture"
        decode(image)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        most = f"{Image.MAX_IMAGE_PIXELS:,} pixels, Pillow's limit against decompression bombs"
        return f"the picture {name} has more than {most}; make it smaller", "picture too large"
    except Exception as error:  # decoders raise whatever they trip over in damaged bytes
        return f"the picture {name} cannot be decoded ({' '.join(str(error).split())})", "undecodable picture"
    return None


def _flaws_of_pictures(pictures: Sequence[Picture]) -> dict[Picture, tuple[str, ProblemKind] | None]:
    # Warning filters belong to the process, so they are set here, around all threads. Pillow warns of a bomb before it
    # refuses one of twice the size; here both are refused, so that no later decoding warns.
    with warnings.catch_warnings(), ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return dict(zip(pictures, pool.map(_flaw_of_picture, pictures), strict=True))


def _flaws(entries: Sequence[Sample | Problem]) -> Iterator[tuple[int, tuple[str, ProblemKind]]]:
    """(index, what is wrong and of what sort) for samples that parse but cannot be used."""
    samples = {index: entry for index, entry in enumerate(entries) if isinstance(entry, Sample)}
    broken = _flaws_of_pictures(list(dict.fromkeys(s.image for s in samples.values() if s.image is not None)))
    seen: set[str] = set()
    for index, sample in samples.items():
        if sample.id in seen:
            yield index, (f"the id {sample.id!r} is used twice", "duplicate id")
        elif not sample.answer:
            yield index, ("the answer is empty", "empty answer")
        elif sample.choices is not None and sample.answer not in sample.choices:
            what = f"the answer {sample.answer!r} is not among the choices {', '.join(sample.choices)}"
            yield index, (what, "answer not among the choices")
        elif sample.lettered and len(sample.choices or ()) > len(LETTERS):
            what = f"{len(sample.choices or ())} choices are more than the {len(LETTERS)} letters"
            yield index, (what, "too many choices")
        elif sample.image is not None and (flaw := broken[sample.image]):
            yield index, flaw
        seen.add(sample.id)


def survey(task: Task, split: Split, choose: Callable[[list[Sample]], list[Sample]] = lambda samples: samples) -> Loaded:
    """The usable samples of a split in the order of their ids, so that no file system's order shows, and what is wrong
    with the others. `choose` picks the ones to keep; only their pictures are decoded.
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
            problems.append(Problem(f"{entry.where or task.name}, id {entry.id!r}", *flaws[index]))
        else:
            usable.append(entry)
    return Loaded(sorted(usable, key=lambda s: s.id), problems)


def demand(found: Loaded, task: Task, split: Split, on_bad_sample: Literal["error", "skip"]) -> Loaded:
    """`found` itself. Raises DataError that counts the bad samples and names the first, unless they are to be skipped;
    and where nothing usable is left.
    """
    problems = found.skipped
    if problems and on_bad_sample == "error":
        count = f"{len(problems)} bad samples, the first: " if len(problems) > 1 else ""
        raise DataError(f'{count}{problems[0]}; mend it, or set task.on_bad_sample = "skip" to go on without.')
    if not found.samples:
        first = f"; the first problem: {problems[0]}" if problems else ""
        raise DataError(f"task {task.name!r} has no usable sample in its {split} split{first}.")
    return found


def collect(
    task: Task,
    split: Split,
    on_bad_sample: Literal["error", "skip"],
    choose: Callable[[list[Sample]], list[Sample]] = lambda samples: samples,
) -> Loaded:
    """The usable samples of a split, as `survey` finds them and `demand` wants them. Raises DataError."""
    return demand(survey(task, split, choose), task, split, on_bad_sample)
