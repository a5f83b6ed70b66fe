from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedmllm.data.samples import Problem, Sample, collect, decode, image_key
from fedmllm.errors import DataError
from helpers import png, sample, task

TEXT = sample("t", "text")


def encoded(image: Image.Image, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("kind", "names"), [("both", {"image", "text"}), ("image", {"image"}), ("text", {"text"}), ("none", set())]
)
def test_modalities_are_what_the_sample_has(kind: str, names: set[str]) -> None:
    assert sample("s", kind).modalities == names


def test_samples_come_in_the_order_of_their_ids() -> None:
    loaded = collect(task(*(sample(i, "text") for i in ("b", "c", "a"))), "train", "error")
    assert [s.id for s in loaded.samples] == ["a", "b", "c"]
    assert loaded.skipped == []


BAD = [
    (sample("x", "text", answer=""), "id 'x': the answer is empty"),
    (sample("x", "text", choices=("no", "maybe")), "id 'x': the answer 'yes' is not among the choices no, maybe"),
    (sample("x", "none", image=Path("nowhere.png")), "id 'x': the picture nowhere.png is missing"),
    (sample("x", "none", image=b"no picture"), "id 'x': the picture (in memory) cannot be decoded ("),
    (sample("x", "none", image=png()[:40]), "id 'x': the picture (in memory) cannot be decoded ("),
    (sample("x", "text", choices=("yes", *"abcdefghijklmnopqrstuvwxyz"), lettered=True),
     "id 'x': 27 choices are more than the 26 letters"),
    (TEXT, "id 't': the id 't' is used twice"),
    (Problem("file, line 3", "it is odd"), "file, line 3: it is odd"),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "message"), BAD)
def test_a_bad_sample_is_an_error_in_one_sentence(bad: Sample | Problem, message: str) -> None:
    with pytest.raises(DataError) as refused:
        collect(task(TEXT, bad), "train", "error")
    prefix = "" if isinstance(bad, Problem) else "fake, "
    assert str(refused.value).startswith(prefix + message)
    assert str(refused.value).endswith('; mend it, or set task.on_bad_sample = "skip" to go on without.')
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("bad", "message"), BAD)
def test_a_bad_sample_is_skipped_and_counted(bad: Sample | Problem, message: str) -> None:
    loaded = collect(task(TEXT, bad, sample("u", "text")), "train", "skip")
    assert [s.id for s in loaded.samples] == ["t", "u"]
    assert len(loaded.skipped) == 1
    assert message in str(loaded.skipped[0])


def test_many_bad_samples_are_counted_and_the_first_one_is_named() -> None:
    odd = sample("x", "text", answer="", where="data.jsonl, line 2")
    with pytest.raises(DataError, match=r"^3 bad samples, the first: data\.jsonl, line 2, id 'x': the answer is empty"):
        collect(task(TEXT, odd, Problem("data.jsonl, line 3", "it is odd"), TEXT), "train", "error")


def test_nothing_usable_is_an_error_even_when_skipping() -> None:
    with pytest.raises(
        DataError, match=r"^task 'fake' has no usable sample in its test split; the first problem: line 1: odd\.$"
    ):
        collect(task(Problem("line 1", "odd")), "test", "skip")
    with pytest.raises(DataError, match=r"^task 'fake' has no usable sample in its train split\.$"):
        collect(task(), "train", "error")


def test_a_picture_that_many_samples_share_is_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, looked = tmp_path / "p.png", []
    path.write_bytes(png())
    monkeypatch.setattr("fedmllm.data.samples.decode", looked.append)
    collect(task(*(sample(str(i), image=path) for i in range(5))), "train", "error")
    assert looked == [path]


def test_only_the_pictures_of_chosen_samples_are_decoded() -> None:
    fine, broken = sample("a", image=png()), sample("b", image=b"no picture")
    seen: list[list[str]] = []

    def choose(samples: list[Sample]) -> list[Sample]:
        seen.append([s.id for s in samples])
        return samples[:1]

    assert collect(task(broken, fine), "train", "error", choose).samples == [fine]
    assert seen == [["a", "b"]], "the choice is made from the samples in the order of their ids"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_pictures_of_any_mode_decode_to_rgb(mode: str) -> None:
    white = Image.new("RGB", (3, 2), (255, 255, 255)).convert(mode)
    decoded = decode(encoded(white, "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"))
    assert (decoded.mode, decoded.size) == ("RGB", (3, 2))
    assert decoded.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_of_grey_keep_their_range(format: str) -> None:
    # X-ray pictures come like this; Pillow's own conversion would make all but the darkest white.
    grey = Image.fromarray(np.array([[0, 0x1234, 0x8000, 0xFFFF]], dtype=np.uint16))
    decoded = decode(encoded(grey, format))
    assert [decoded.getpixel((x, 0)) for x in range(4)] == [(v, v, v) for v in (0, 0x12, 0x80, 0xFF)]


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_of_unknown_range_are_no_black_picture(mode: str) -> None:
    picture = encoded(Image.new(mode, (2, 2), 1), "TIFF")
    with pytest.raises(DataError, match=f"cannot be decoded .*mode {mode}"):
        collect(task(sample("x", image=picture)), "train", "error")


def test_the_same_picture_has_one_key_wherever_it_lies(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png())
    assert image_key(tmp_path / "a.png") == image_key(tmp_path / "b.png") == image_key(png())
    assert image_key(png((0, 0, 0))) != image_key(png())
