"""Pictures and texts that are there but bad, at severities from 1 to 5; 0 changes nothing.

The kinds and the idea of five severities are those of ImageNet-C (Hendrycks and Dietterich 2019, 1903.12261). Its own code
needs OpenCV and scikit-image; these are of the same kinds, made with Pillow, with strengths relative to the picture's size,
so that the figures cannot be compared with published ones. A corruption draws from its generator only, so the same sample is
always equally bad.
"""

from __future__ import annotations

import io
import string
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from fedmllm.data.images import decode
from fedmllm.data.samples import Modality, Sample
from fedmllm.rng import stream

SEVERITIES = (1, 2, 3, 4, 5)
_BLUR = (0.01, 0.02, 0.03, 0.045, 0.06)
"""The radius as a share of the shorter side."""
_OCCLUDED = (0.1, 0.2, 0.3, 0.4, 0.5)
"""The share of the area."""
_FACTOR = (0.6, 0.45, 0.3, 0.2, 0.1)
"""What remains of brightness or contrast."""
_QUALITY = (40, 25, 15, 10, 5)
"""JPEG's scale from 1 to 95."""
_WORDS = (0.1, 0.2, 0.3, 0.45, 0.6)
"""The share of the words of a text that are affected, at least one."""

PictureCorruption = Callable[[Image.Image, int, np.random.Generator], Image.Image]
Draw = Callable[[np.random.Generator], str | None]
"""A draw of the text of another sample; None if there is none."""
TextCorruption = Callable[[list[str], int, np.random.Generator, Draw], list[str]]
"""(words, how many to affect, generator, a draw of another text) -> words."""


class OtherTexts:
    """Texts, one of which can be drawn that differs from a given text, as if all that differ were listed."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = list(texts)
        self._shifts: dict[str, list[int]] = {}
        """text -> for each of its places in the list, how many different texts are before it."""
        for place, text in enumerate(self._texts):
            shifts = self._shifts.setdefault(text, [])
            shifts.append(place - len(shifts))

    def draw(self, text: str | None, rng: np.random.Generator) -> str | None:
        shifts = self._shifts.get(text, []) if text is not None else []
        if len(shifts) == len(self._texts):
            return None
        index = int(rng.integers(len(self._texts) - len(shifts)))
        return self._texts[index + bisect_right(shifts, index)]


def _blur(image: Image.Image, severity: int, rng: np.random.Generator) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(_BLUR[severity - 1] * min(image.size)))


def _occlusion(image: Image.Image, severity: int, rng: np.random.Generator) -> Image.Image:
    """A grey rectangle of the picture's shape, anywhere within it."""
    share = _OCCLUDED[severity - 1] ** 0.5
    width, height = (max(1, round(side * share)) for side in image.size)
    left, top = (int(rng.integers(side - part + 1)) for side, part in zip(image.size, (width, height), strict=True))
    covered = image.copy()
    covered.paste((127, 127, 127), (left, top, left + width, top + height))
    return covered


def _low_light(image: Image.Image, severity: int, rng: np.random.Generator) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(_FACTOR[severity - 1])


def _contrast(image: Image.Image, severity: int, rng: np.random.Generator) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(_FACTOR[severity - 1])


def _jpeg(image: Image.Image, severity: int, rng: np.random.Generator) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_QUALITY[severity - 1])
    return decode(buffer.getvalue())


def _chosen(words: Sequence[str], number: int, rng: np.random.Generator) -> list[int]:
    return sorted(rng.permutation(len(words))[:number].tolist())


def _typos(words: list[str], number: int, rng: np.random.Generator, other: Draw) -> list[str]:
    """In each affected word, one letter is replaced, dropped, doubled, or swapped with the next."""
    for index in _chosen(words, number, rng):
        word, at, letter = words[index], int(rng.integers(len(words[index]))), string.ascii_lowercase[int(rng.integers(26))]
        words[index] = [
            word[:at] + letter + word[at + 1 :],
            word[:at] + word[at + 1 :] or letter,
            word[: at + 1] + word[at:],
            word[:at] + word[at + 1 : at + 2] + word[at : at + 1] + word[at + 2 :],
        ][int(rng.integers(4))]
    return words


def _dropped_words(words: list[str], number: int, rng: np.random.Generator, other: Draw) -> list[str]:
    """Affected words are left out; a text keeps at least one."""
    dropped = set(_chosen(words, min(number, len(words) - 1), rng))
    return [word for index, word in enumerate(words) if index not in dropped]


def _swapped_words(words: list[str], number: int, rng: np.random.Generator, other: Draw) -> list[str]:
    """Each affected word changes places with the one after it."""
    for index in _chosen(words[1:], number, rng):
        words[index], words[index + 1] = words[index + 1], words[index]
    return words


def _shuffled_words(words: list[str], number: int, rng: np.random.Generator, other: Draw) -> list[str]:
    """The affected words change places among themselves; at least two are affected."""
    chosen = _chosen(words, max(2, number), rng)
    for index, word in zip(chosen, [words[i] for i in rng.permutation(chosen).tolist()], strict=True):
        words[index] = word
    return words


def _other_text(words: list[str], number: int, rng: np.random.Generator, other: Draw) -> list[str]:
    """The last words are those of another sample's text."""
    text = other(rng)
    return words if text is None else [*words[:-number], *text.split()[-number:]]


PICTURES: dict[str, PictureCorruption] = {
    "blur": _blur,
    "contrast": _contrast,
    "jpeg": _jpeg,
    "low-light": _low_light,
    "occlusion": _occlusion,
}
TEXTS: dict[str, TextCorruption] = {
    "dropped-words": _dropped_words,
    "other-text": _other_text,
    "shuffled-words": _shuffled_words,
    "swapped-words": _swapped_words,
    "typos": _typos,
}
KINDS: dict[Modality, tuple[str, ...]] = {"image": tuple(PICTURES), "text": tuple(TEXTS)}


def corrupted(
    sample: Sample, modality: Modality, kind: str, severity: int, seed: int, others: OtherTexts | None = None
) -> Sample:
    """The sample with worse pictures (PNGs in memory) or a worse text; unchanged at severity 0, or without that modality.

    "other-text" takes one of the texts in `others` that differs from the sample's. Raises ValueError for an unknown kind or
    severity.
    """
    if kind not in KINDS[modality]:
        raise ValueError(f"there is no corruption {kind!r} of {modality}s; choose among {', '.join(KINDS[modality])}")
    if severity not in (0, *SEVERITIES):
        raise ValueError(f"severity = {severity} must be from 0 to 5")
    rng = stream(seed, "corruption", kind, sample.id)
    if severity and modality == "image" and sample.pictures:
        worse = []
        for picture in sample.pictures:
            buffer = io.BytesIO()
            PICTURES[kind](decode(picture), severity, rng).save(buffer, "PNG", compress_level=1)
            worse.append(buffer.getvalue())
        return replace(sample, image=tuple(worse))
    words = (sample.text or "").split()
    if severity and modality == "text" and words:
        number = max(1, round(_WORDS[severity - 1] * len(words)))
        others = others or OtherTexts(())
        return replace(sample, text=" ".join(TEXTS[kind](words, number, rng, partial(others.draw, sample.text))))
    return sample
