"""What may be a mistake in the data and is no error: `check` and `run` say it in one sentence each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache, lru_cache
from itertools import chain
from pathlib import Path

from fedmllm.data.images import Images, image_key, pictures_of
from fedmllm.data.samples import Sample

_SHOWN = 3


def notes(train: Sequence[Sample], test: Sequence[Sample]) -> Iterator[str]:
    """The sentences about these training and test samples."""
    answer_texts, label_texts = set[str](), set[str]()
    for sample in chain(train, test):
        answer_texts.update((sample.answer, *(sample.choices or ())))
        label_texts.add(sample.label)
    answers = near_equal(answer_texts)
    labels = [group for group in near_equal(label_texts) if group not in answers]
    for what, groups in (("answers", answers), ("labels", labels)):
        if groups:
            shown = ", ".join("/".join(map(repr, group)) for group in groups[:_SHOWN])
            more = f" and {len(groups) - _SHOWN} more" if len(groups) > _SHOWN else ""
            yield f"{what} that differ only in case or white space are different {what}: {shown}{more}"
    if shared := shared_rows(train, test):
        yield (
            f"{shared} of {len(test)} test samples are also training samples: the same picture, text, question and answer, "
            "whatever their ids; their score shows memory"
        )


def near_equal(texts: Iterable[str]) -> list[list[str]]:
    """The groups of texts that differ only in case or white space: {"yes", "Yes", "no"} gives [["Yes", "yes"]]."""
    groups: dict[str, list[str]] = {}
    for text in sorted(set(texts)):
        groups.setdefault("".join(text.casefold().split()), []).append(text)
    return [group for group in groups.values() if len(group) > 1]


def shared_rows(train: Sequence[Sample], test: Sequence[Sample]) -> int:
    """The number of test samples whose picture, text, question and answer are those of a training sample.

    Pictures are compared by their bytes; a file is read only if another with the same words has the same size.
    """
    size_of, key_of = lru_cache(1 << 12)(_sizes), cache(lambda images: tuple(map(image_key, pictures_of(images))))
    words = {_words(s) for s in test}
    outlines = {(_words(s), size_of(s.image)) for s in test}
    common, known = set[object](), set[object]()
    for s in train:
        if _words(s) in words and (outline := (_words(s), size_of(s.image))) in outlines:
            common.add(outline)
            known.add((outline, key_of(s.image)))
    shown = [((_words(s), size_of(s.image)), s.image) for s in test]
    return sum(outline in common and (outline, key_of(image)) in known for outline, image in shown)


def _words(sample: Sample) -> tuple[str | None, str, str]:
    return sample.text, sample.question, sample.answer


def _sizes(images: Images | None) -> tuple[int, ...]:
    """The bytes of each picture, as far as that is known without reading it."""
    return tuple(
        image.stat().st_size if isinstance(image, Path) else len(image) if isinstance(image, bytes) else 1
        for image in pictures_of(images)
    )
