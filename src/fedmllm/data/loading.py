"""Reading the samples of a task and separating those that cannot be used."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from PIL import Image

from fedmllm.data.images import Picture, decode
from fedmllm.data.samples import LETTERS, Loaded, Problem, ProblemKind, Sample, Split, Task
from fedmllm.errors import DataError

Flaw = tuple[str, ProblemKind]
"""(what is wrong with a sample, its kind)."""


def _picture_flaw(image: Picture) -> Flaw | None:
    name = image if isinstance(image, Path) else "(in memory)"
    try:
        if isinstance(image, Path) and not image.is_file():
            return f"the picture {name} is missing", "missing picture"
        decode(image)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        limit = f"{Image.MAX_IMAGE_PIXELS:,} pixels, Pillow's limit against decompression bombs"
        return f"the picture {name} has more than {limit}; make it smaller", "picture too large"
    except Exception as error:  # decoders raise many types of errors on damaged bytes
        return f"the picture {name} cannot be decoded ({' '.join(str(error).split())})", "undecodable picture"
    return None


def _picture_flaws(pictures: Sequence[Picture]) -> dict[Picture, Flaw | None]:
    # Warning filters belong to the process, so they are set here, around all threads. Pillow warns about an image above its
    # limit and raises an error above twice the limit; here both are errors, so that no later decoding warns.
    with warnings.catch_warnings(), ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return dict(zip(pictures, pool.map(_picture_flaw, pictures), strict=True))


def _flaws(entries: Sequence[Sample | Problem]) -> Iterator[tuple[int, Flaw]]:
    """(index, flaw) of each sample that was parsed but cannot be used."""
    samples = {index: entry for index, entry in enumerate(entries) if isinstance(entry, Sample)}
    picture_flaws = _picture_flaws(list(dict.fromkeys(s.image for s in samples.values() if s.image is not None)))
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
        elif sample.image is not None and (flaw := picture_flaws[sample.image]):
            yield index, flaw
        seen.add(sample.id)


def read_split(task: Task, split: Split, choose: Callable[[list[Sample]], list[Sample]] = lambda samples: samples) -> Loaded:
    """The usable samples of a split and the problems of the others, decoding every image once.

    Samples are ordered by id, so that the result does not depend on the order of a file system. `choose` selects the samples
    to keep; only their images are decoded.
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


def usable_samples(loaded: Loaded, task: Task, split: Split, on_bad_sample: Literal["error", "skip"]) -> list[Sample]:
    """The usable samples. Raises DataError if there are none, or, with "error", if there is any bad sample: the message
    gives the number of bad samples and describes the first."""
    problems = loaded.problems
    if problems and on_bad_sample == "error":
        count = f"{len(problems)} bad samples, the first: " if len(problems) > 1 else ""
        raise DataError(f'{count}{problems[0]}; fix it, or set task.on_bad_sample = "skip" to continue without it.')
    if not loaded.samples:
        first = f"; the first problem: {problems[0]}" if problems else ""
        raise DataError(f"task {task.name!r} has no usable sample in its {split} split{first}.")
    return loaded.samples
