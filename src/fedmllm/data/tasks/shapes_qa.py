"""shapes-qa: text-only questions with the answers of easy-VQA, generated from a seed.

Example: "A red circle is above a blue rectangle. what color is the circle?" It is the text-only companion of easy-VQA, as
MedAlpaca is of VQA-RAD: the same kinds of questions and answers, with the facts in words instead of an image.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fedmllm.data.samples import Sample, Split, Task
from fedmllm.data.tasks import check_generated, tasks
from fedmllm.rng import stream

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "gray", "red", "blue", "teal", "brown", "green", "yellow")
RELATIONS = ("above", "below", "left of", "right of", "inside", "behind")
YES_NO = ("yes", "no")


def _draw(rng: np.random.Generator) -> tuple[str, str, str]:
    """(text, question, answer) about two objects of different shape and colour; half of the questions are yes/no questions."""
    shapes = [SHAPES[int(i)] for i in rng.permutation(len(SHAPES))[:2]]
    colors = [COLORS[int(i)] for i in rng.permutation(len(COLORS))[:2]]
    relation = RELATIONS[int(rng.integers(len(RELATIONS)))]
    text = f"A {colors[0]} {shapes[0]} is {relation} a {colors[1]} {shapes[1]}."
    index = int(rng.integers(2))
    kind = int(rng.integers(4))
    if kind == 0:
        return text, f"what color is the {shapes[index]}?", colors[index]
    if kind == 1:
        return text, f"what is the {colors[index]} shape?", shapes[index]
    exists = rng.random() < 0.5
    if rng.random() < 0.5:  # an object of the text, or its shape in the color of the other object
        described = f"{colors[index] if exists else colors[1 - index]} {shapes[index]}"
    else:
        absent = [c for c in COLORS if c not in colors]
        described = f"{colors[index] if exists else absent[int(rng.integers(len(absent)))]} shape"
    if kind == 2:
        return text, f"is there a {described}?", "yes" if exists else "no"
    return text, f"is there not a {described}?", "no" if exists else "yes"


@tasks.register("shapes-qa")
def shapes_qa(*, train: int = 4000, test: int = 1000, seed: int = 0) -> Task:
    """Text-only questions about shapes and colours with the answers of easy-vqa; generated; accuracy."""
    for name, count in (("train", train), ("test", test)):
        if count < 1:
            raise ValueError(f"{name} = {count} must be at least 1")
    check_generated(train=train, test=test)

    def load(split: Split) -> Iterator[Sample]:
        for index in range(train if split == "train" else test):
            text, question, answer = _draw(stream(seed, "shapes-qa", split, index))
            yield Sample(
                id=f"shapes-qa/{split}/{index:05d}",
                question=question,
                answer=answer,
                text=text,
                choices=YES_NO if answer in YES_NO else None,
                label=answer,
                source="shapes-qa",
            )

    return Task("shapes-qa", "accuracy", load)
