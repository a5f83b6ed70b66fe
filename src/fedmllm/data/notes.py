"""What may be a mistake in the data and is no error: `check` and `run` say it in one sentence each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from fedmllm.data.images import Picture, image_key
from fedmllm.data.samples import Sample

_SHOWN = 3


def notes(train: Sequence[Sample], test: Sequence[Sample]) -> Iterator[str]:
    """The sentences about these training and test samples."""
    samples = [*train, *test]
    answers = near_equal(text for s in samples for text in (s.answer, *(s.choices or ())))
    labels = [group for group in near_equal(s.label for s in samples) if group not in answers]
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
    common = {_outline(s) for s in train} & {_outline(s) for s in test}
    keys: dict[Picture, str] = {}

    def rows(samples: Sequence[Sample]) -> Iterator[tuple[object, ...]]:
        for sample in samples:
            if (outline := _outline(sample)) in common:
                for picture in sample.pictures:
                    if picture not in keys:
                        keys[picture] = image_key(picture)
                yield (*outline, *(keys[picture] for picture in sample.pictures))

    known = set(rows(train))
    return sum(row in known for row in rows(test))


def _outline(sample: Sample) -> tuple[object, ...]:
    """What can be compared without reading a file."""
    sizes = [
        image.stat().st_size if isinstance(image, Path) else len(image) if isinstance(image, bytes) else 1
        for image in sample.pictures
    ]
    return tuple(sizes), sample.text, sample.question, sample.answer
