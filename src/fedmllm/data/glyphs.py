"""Drawing emoji from a colour font, sequences included, without a text shaper.

Pillow joins a sequence such as 🇩🇪 (two regional indicators) into one glyph only through Raqm, which loads the system's FriBiDi:
where that is missing it would silently draw two letters. Here the font's own table of ligatures is read, and a copy of the
font is made in memory whose character map gives every wanted sequence a private code point. Drawing is then one glyph a
picture by FreeType, which Pillow carries with it: the same Pillow draws the same bytes on every machine.

Tables as in the OpenType specification 1.9.1: `cmap` format 12, `GSUB` lookup type 4.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Sequence

from PIL import Image, ImageDraw, ImageFont

FIRST_PRIVATE = 0xF0000
"""The first code point of Supplementary Private Use Area A, which no emoji has."""

Ligatures = dict[int, list[tuple[tuple[int, ...], int]]]
"""first glyph -> (the glyphs after it, what they are joined to), in the font's order: the first that fits is taken."""


def _u16(data: bytes, at: int) -> int:
    return int(struct.unpack_from(">H", data, at)[0])


def _u32(data: bytes, at: int) -> int:
    return int(struct.unpack_from(">I", data, at)[0])


def _directory(font: bytes) -> dict[str, tuple[int, int, int]]:
    """table -> (where its directory entry is, where it begins, its length in bytes)."""
    entries = (12 + 16 * i for i in range(_u16(font, 4)))
    return {font[at : at + 4].decode("latin-1"): (at, _u32(font, at + 8), _u32(font, at + 12)) for at in entries}


def _characters(cmap: bytes) -> dict[int, int]:
    """code point -> glyph, of the subtable of format 12. Raises ValueError where there is none."""
    for record in range(_u16(cmap, 2)):
        at = _u32(cmap, 4 + 8 * record + 4)
        if _u16(cmap, at) == 12:
            found: dict[int, int] = {}
            for group in range(_u32(cmap, at + 12)):
                first, last, glyph = struct.unpack_from(">III", cmap, at + 16 + 12 * group)
                found |= {first + i: glyph + i for i in range(last - first + 1)}
            return found
    raise ValueError("the font has no character map of format 12")


def _covered(gsub: bytes, at: int) -> list[int]:
    """The glyphs of a coverage table, in its order."""
    count = _u16(gsub, at + 2)
    if _u16(gsub, at) == 1:
        return [_u16(gsub, at + 4 + 2 * i) for i in range(count)]
    ranges = (struct.unpack_from(">HH", gsub, at + 4 + 6 * i) for i in range(count))
    return [glyph for first, last in ranges for glyph in range(first, last + 1)]


def _ligatures(gsub: bytes) -> Ligatures:
    """All ligatures of lookups of type 4."""
    found: Ligatures = {}
    lookups = _u16(gsub, 8)
    for number in range(_u16(gsub, lookups)):
        lookup = lookups + _u16(gsub, lookups + 2 + 2 * number)
        if _u16(gsub, lookup) != 4:
            continue
        for sub in range(_u16(gsub, lookup + 4)):
            table = lookup + _u16(gsub, lookup + 6 + 2 * sub)
            for index, first in enumerate(_covered(gsub, table + _u16(gsub, table + 2))):
                ligature_set = table + _u16(gsub, table + 6 + 2 * index)
                for one in range(_u16(gsub, ligature_set)):
                    at = ligature_set + _u16(gsub, ligature_set + 2 + 2 * one)
                    glyph, count = struct.unpack_from(">HH", gsub, at)
                    rest = struct.unpack_from(f">{count - 1}H", gsub, at + 4)
                    found.setdefault(first, []).append((tuple(rest), glyph))
    return found


def _glyph(text: str, characters: dict[int, int], ligatures: Ligatures) -> int | None:
    """The one glyph that `text` is drawn as, None where the font has none for all of it.

    A variation selector that the font does not know is passed over, as a shaper does.
    """
    glyphs = [characters[ord(c)] for c in text if ord(c) in characters]
    if len(glyphs) != sum(c != "\ufe0f" or ord(c) in characters for c in text) or not glyphs:
        return None
    while len(glyphs) > 1:
        fits = (pair for pair in ligatures.get(glyphs[0], ()) if tuple(glyphs[1 : 1 + len(pair[0])]) == pair[0])
        rest, joined = next(fits, ((), -1))
        if joined < 0:
            # A selector at the end asks for the coloured form, which is the only one that a colour font has.
            return glyphs[0] if glyphs[1:] == [characters.get(0xFE0F)] else None
        glyphs[: 1 + len(rest)] = [joined]
    return glyphs[0]


def _with_map(font: bytes, glyphs: Sequence[int]) -> bytes:
    """The font with a character map that has glyph `glyphs[i]` at FIRST_PRIVATE + i and nothing else."""
    groups = b"".join(struct.pack(">III", FIRST_PRIVATE + i, FIRST_PRIVATE + i, glyph) for i, glyph in enumerate(glyphs))
    subtable = struct.pack(">HHIII", 12, 0, 16 + len(groups), 0, len(glyphs)) + groups
    cmap = struct.pack(">HHHHI", 0, 1, 3, 10, 12) + subtable  # platform 3, encoding 10: all of Unicode
    start = -(-len(font) // 4) * 4
    changed = bytearray(font.ljust(start, b"\0") + cmap)
    struct.pack_into(">II", changed, _directory(font)["cmap"][0] + 8, start, len(cmap))
    return bytes(changed)


def draw(font: bytes, texts: Sequence[str], size: int, points: int) -> Iterator[bytes | None]:
    """Each text as the bytes of a `size` × `size` picture on white, the glyph `points` pixels high in its middle.

    None where the font has no glyph for it, or a blank one. The pictures are uncompressed (BMP), since what a compressor makes
    of the same pixels depends on its version. Raises ValueError where the font lacks a table that is needed,
    struct.error where one is cut off, OSError where FreeType cannot read it.
    """
    tables = {name: font[start : start + length] for name, (_, start, length) in _directory(font).items()}
    if lacking := [name for name in ("cmap", "GSUB") if name not in tables]:
        raise ValueError(f"the font has no table {lacking[0]!r}")
    characters, ligatures = _characters(tables["cmap"]), _ligatures(tables["GSUB"])
    glyphs = [_glyph(text, characters, ligatures) for text in texts]
    known = [glyph for glyph in glyphs if glyph is not None]
    pen_font = ImageFont.truetype(io.BytesIO(_with_map(font, known)), points, layout_engine=ImageFont.Layout.BASIC)
    place = iter(range(len(known)))
    for glyph in glyphs:
        if glyph is None:
            yield None
            continue
        picture = Image.new("RGB", (size, size), "white")
        pen = ImageDraw.Draw(picture)
        code = chr(FIRST_PRIVATE + next(place))
        pen.text((size / 2, size / 2), code, font=pen_font, embedded_color=True, anchor="mm")
        if all(low == high for low, high in picture.getextrema()):  # type: ignore[misc]
            yield None
            continue
        content = io.BytesIO()
        picture.save(content, "BMP")
        yield content.getvalue()
