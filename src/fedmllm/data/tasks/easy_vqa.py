"""easy-VQA: images of one coloured shape, 64 × 64 pixels, with questions, from the `easy-vqa` package (Zhou 2019).

4,000 training images with 38,575 questions, 1,000 test images with 9,673 questions, 13 answers. The package contains the
files, so nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import easy_vqa

from fedmllm.data.samples import Sample, Split, Task
from fedmllm.data.tasks import tasks

YES_NO = ("yes", "no")


def _load(split: Split) -> Iterator[Sample]:
    questions, paths = (
        (easy_vqa.get_train_questions, easy_vqa.get_train_image_paths)
        if split == "train"
        else (easy_vqa.get_test_questions, easy_vqa.get_test_image_paths)
    )
    images = {number: Path(path) for number, path in paths().items()}
    for index, (question, answer, number) in enumerate(zip(*questions(), strict=True)):
        yield Sample(
            id=f"easy-vqa/{split}/{index:05d}",
            question=question,
            answer=answer,
            # A file that does not exist is reported as a problem when the images are checked.
            image=images.get(number) or Path(f"{number}.png"),
            choices=YES_NO if answer in YES_NO else None,
            label=answer,
            source="easy-vqa",
            where=f"easy-vqa {split} question {index}",
        )


@tasks.register("easy-vqa")
def easy_vqa_task() -> Task:
    """Images of one coloured shape with questions that have 13 answers; accuracy on closed and open questions."""
    return Task("easy-vqa", "accuracy", _load)
