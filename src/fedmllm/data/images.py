"""Images of samples: how they are stored, decoded and measured."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps


@dataclass(frozen=True)
class StoredPicture:
    """An encoded image that is read only when it is needed. Two with the same digest are equal."""

    digest: str
    """SHA-256 of the bytes."""
    read: Callable[[], bytes] = field(compare=False, repr=False)


Picture = Path | bytes | StoredPicture
"""An encoded image: a file, its bytes, or a way to read its bytes later."""
Images = Picture | tuple[Picture, ...]
"""What a sample shows: one picture, or several in their order."""

_FIXED_SIZE_FORMATS = ("JPEG", "MPO", "PNG", "GIF", "BMP", "WEBP")
"""Formats whose size in the header is that of the decoded pixels."""
_DEEP_GREY = "I;16"
"""How the names of Pillow's modes for 16-bit grey begin."""
_ORIENTATION, _TRANSPOSED = 0x0112, (5, 6, 7, 8)
"""The EXIF tag, and its values that swap width and height."""


def pictures_of(images: Images | None) -> tuple[Picture, ...]:
    """The pictures in their order; none for None."""
    return images if isinstance(images, tuple) else () if images is None else (images,)


def _source(image: Picture) -> Path | io.BytesIO:
    if isinstance(image, Path):
        return image
    return io.BytesIO(image if isinstance(image, bytes) else image.read())


def decode(image: Picture) -> Image.Image:
    """The image in RGB as a viewer shows it: upright, the first frame, transparent parts on white.

    Raises one of Pillow's exceptions if the file is missing or is not an image.
    """
    with Image.open(_source(image)) as opened:
        opened.load()
        _turn_upright(opened)
        if opened.mode.startswith(_DEEP_GREY):
            return _stretched(np.asarray(opened)).convert("RGB")
        if opened.mode in ("I", "F"):
            raise ValueError(f"its pixels are of mode {opened.mode}, whose range is unknown; save it as a PNG of 8 or 16 bits")
        if opened.has_transparency_data:  # the colour of a transparent pixel is often black and is not meant to be seen
            transparent = opened.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", transparent.size, "white"), transparent).convert("RGB")
        return opened.convert("RGB")


def _stretched(grey: NDArray[np.integer[Any]]) -> Image.Image:
    """16-bit grey in 8 bits: its own range, from the darkest to the lightest value, becomes 0 to 255.

    Most scanners fill 10 to 14 of the 16 bits, so that the upper 8 bits alone are nearly black, while Pillow would clip every
    value above 255 to white. A picture of one value has no range, and keeps its place among the 65,536.
    """
    low, high = int(grey.min()), int(grey.max())
    scaled = np.interp(grey, (low, high), (0, 255)) if low < high else grey >> 8
    return Image.fromarray(np.rint(scaled).astype(np.uint8))


def is_stretched(image: Picture) -> bool:
    """Whether `decode` stretches the grey values of the image, from its header alone."""
    with Image.open(_source(image)) as opened:
        return opened.mode.startswith(_DEEP_GREY)


def _turn_upright(image: Image.Image) -> None:
    """Apply the rotation that a camera recorded in the EXIF data."""
    try:
        # Pillow ignores an orientation that is stored as text, and every reading of the size must do the same.
        image.getexif()[_ORIENTATION] = _orientation(image.getexif())
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # parsing damaged EXIF data raises many types, and the image itself may still be intact
        return


def upright_size(image: Picture) -> tuple[int, int]:
    """Width and height of `decode(image)`, read from the file's header if that is sufficient."""
    with Image.open(_source(image)) as opened:
        if opened.format in _FIXED_SIZE_FORMATS and not (opened.format == "PNG" and _has_chunks_after_pixels(image)):
            width, height = opened.size
            # Not the getexif of the PNG plug-in, which reads all pixels to find EXIF data after them.
            return (height, width) if _orientation(Image.Image.getexif(opened)) in _TRANSPOSED else (width, height)
    return decode(image).size


def _orientation(exif: Image.Exif) -> int:
    """The orientation as a number, also if it is stored as text; 1, upright, if it is neither."""
    try:
        return int(exif.get(_ORIENTATION, 1))
    except Exception:  # as in `_turn_upright`
        return 1


def _has_chunks_after_pixels(image: Picture) -> bool:
    """Whether a PNG has any chunk but the end after its pixels, where EXIF data may be; this is rare."""
    source = _source(image)
    with source.open("rb") if isinstance(source, Path) else source as file:
        file.seek(8)
        seen_pixels = False
        while len(header := file.read(8)) == 8:
            length, kind = int.from_bytes(header[:4], "big"), header[4:]
            if seen_pixels and kind != b"IDAT":
                return kind != b"IEND"
            seen_pixels = seen_pixels or kind == b"IDAT"
            file.seek(length + 4, io.SEEK_CUR)
    return True


def image_key(image: Picture) -> str:
    """SHA-256 of the encoded bytes, so that one image under two names has one key."""
    if isinstance(image, StoredPicture):
        return image.digest
    return hashlib.sha256(image if isinstance(image, bytes) else image.read_bytes()).hexdigest()
