"""color-squares: pictures of one color, with a sentence about it."""

import io
from collections.abc import Iterator

from PIL import Image

from fedmllm.data.samples import Sample, Split, Task
from fedmllm.data.tasks import tasks

COLORS = ("red", "green", "blue")


@tasks.register("color-squares")
def color_squares(*, train: int = 200, test: int = 60) -> Task:
    """Name the color of a square."""

    def load(split: Split) -> Iterator[Sample]:
        for i in range(train if split == "train" else test):
            color, file = COLORS[i % 3], io.BytesIO()
            Image.new("RGB", (64, 64), color).save(file, "PNG")
            yield Sample(
                id=f"color-squares/{split}/{i:04d}",
                question="what color is it?",
                answer=color,
                choices=COLORS,
                image=file.getvalue(),
                text=f"Somebody painted a {color} square.",
                label=color,
            )

    return Task("color-squares", "accuracy", load)
