"""pocket-memes: does the picture show what the text says? Yes or no, modelled on Hateful Memes (Kiela et al. 2020).

The image shows a coloured shape, the text names a colour, and the answer is yes if the two colours are the same. Every colour
is equally frequent with yes and with no, so the colour on one side alone says nothing: these samples act as confounders.
Independently of each other, the shape reveals the answer in a share `p_image` of the samples (a star for yes, a cross for no),
and a word reveals it in a share `p_text` ("hot" for yes, "cold" for no). `noise` is the share of answers that are then
flipped. The best AUC that any model can reach from the image, the text or both follows from these numbers: see `ceiling` and
docs/data.md.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from fedmllm.data.samples import Sample, Split, Task
from fedmllm.data.tasks import check_generated, tasks
from fedmllm.rng import stream

COLORS = {"red": (235, 20, 20), "blue": (20, 40, 235), "green": (20, 200, 30), "yellow": (250, 235, 20)}
PLAIN_SHAPES = ("circle", "rectangle", "triangle")
REVEALING_SHAPES = {True: "star", False: "cross"}
REVEALING_WORDS = {True: "hot", False: "cold"}
CHOICES = ("no", "yes")
SIZE, SCALE = 64, 3
"""Edge length of an image in pixels, and the factor by which it is drawn larger and then reduced, for smooth edges."""


@dataclass(frozen=True)
class Meme:
    """The content of one sample."""

    answer: bool
    shape: str
    color: str
    named: str
    """The colour in the text."""
    word: str
    """The word that reveals the answer, or ""."""

    @property
    def text(self) -> str:
        return f"A {self.named} object{f' on a {self.word} day' if self.word else ''}."


def ceiling(share: float, noise: float) -> float:
    """The best AUC from a side that reveals the answer in a `share` of the samples and says nothing in the others, if a share
    `noise` of the answers is flipped afterwards: 1/2 + (1 − 2·noise)·(1 − (1 − share)²)/2.

    Example: a share of 0.3 without noise gives 0.755; a share of 1, as for image and text together, gives 1 − noise.
    """
    return 0.5 + (1 - 2 * noise) * (1 - (1 - share) ** 2) / 2


def draw_meme(rng: np.random.Generator, answer: bool, p_image: float, p_text: float, noise: float) -> Meme:
    """Draw a meme with the given answer."""
    same = answer != bool(rng.random() < noise)
    names = list(COLORS)
    named = names[int(rng.integers(len(names)))]
    others = [name for name in names if name != named]
    color = named if same else others[int(rng.integers(len(others)))]
    plain = PLAIN_SHAPES[int(rng.integers(len(PLAIN_SHAPES)))]
    shape = REVEALING_SHAPES[same] if rng.random() < p_image else plain
    return Meme(answer, shape, color, named, REVEALING_WORDS[same] if rng.random() < p_text else "")


def _outline(shape: str) -> list[tuple[float, float]]:
    """Corners around (0, 0) with coordinates between −1 and 1."""
    arm = 0.35
    if shape == "star":
        radii = [1.0 if k % 2 == 0 else 0.42 for k in range(10)]
        return [(r * math.sin(k * math.pi / 5), -r * math.cos(k * math.pi / 5)) for k, r in enumerate(radii)]
    if shape == "cross":
        half = [(-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm)]
        return half + [(-x, -y) for x, y in half]
    return [(0, -1), (1, 1), (-1, 1)] if shape == "triangle" else [(-1, -0.7), (1, -0.7), (1, 0.7), (-1, 0.7)]


def draw_image(meme: Meme, rng: np.random.Generator) -> bytes:
    """The meme's shape at a random place on a light background, as the bytes of an uncompressed image (BMP)."""
    background, jitter = rng.integers(225, 256, size=3), rng.integers(-10, 11, size=3)
    fill = np.clip(np.array(COLORS[meme.color]) + jitter, 0, 255)
    half = float(rng.uniform(11, 19))
    x, y = float(rng.uniform(half, SIZE - half)), float(rng.uniform(half, SIZE - half))
    image = Image.new("RGB", (SIZE * SCALE, SIZE * SCALE), tuple(background.tolist()))
    pen, ink = ImageDraw.Draw(image), tuple(fill.tolist())
    if meme.shape == "circle":
        pen.ellipse([(v + side * half) * SCALE for side in (-1, 1) for v in (x, y)], fill=ink)
    else:
        pen.polygon([((x + dx * half) * SCALE, (y + dy * half) * SCALE) for dx, dy in _outline(meme.shape)], fill=ink)
    content = io.BytesIO()
    image.resize((SIZE, SIZE), Image.Resampling.BOX).save(content, "BMP")
    return content.getvalue()


@tasks.register("pocket-memes")
def pocket_memes(
    *, n: int = 4000, test: int = 1000, p_image: float = 0.3, p_text: float = 0.3, noise: float = 0.0, seed: int = 0
) -> Task:
    """Does the picture show what the text says? Generated, with half of the answers yes and a known best score; AUC.

    There are `n` training and `test` test samples; `p_image` and `p_text` are the shares in which one side alone reveals the
    answer.
    """
    for name, count in (("n", n), ("test", test)):
        if count < 2:
            raise ValueError(f"{name} = {count} must be at least 2, one for each answer")
    check_generated(n=n, test=test)
    for name, share, limit in (("p_image", p_image, 1.0), ("p_text", p_text, 1.0), ("noise", noise, 0.5)):
        if not 0 <= share <= limit:
            raise ValueError(f"{name} = {share} must be between 0 and {limit:g}")

    def load(split: Split) -> Iterator[Sample]:
        for index in range(n if split == "train" else test):
            rng = stream(seed, "pocket-memes", split, index)
            meme = draw_meme(rng, index % 2 == 1, p_image, p_text, noise)
            yield Sample(
                id=f"pocket-memes/{split}/{index:05d}",
                question="does the picture show what the text says?",
                answer=CHOICES[meme.answer],
                image=draw_image(meme, rng),
                text=meme.text,
                choices=CHOICES,
                lettered=True,
                label=CHOICES[meme.answer],
                source="pocket-memes",
            )

    best = {"both": ceiling(1.0, noise), "image": ceiling(p_image, noise), "text": ceiling(p_text, noise)}
    return Task("pocket-memes", "auc", load, positive="yes", ceiling=best)
