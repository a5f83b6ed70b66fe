"""Drawing emoji from a colour font, sequences included, without a text shaper.

Pillow joins a sequence such as 🇩🇪 (two regional indicators) into one glyph only through Raqm, which loads the system's
FriBiDi; without it, Pillow silently draws two letters. This module reads the font's own ligature table instead and makes a
copy of the font in memory whose character map assigns a private code point to every requested sequence. Each image is then
one glyph drawn by FreeType, which is part of Pillow: the same version of Pillow draws the same bytes on every machine.

Tables follow the OpenType specification 1.9.1: `cmap` format 12, `GSUB` lookup type 4.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Sequence

from PIL import Image, ImageDraw, ImageFont

FIRST_PRIVATE = 0xF0000
"""The first code point of Supplementary Private Use Area A, which no emoji has."""

Ligatures = dict[int, list[tuple[tuple[int, ...], int]]]
"""first glyph -> (the glyphs after it, the glyph that replaces them all), in the font's order: the first match applies."""


def _u16(data: bytes, at: int) -> int:
    return int(struct.unpack_from(">H", data, at)[0])


def _u32(data: bytes, at: int) -> int:
    return int(struct.unpack_from(">I", data, at)[0])


def _directory(font: bytes) -> dict[str, tuple[int, int, int]]:
    """table -> (offset of its directory entry, its own offset, its length), in bytes."""
    entries = (12 + 16 * i for i in range(_u16(font, 4)))
    return {font[at : at + 4].decode("latin-1"): (at, _u32(font, at + 8), _u32(font, at + 12)) for at in entries}


def _characters(cmap: bytes) -> dict[int, int]:
    """code point -> glyph, from the subtable of format 12. Raises ValueError if there is none."""
    for record in range(_u16(cmap, 2)):
        at = _u32(cmap, 4 + 8 * record + 4)
        if _u16(cmap, at) == 12:
            characters: dict[int, int] = {}
            for group in range(_u32(cmap, at + 12)):
                first, last, glyph = struct.unpack_from(">III", cmap, at + 16 + 12 * group)
                characters |= {first + i: glyph + i for i in range(last - first + 1)}
            return characters
    raise ValueError("the font has no character map of format 12")


def _coverage(gsub: bytes, at: int) -> list[int]:
    """The glyphs of a coverage table, in its order."""
    count = _u16(gsub, at + 2)
    if _u16(gsub, at) == 1:
        return [_u16(gsub, at + 4 + 2 * i) for i in range(count)]
    ranges = (struct.unpack_from(">HH", gsub, at + 4 + 6 * i) for i in range(count))
    return [glyph for first, last in ranges for glyph in range(first, last + 1)]


def _ligatures(gsub: bytes) -> Ligatures:
    """All ligatures of the lookups of type 4."""
    ligatures: Ligatures = {}
    lookups = _u16(gsub, 8)
    for number in range(_u16(gsub, lookups)):
        lookup = lookups + _u16(gsub, lookups + 2 + 2 * number)
        if _u16(gsub, lookup) != 4:
            continue
        for sub in range(_u16(gsub, lookup + 4)):
            table = lookup + _u16(gsub, lookup + 6 + 2 * sub)
            for index, first in enumerate(_coverage(gsub, table + _u16(gsub, table + 2))):
                ligature_set = table + _u16(gsub, table + 6 + 2 * index)
                for entry in range(_u16(gsub, ligature_set)):
                    at = ligature_set + _u16(gsub, ligature_set + 2 + 2 * entry)
                    glyph, count = struct.unpack_from(">HH", gsub, at)
                    rest = struct.unpack_from(f">{count - 1}H", gsub, at + 4)
                    ligatures.setdefault(first, []).append((tuple(rest), glyph))
    return ligatures


def _glyph(text: str, characters: dict[int, int], ligatures: Ligatures) -> int | None:
    """The single glyph that represents all of `text`, or None if the font has none.

    A variation selector that the font does not contain is ignored, as a shaper does.
    """
    glyphs = [characters[ord(c)] for c in text if ord(c) in characters]
    if len(glyphs) != sum(c != "\ufe0f" or ord(c) in characters for c in text) or not glyphs:
        return None
    while len(glyphs) > 1:
        matches = (pair for pair in ligatures.get(glyphs[0], ()) if tuple(glyphs[1 : 1 + len(pair[0])]) == pair[0])
        rest, joined = next(matches, ((), -1))
        if joined < 0:
            # A selector at the end requests the coloured form, which is the only form in a colour font.
            return glyphs[0] if glyphs[1:] == [characters.get(0xFE0F)] else None
        glyphs[: 1 + len(rest)] = [joined]
    return glyphs[0]


def _with_character_map(font: bytes, glyphs: Sequence[int]) -> bytes:
    """The font with a character map that maps FIRST_PRIVATE + i to `glyphs[i]`, and nothing else."""
    groups = b"".join(struct.pack(">III", FIRST_PRIVATE + i, FIRST_PRIVATE + i, glyph) for i, glyph in enumerate(glyphs))
    subtable = struct.pack(">HHIII", 12, 0, 16 + len(groups), 0, len(glyphs)) + groups
    cmap = struct.pack(">HHHHI", 0, 1, 3, 10, 12) + subtable  # platform 3, encoding 10: all of Unicode
    start = -(-len(font) // 4) * 4
    changed = bytearray(font.ljust(start, b"\0") + cmap)
    struct.pack_into(">II", changed, _directory(font)["cmap"][0] + 8, start, len(cmap))
    return bytes(changed)


def draw(font: bytes, texts: Sequence[str], size: int, points: int) -> Iterator[bytes | None]:
    """Draw each text as one glyph, `points` pixels high, in the middle of a white image of `size` × `size` pixels.

    Yields the bytes of the image, or None if the font has no glyph for the text or a blank one. Images are uncompressed
    (BMP), because compressors produce different bytes in different versions. Raises ValueError if the font lacks a required
    table, struct.error if a table is cut off, and OSError if FreeType cannot read the font.
    """
    tables = {name: font[start : start + length] for name, (_, start, length) in _directory(font).items()}
    if missing := [name for name in ("cmap", "GSUB") if name not in tables]:
        raise ValueError(f"the font has no table {missing[0]!r}")
    characters, ligatures = _characters(tables["cmap"]), _ligatures(tables["GSUB"])
    glyphs = [_glyph(text, characters, ligatures) for text in texts]
    known = [glyph for glyph in glyphs if glyph is not None]
    pen_font = ImageFont.truetype(io.BytesIO(_with_character_map(font, known)), points, layout_engine=ImageFont.Layout.BASIC)
    code_points = iter(range(FIRST_PRIVATE, FIRST_PRIVATE + len(known)))
    for glyph in glyphs:
        if glyph is None:
            yield None
            continue
        image = Image.new("RGB", (size, size), "white")
        pen = ImageDraw.Draw(image)
        pen.text((size / 2, size / 2), chr(next(code_points)), font=pen_font, embedded_color=True, anchor="mm")
        if all(low == high for low, high in image.getextrema()):  # type: ignore[misc]
            yield None
            continue
        content = io.BytesIO()
        image.save(content, "BMP")
        yield content.getvalue()
