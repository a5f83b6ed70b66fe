"""Reading the samples of a task and separating those that cannot be used."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from fedmllm.data.images import Images, Picture, decode, is_stretched, pictures_of
from fedmllm.data.samples import LETTERS, Loaded, Problem, ProblemKind, Sample, Split, Task
from fedmllm.data.stored import Samples
from fedmllm.errors import DataError

Flaw = tuple[str, ProblemKind]
"""(what is wrong with a sample, its kind)."""
Survey = dict[Picture, tuple[Flaw | None, bool]]
"""picture -> (what is wrong with it, whether its 16-bit grey is stretched)."""
_AT_A_TIME = 1 << 12
"""Pictures that wait for a thread at a time."""


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


def _examine_all(pictures: Sequence[Picture]) -> list[tuple[Flaw | None, bool]]:
    """For each picture: what is wrong with it, and whether its 16-bit grey is stretched."""
    # Warning filters belong to the process, so they are set here, around all threads. Pillow warns about an image above its
    # limit and raises an error above twice the limit; here both are errors, so that no later decoding warns.
    with warnings.catch_warnings(), ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        parts = (pictures[first : first + _AT_A_TIME] for first in range(0, len(pictures), _AT_A_TIME))
        return [outcome for part in parts for outcome in pool.map(_examine, part)]


def _flaw(sample: Sample) -> Flaw | None:
    """Why a sample that was parsed cannot be used, whatever the others and its picture are."""
    choices = sample.choices
    if not sample.answer:
        return "the answer is empty", "empty answer"
    if choices is None:
        return None
    if len(set(choices)) < len(choices):
        twice = next(choice for choice in choices if choices.count(choice) > 1)
        return f"the choice {twice!r} occurs twice", "wrong value"
    if sample.answer not in choices:
        return f"the answer {sample.answer!r} is not among the choices {', '.join(choices)}", "answer not among the choices"
    if sample.lettered and len(choices) > len(LETTERS):
        return f"{len(choices)} choices are more than the {len(LETTERS)} letters", "too many choices"
    return None


def _shown(samples: Samples) -> list[int]:
    """The numbers of the distinct images that the samples have."""
    numbers: list[int] = np.unique(samples.image[samples.has_image]).tolist()
    return numbers


def _pictures(samples: Samples) -> list[Picture]:
    """The distinct pictures of the samples."""
    return list(dict.fromkeys(picture for number in _shown(samples) for picture in pictures_of(samples.images[number])))


def _image_flaw(images: Images, survey: Survey) -> Flaw | None:
    """What is wrong with the first of a sample's pictures that cannot be used."""
    pictures = pictures_of(images)
    for number, picture in enumerate(pictures, start=1):
        if flaw := survey[picture][0]:
            return (f"picture {number} of {len(pictures)}: {flaw[0]}", flaw[1]) if len(pictures) > 1 else flaw
    return None


def read_split(task: Task, split: Split, choose: Callable[[Samples], Sequence[Sample]] = lambda samples: samples) -> Loaded:
    """The usable samples of a split, cleaned, and the problems of the others, decoding every image once.

    Samples are ordered by id, so that the result does not depend on the order of a file system. `choose` selects the samples
    to keep, by a slice or `Samples.take`; only their images are decoded. Raises DataError.
    """
    problems: list[tuple[float, Problem]] = []
    """With the number of samples before it."""
    flawed: list[int] = []

    def parsed() -> Iterator[Sample]:
        count = 0
        for entry in task.load(split):
            if isinstance(entry, Problem):
                problems.append((count - 0.5, entry))
                continue
            sample = entry.cleaned()
            if _flaw(sample):
                flawed.append(count)
            count += 1
            yield sample

    everything = Samples.of(parsed())
    samples, chosen = everything, choose(everything.ordered())
    if len(chosen) < len(everything):
        assert isinstance(chosen, Samples)
        samples = everything.take(np.sort(everything.indices(chosen)))
    pictures = _pictures(samples)
    survey: Survey = dict(zip(pictures, _examine_all(pictures), strict=True))
    bad_images = [number for number in _shown(samples) if _image_flaw(samples.images[number], survey)]
    repeated = set(samples.repeated().tolist())
    bad = set(repeated)
    if flawed:
        bad |= set(np.flatnonzero(np.isin(everything.indices(samples), flawed)).tolist())
    if bad_images:
        bad |= set(np.flatnonzero(np.isin(samples.image, bad_images)).tolist())
    position = everything.indices(samples) if bad else ()
    for index in bad:
        sample = samples[index]
        twice: Flaw = (f"the id {sample.id!r} is used twice", "duplicate id")
        flaw = twice if index in repeated else _flaw(sample)
        flaw = flaw or _image_flaw(samples.images[samples.image[index]], survey)
        assert flaw is not None
        problems.append((position[index], problem_of(sample, task, *flaw)))
    usable = samples.take(np.setdiff1d(np.arange(len(samples)), list(bad))) if bad else samples
    stretched = sum(survey[picture][1] for picture in _pictures(usable))
    return Loaded(usable.ordered(), [problem for _, problem in sorted(problems, key=lambda entry: entry[0])], stretched)


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


def usable_samples(loaded: Loaded, task: Task, split: Split, on_bad_sample: Literal["error", "skip"]) -> Sequence[Sample]:
    """The usable samples. Raises DataError if there are none, or, with "error", if there is any bad sample."""
    nothing_left = f"task {task.name!r} has no usable sample in its {split} split"
    refuse_problems(loaded.problems, len(loaded.samples), nothing_left, on_bad_sample)
    return loaded.samples
