from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from fedmllm.data.images import decode, image_key, upright_size
from fedmllm.data.loading import read_split
from fedmllm.data.samples import Problem, Sample
from fedmllm.errors import DataError
from helpers import load_samples, png, sample, task

TEXT = sample("t", "text")


def encoded(image: Image.Image, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("kind", "names"), [("both", {"image", "text"}), ("image", {"image"}), ("text", {"text"}), ("none", set())]
)
def test_modalities_are_those_of_the_sample(kind: str, names: set[str]) -> None:
    assert sample("s", kind).modalities == names


def test_samples_are_ordered_by_id() -> None:
    loaded = load_samples(task(*(sample(i, "text") for i in ("b", "c", "a"))), "train", "error")
    assert [s.id for s in loaded.samples] == ["a", "b", "c"]
    assert loaded.problems == []


BAD = [
    (sample("x", "text", answer=""), "id 'x': the answer is empty"),
    (sample("x", "text", choices=("no", "maybe")), "id 'x': the answer 'yes' is not among the choices no, maybe"),
    (sample("x", "none", image=Path("nowhere.png")), "id 'x': the picture nowhere.png is missing"),
    (sample("x", "none", image=b"no picture"), "id 'x': the picture (in memory) cannot be decoded ("),
    (sample("x", "none", image=png()[:40]), "id 'x': the picture (in memory) cannot be decoded ("),
    (sample("x", "text", choices=("yes", *"abcdefghijklmnopqrstuvwxyz"), lettered=True),
     "id 'x': 27 choices are more than the 26 letters"),
    (sample("x", "text", choices=("yes", "no", "yes\t")), "id 'x': the choice 'yes' occurs twice"),
    (sample("x", "text", answer=" \n"), "id 'x': the answer is empty"),
    (TEXT, "id 't': the id 't' is used twice"),
    (Problem("file, line 3", "it is broken"), "file, line 3: it is broken"),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "message"), BAD)
def test_a_bad_sample_is_an_error_in_one_sentence(bad: Sample | Problem, message: str) -> None:
    with pytest.raises(DataError) as caught:
        load_samples(task(TEXT, bad), "train", "error")
    prefix = "" if isinstance(bad, Problem) else "fake, "
    assert str(caught.value).startswith(prefix + message)
    assert str(caught.value).endswith('; fix it, or set task.on_bad_sample = "skip" to continue without it.')
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("bad", "message"), BAD)
def test_a_bad_sample_is_skipped_and_counted(bad: Sample | Problem, message: str) -> None:
    loaded = load_samples(task(TEXT, bad, sample("u", "text")), "train", "skip")
    assert [s.id for s in loaded.samples] == ["t", "u"]
    assert len(loaded.problems) == 1
    assert message in str(loaded.problems[0])


def test_many_bad_samples_are_counted_and_the_first_one_is_named() -> None:
    bad = sample("x", "text", answer="", where="data.jsonl, line 2")
    with pytest.raises(DataError, match=r"^3 bad samples, the first: data\.jsonl, line 2, id 'x': the answer is empty"):
        load_samples(task(TEXT, bad, Problem("data.jsonl, line 3", "it is broken"), TEXT), "train", "error")


def test_nothing_usable_is_an_error_even_when_skipping() -> None:
    with pytest.raises(
        DataError, match=r"^task 'fake' has no usable sample in its test split; the first problem: line 1: broken\.$"
    ):
        load_samples(task(Problem("line 1", "broken")), "test", "skip")
    with pytest.raises(DataError, match=r"^task 'fake' has no usable sample in its train split\.$"):
        load_samples(task(), "train", "error")


def test_a_picture_shared_by_many_samples_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, decoded_paths = tmp_path / "p.png", []
    path.write_bytes(png())
    monkeypatch.setattr("fedmllm.data.loading.decode", decoded_paths.append)
    load_samples(task(*(sample(str(i), image=path) for i in range(5))), "train", "error")
    assert decoded_paths == [path]


def test_only_the_pictures_of_chosen_samples_are_decoded() -> None:
    fine, broken = sample("a", image=png()), sample("b", image=b"no picture")
    seen: list[list[str]] = []

    def choose(samples: list[Sample]) -> list[Sample]:
        seen.append([s.id for s in samples])
        return samples[:1]

    assert load_samples(task(broken, fine), "train", "error", choose).samples == [fine]
    assert seen == [["a", "b"]], "samples are chosen in the order of their ids"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_pictures_of_any_mode_decode_to_rgb(mode: str) -> None:
    white = Image.new("RGB", (3, 2), (255, 255, 255)).convert(mode)
    decoded = decode(encoded(white, "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"))
    assert (decoded.mode, decoded.size) == ("RGB", (3, 2))
    assert decoded.getpixel((0, 0)) == (255, 255, 255)


LEFT, RIGHT = (200, 30, 30), (30, 30, 200)


def halves(mode: str = "RGB") -> Image.Image:
    """Two pixels high and four wide, the left half red and the right half blue."""
    picture = Image.new("RGB", (4, 2), LEFT)
    picture.paste(RIGHT, (2, 0, 4, 2))
    return picture.convert(mode)


def corners(data: bytes) -> list[str]:
    """The nearest color at the four corners, row by row; JPEG is never exact."""
    picture = decode(data)
    near = {"red": LEFT, "blue": RIGHT, "white": (255, 255, 255)}
    names = []
    for x, y in ((0, 0), (picture.width - 1, 0), (0, picture.height - 1), (picture.width - 1, picture.height - 1)):
        pixel = np.array(picture.getpixel((x, y)), dtype=int)
        names.append(min(near, key=lambda name: int(np.abs(pixel - near[name]).sum())))
    return names


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize(
    ("orientation", "seen"),
    [
        (1, ["red", "blue", "red", "blue"]),
        (2, ["blue", "red", "blue", "red"]),
        (3, ["blue", "red", "blue", "red"]),
        (6, ["red", "red", "blue", "blue"]),  # turned by 90 degrees: the left half is now at the top
        (8, ["blue", "blue", "red", "red"]),
        (77, ["red", "blue", "red", "blue"]),
    ],
)
def test_a_rotation_in_the_exif_data_is_applied(format: str, orientation: int, seen: list[str]) -> None:
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    halves().resize((16, 8), Image.Resampling.NEAREST).save(buffer, format, exif=exif)
    assert corners(buffer.getvalue()) == seen


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP", "ICO"])
@pytest.mark.parametrize("orientation", [None, *range(1, 9), 77])
def test_the_upright_size_is_the_size_after_decoding(format: str, orientation: int | None) -> None:
    buffer, exif = io.BytesIO(), Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    extra = {"sizes": [(48, 32)]} if format == "ICO" else {}
    halves().resize((48, 32)).save(buffer, format, exif=exif, **extra)
    assert upright_size(buffer.getvalue()) == decode(buffer.getvalue()).size
    turned = format in ("JPEG", "PNG", "TIFF", "WEBP") and orientation in (5, 6, 7, 8)
    assert upright_size(buffer.getvalue()) == ((32, 48) if turned else (48, 32))


def late_exif(orientation: int) -> bytes:
    """A PNG with its EXIF data after the pixels, as the format allows."""
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    halves().save(buffer, "PNG", exif=exif)
    data = buffer.getvalue()
    start = data.index(b"eXIf") - 4
    stop = start + 12 + int.from_bytes(data[start : start + 4], "big")
    end = data.index(b"IEND") - 4
    assert stop < data.index(b"IDAT") < end
    return data[:start] + data[stop:end] + data[start:stop] + data[end:]


def test_exif_data_after_the_pixels_are_found() -> None:
    assert decode(late_exif(6)).size == upright_size(late_exif(6)) == (2, 4)
    assert decode(late_exif(3)).size == upright_size(late_exif(3)) == (4, 2)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
def test_the_size_of_a_picture_with_damaged_exif_data() -> None:
    for exif in (b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\0\xff" + b"\x01\x12" * 9):
        buffer = io.BytesIO()
        halves().resize((16, 8)).save(buffer, "JPEG", exif=exif)
        assert upright_size(buffer.getvalue()) == decode(buffer.getvalue()).size


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP", "WEBP"])
def test_the_size_is_read_without_the_pixels(format: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "picture"
    path.write_bytes(encoded(halves(), format))

    def load(self: Image.Image) -> None:
        raise AssertionError("the pixels were read")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    assert upright_size(path) == (4, 2)


def test_damaged_exif_data_do_not_hide_a_whole_picture(tmp_path: Path) -> None:
    for exif in (b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\0\xff" + b"\x01\x12" * 9):
        buffer = io.BytesIO()
        halves().resize((16, 8), Image.Resampling.NEAREST).save(buffer, "JPEG", exif=exif)
        picture = sample("a", image=buffer.getvalue())
        assert load_samples(task(picture), "train", "error").samples == [picture]


def exif(kind: int, count: int, data: bytes) -> bytes:
    """EXIF data whose only entry is an orientation of this type (2 text, 3 a whole number of 16 bits, 5 a fraction, …)."""
    start = b"Exif\0\0II*\0" + struct.pack("<IHHHI", 8, 1, 0x0112, kind, count)
    inline, after = (data.ljust(4, b"\0"), b"") if len(data) <= 4 else (struct.pack("<I", 26), data)
    return start + inline + struct.pack("<I", 0) + after


ORIENTATIONS = {
    "a number": (exif(3, 1, struct.pack("<H", 6)), True),
    "text": (exif(2, 2, b"6\0"), True),
    "text with spaces": (exif(2, 4, b" 6 \0"), True),
    "a word": (exif(2, 4, b"six\0"), False),
    "no letter": (exif(2, 1, b"\0"), False),
    "words": (exif(2, 13, b"Rotate 90 CW\0"), False),
    "a fraction": (exif(5, 1, struct.pack("<II", 6, 1)), True),
    "a fraction of nothing": (exif(5, 1, struct.pack("<II", 6, 0)), False),
    "not a number": (exif(11, 1, struct.pack("<f", float("nan"))), False),
    "infinite": (exif(12, 1, struct.pack("<d", float("inf"))), False),
    "text beyond the eight": (exif(2, 2, b"9\0"), False),
    "bytes": (exif(7, 1, b"\x06"), False),
}


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(("data", "turned"), ORIENTATIONS.values(), ids=ORIENTATIONS)
def test_an_orientation_of_any_type_is_used_or_ignored(data: bytes, turned: bool, format: str) -> None:
    buffer = io.BytesIO()
    halves().resize((16, 8), Image.Resampling.NEAREST).save(buffer, format, exif=data)
    picture = buffer.getvalue()
    assert decode(picture).size == upright_size(picture) == ((8, 16) if turned else (16, 8))
    assert corners(picture) == (["red", "red", "blue", "blue"] if turned else ["red", "blue", "red", "blue"])
    assert load_samples(task(sample("a", image=picture)), "train", "error").problems == []


def test_transparent_parts_are_white() -> None:
    clear = halves("RGBA")
    clear.paste((0, 0, 0, 0), (2, 0, 4, 2))
    assert corners(encoded(clear)) == ["red", "white", "red", "white"]
    half = Image.new("RGBA", (2, 2), (200, 0, 0, 127))
    assert decode(encoded(half)).getpixel((0, 0)) == (228, 128, 128)  # 255 − (255 − c) · 127/255


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_a_palette_with_a_transparent_color(format: str) -> None:
    picture = Image.new("P", (4, 2), 0)
    picture.putpalette([*LEFT, *RIGHT])
    picture.paste(1, (2, 0, 4, 2))
    buffer = io.BytesIO()
    picture.save(buffer, format, transparency=1)
    assert corners(buffer.getvalue()) == ["red", "white", "red", "white"]
    shades = io.BytesIO()
    picture.save(shades, "PNG", transparency=bytes((255, 0)))  # a shade for each colour of the palette
    assert corners(shades.getvalue()) == ["red", "white", "red", "white"]


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_only_the_first_of_several_frames_is_shown(format: str) -> None:
    buffer = io.BytesIO()
    kind = {"lossless": True} if format == "WEBP" else {}
    halves().save(buffer, format, save_all=True, append_images=[Image.new("RGB", (4, 2), "white")], **kind)
    assert corners(buffer.getvalue()) == ["red", "blue", "red", "blue"]


def test_a_cmyk_jpeg_keeps_its_colors() -> None:
    assert corners(encoded(halves("CMYK").resize((32, 16), Image.Resampling.NEAREST), "JPEG")) == ["red", "blue", "red", "blue"]


@pytest.mark.parametrize("pixels", [60, 20])
def test_a_decompression_bomb_is_a_bad_sample(monkeypatch: pytest.MonkeyPatch, pixels: int) -> None:
    # Pillow warns above its limit and raises an error above twice the limit; both must give a bad sample.
    bomb = sample("x", image=encoded(Image.new("RGB", (10, 10))))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels)
    (bad,) = load_samples(task(TEXT, bomb), "train", "skip").problems
    assert bad.kind == "picture too large"
    assert str(bad).endswith(
        f"the picture (in memory) has more than {pixels} pixels, Pillow's limit against decompression bombs; make it smaller"
    )


def test_a_large_picture_below_the_limit_is_fine() -> None:
    large = sample("x", image=encoded(Image.new("1", (6000, 5000))))
    assert load_samples(task(large), "train", "error").samples == [large]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"])
def test_damaged_pictures_are_bad_samples(format: str) -> None:
    whole = encoded(halves().resize((32, 32)), format)
    rng = np.random.default_rng(0)
    pictures = [whole[:cut] for cut in range(0, len(whole), max(1, len(whole) // 25))]
    for _ in range(25):
        damaged = bytearray(whole)
        damaged[int(rng.integers(len(damaged)))] = int(rng.integers(256))
        pictures.append(bytes(damaged))
    loaded = read_split(task(*(sample(str(i), image=data) for i, data in enumerate(pictures))), "train")
    assert len(loaded.samples) + len(loaded.problems) == len(pictures)
    assert {p.kind for p in loaded.problems} <= {"undecodable picture", "picture too large"}
    assert loaded.problems
    assert not any("\n" in str(p) for p in loaded.problems)


def test_a_sample_is_closed_if_the_data_says_so_or_it_has_choices() -> None:
    assert [sample(choices=c, closed=k).is_closed for c in (("yes", "no"), None) for k in (None, True, False)] == [
        True, True, False, False, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_of_grey_keep_their_range(format: str) -> None:
    # X-ray images have 16 bits; Pillow's own conversion would turn all but the darkest pixels white.
    grey = Image.fromarray(np.array([[0, 0x1234, 0x8000, 0xFFFF]], dtype=np.uint16))
    decoded = decode(encoded(grey, format))
    assert [decoded.getpixel((x, 0)) for x in range(4)] == [(v, v, v) for v in (0, 0x12, 0x80, 0xFF)]


STRETCHED = {
    "12 bits": ([0, 1024, 2048, 4095], [0, 64, 128, 255]),
    "10 bits with an offset": ([1000, 1250, 1500, 2000], [0, 64, 128, 255]),
    "8 bits in 16": ([0, 1, 2, 255], [0, 1, 2, 255]),
    "two values": ([30000, 30001, 30001, 30000], [0, 255, 255, 0]),
    "all black": ([0] * 4, [0] * 4),
    "all white": ([65535] * 4, [255] * 4),
    "all of one grey": ([0x1234] * 4, [0x12] * 4),
}


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
@pytest.mark.parametrize(("values", "seen"), STRETCHED.values(), ids=STRETCHED)
def test_grey_of_16_bits_is_stretched_by_its_own_range(values: list[int], seen: list[int], format: str) -> None:
    picture = encoded(Image.fromarray(np.array([values], dtype=np.uint16)), format)
    assert [decode(picture).getpixel((x, 0)) for x in range(4)] == [(v, v, v) for v in seen]
    eight = encoded(Image.fromarray(np.array([values], dtype=np.uint16).astype(np.uint8)), format)
    samples = [sample("a", image=picture), sample("b", image=picture), sample("c", image=eight), sample("d", "text")]
    assert read_split(task(*samples), "train").stretched == 1
    assert read_split(task(*samples[2:]), "train").stretched == 0


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_of_unknown_range_are_an_error(mode: str) -> None:
    picture = encoded(Image.new(mode, (2, 2), 1), "TIFF")
    with pytest.raises(DataError, match=f"cannot be decoded .*mode {mode}"):
        load_samples(task(sample("x", image=picture)), "train", "error")


def test_the_key_of_a_picture_does_not_depend_on_its_path(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png())
    assert image_key(tmp_path / "a.png") == image_key(tmp_path / "b.png") == image_key(png())
    assert image_key(png((0, 0, 0))) != image_key(png())
