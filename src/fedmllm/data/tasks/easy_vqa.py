"""easy-VQA: 64 × 64 pictures of one coloured shape with questions, from the `easy-vqa` package (Zhou 2019).

4,000 training pictures with 38,575 questions, 1,000 test pictures with 9,673; 13 answers. The package carries the files,
so nothing is downloaded.
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
    pictures = {number: Path(path) for number, path in paths().items()}
    for index, (question, answer, picture) in enumerate(zip(*questions(), strict=True)):
        yield Sample(
            id=f"easy-vqa/{split}/{index:05d}",
            question=question,
            answer=answer,
            # A path that is not there is found and reported by `collect`.
            image=pictures.get(picture) or Path(f"{picture}.png"),
            choices=YES_NO if answer in YES_NO else None,
            label=answer,
            source="easy-vqa",
            where=f"easy-vqa {split} question {index}",
        )


@tasks.register("easy-vqa")
def easy_vqa_task() -> Task:
    """Pictures of one coloured shape with questions; 13 answers; accuracy, closed and open."""
    return Task("easy-vqa", "accuracy", _load)
