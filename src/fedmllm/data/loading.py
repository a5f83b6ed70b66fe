"""Reading the samples of a task and separating those that cannot be used."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Literal

from PIL import Image

from fedmllm.data.images import Picture, decode, is_stretched
from fedmllm.data.samples import LETTERS, Loaded, Problem, ProblemKind, Sample, Split, Task
from fedmllm.errors import DataError

Flaw = tuple[str, ProblemKind]
"""(what is wrong with a sample, its kind)."""
Survey = dict[Picture, tuple[Flaw | None, bool]]
"""picture -> (what is wrong with it, whether its 16-bit grey is stretched)."""


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


def _examine(image: Picture) -> tuple[Flaw | None, bool]:
    flaw = _picture_flaw(image)
    return flaw, flaw is None and is_stretched(image)


def _examine_all(pictures: Sequence[Picture]) -> Survey:
    # Warning filters belong to the process, so they are set here, around all threads. Pillow warns about an image above its
    # limit and raises an error above twice the limit; here both are errors, so that no later decoding warns.
    with warnings.catch_warnings(), ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return dict(zip(pictures, pool.map(_examine, pictures), strict=True))


def _pictures(samples: Iterable[Sample]) -> list[Picture]:
    """The distinct pictures of the samples."""
    return list(dict.fromkeys(picture for s in samples for picture in s.pictures))


def _flaws(samples: Mapping[int, Sample], survey: Survey) -> Iterator[tuple[int, Flaw]]:
    """(index, flaw) of each sample that was parsed but cannot be used."""
    seen: set[str] = set()
    for index, sample in samples.items():
        if sample.id in seen:
            yield index, (f"the id {sample.id!r} is used twice", "duplicate id")
        elif not sample.answer:
            yield index, ("the answer is empty", "empty answer")
        elif sample.choices is not None and len(set(sample.choices)) < len(sample.choices):
            twice = next(choice for choice in sample.choices if sample.choices.count(choice) > 1)
            yield index, (f"the choice {twice!r} occurs twice", "wrong value")
        elif sample.choices is not None and sample.answer not in sample.choices:
            what = f"the answer {sample.answer!r} is not among the choices {', '.join(sample.choices)}"
            yield index, (what, "answer not among the choices")
        elif sample.lettered and len(sample.choices or ()) > len(LETTERS):
            what = f"{len(sample.choices or ())} choices are more than the {len(LETTERS)} letters"
            yield index, (what, "too many choices")
        else:
            flawed = ((n, flaw) for n, picture in enumerate(sample.pictures, start=1) if (flaw := survey[picture][0]))
            for n, (what, kind) in islice(flawed, 1):
                several = len(sample.pictures) > 1
                yield index, (f"picture {n} of {len(sample.pictures)}: {what}" if several else what, kind)
        seen.add(sample.id)


def read_split(task: Task, split: Split, choose: Callable[[list[Sample]], list[Sample]] = lambda samples: samples) -> Loaded:
    """The usable samples of a split, cleaned, and the problems of the others, decoding every image once.

    Samples are ordered by id, so that the result does not depend on the order of a file system. `choose` selects the samples
    to keep; only their images are decoded.
    """
    entries = [entry.cleaned() if isinstance(entry, Sample) else entry for entry in task.load(split)]
    kept = {id(s) for s in choose(sorted((e for e in entries if isinstance(e, Sample)), key=lambda s: s.id))}
    entries = [e for e in entries if isinstance(e, Problem) or id(e) in kept]
    samples = {index: entry for index, entry in enumerate(entries) if isinstance(entry, Sample)}
    survey = _examine_all(_pictures(samples.values()))
    flaws = dict(_flaws(samples, survey))
    usable: list[Sample] = []
    problems: list[Problem] = []
    for index, entry in enumerate(entries):
        if isinstance(entry, Problem):
            problems.append(entry)
        elif index in flaws:
            problems.append(problem_of(entry, task, *flaws[index]))
        else:
            usable.append(entry)
    stretched = sum(survey[picture][1] for picture in _pictures(usable))
    return Loaded(sorted(usable, key=lambda s: s.id), problems, stretched)


def problem_of(sample: Sample, task: Task, what: str, kind: ProblemKind) -> Problem:
    return Problem(f"{sample.where or task.name}, id {sample.id!r}", what, kind)


def refuse_problems(problems: Sequence[Problem], left: int, nothing_left: str, policy: Literal["error", "skip"]) -> None:
    """Raises DataError with the number of bad samples and the first of them, unless they are to be skipped and samples are
    `left`; `nothing_left` is the clause for the case that none is."""
    if problems and policy == "error":
        count = f"{len(problems)} bad samples, the first: " if len(problems) > 1 else ""
        skip = 'fix it, or set task.on_bad_sample = "skip" to continue without it.'
        raise DataError(f"{count}{problems[0]}; {skip if left else f'fix it, because {nothing_left} otherwise.'}")
    if not left:
        first = f"; the first problem: {problems[0]}" if problems else ""
        raise DataError(f"{nothing_left}{first}.")


def usable_samples(loaded: Loaded, task: Task, split: Split, on_bad_sample: Literal["error", "skip"]) -> list[Sample]:
    """The usable samples. Raises DataError if there are none, or, with "error", if there is any bad sample."""
    nothing_left = f"task {task.name!r} has no usable sample in its {split} split"
    refuse_problems(loaded.problems, len(loaded.samples), nothing_left, on_bad_sample)
    return loaded.samples
