"""Pictures and texts that are there but bad."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from commands import run
from fedmllm.data import manifest as manifests
from fedmllm.data.corruptions import KINDS, SEVERITIES, OtherTexts, corrupted
from fedmllm.data.dealing import draw
from fedmllm.data.images import decode
from fedmllm.data.manifest import Manifest
from fedmllm.data.partitions import partitions
from fedmllm.data.samples import Sample
from fedmllm.data.scenarios import composed, scenarios
from fedmllm.errors import ConfigError, DataError
from fedmllm.rng import stream
from helpers import sample

TEXT = "the quick brown fox jumps over the lazy dog and runs away from it all day long until night falls"
OTHERS = OtherTexts(
    ["one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"]
)
IMAGES, TEXTS = KINDS["image"], KINDS["text"]


def picture(size: tuple[int, int] = (48, 32)) -> bytes:
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    pixels = np.stack([(x * 5) % 256, (y * 7) % 256, ((x // 4 + y // 4) % 2) * 255], axis=-1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


SAMPLE = replace(sample("s"), image=picture(), text=TEXT)


def distance(worse: Sample) -> float:
    assert worse.image is not None
    assert SAMPLE.image is not None
    pixels = [np.asarray(decode(image), dtype=np.float64) for image in (worse.image, SAMPLE.image)]
    return float(np.abs(pixels[0] - pixels[1]).mean())


@pytest.mark.parametrize("kind", IMAGES)
def test_a_picture_gets_worse_with_severity(kind: str) -> None:
    distances = [np.mean([distance(corrupted(SAMPLE, "image", kind, s, seed)) for seed in range(5)]) for s in SEVERITIES]
    assert distances[0] > 0
    assert distances == sorted(distances)
    worse = corrupted(SAMPLE, "image", kind, 5, 0)
    assert worse == corrupted(SAMPLE, "image", kind, 5, 0)
    assert worse.text == TEXT
    assert worse.image is not None
    assert decode(worse.image).size == (48, 32)


@pytest.mark.parametrize("kind", TEXTS)
def test_a_text_loses_more_words_with_severity(kind: str) -> None:
    changed = []
    for severity in SEVERITIES:
        texts = [corrupted(SAMPLE, "text", kind, severity, seed, OTHERS).text or "" for seed in range(20)]
        kept = [sum((Counter(TEXT.split()) & Counter(text.split())).values()) for text in texts]
        if "dropped" in kind or "typos" in kind or "other" in kind:
            changed.append(20 - np.mean(kept))
        else:  # only the order changes
            assert kept == [20] * 20
            changed.append(np.mean([sum(a != b for a, b in zip(TEXT.split(), text.split(), strict=True)) for text in texts]))
    assert changed[0] > 0
    assert changed == sorted(changed)
    assert corrupted(SAMPLE, "text", kind, 3, 0, OTHERS).image == SAMPLE.image


@pytest.mark.parametrize(("kind", "words"), [("dropped-words", 12), ("other-text", 12)])
def test_the_stated_share_of_words_is_affected(kind: str, words: int) -> None:
    text = corrupted(SAMPLE, "text", kind, 5, 0, OTHERS).text
    assert text is not None
    assert len(set(TEXT.split()) - set(text.split())) <= words
    assert sum((Counter(TEXT.split()) & Counter(text.split())).values()) == 20 - words


@pytest.mark.parametrize("modality", ["image", "text"])
def test_severity_0_and_a_missing_modality_change_nothing(modality: Any) -> None:
    for kind in KINDS[modality]:
        assert corrupted(SAMPLE, modality, kind, 0, 0) is SAMPLE
        without = replace(SAMPLE, **{modality: None})
        assert corrupted(without, modality, kind, 5, 0) is without
        for short in ("", "x", "x y"):
            assert isinstance(corrupted(replace(SAMPLE, text=short), modality, kind, 5, 0).text, str)
    for size in ((1, 1), (1, 9)):
        small = replace(SAMPLE, image=picture(size))
        assert all(corrupted(small, "image", kind, 5, 0).image for kind in IMAGES)


@given(st.lists(st.sampled_from("abc"), max_size=9), st.sampled_from(["a", "b", "d", None]), st.integers(0, 9))
def test_another_text_is_drawn_as_if_all_that_differ_were_listed(texts: list[str], own: str | None, seed: int) -> None:
    different = [text for text in texts if text != own]
    expected = different[int(stream(seed, "x").integers(len(different)))] if different else None
    assert OtherTexts(texts).draw(own, stream(seed, "x")) == expected


def test_unknown_kinds_and_severities_are_refused() -> None:
    with pytest.raises(ValueError, match="there is no corruption 'typos' of images; choose among blur"):
        corrupted(SAMPLE, "image", "typos", 1, 0)
    with pytest.raises(ValueError, match="severity = 6 must be from 0 to 5"):
        corrupted(SAMPLE, "image", "blur", 6, 0)


# The scenario

SAMPLES = [replace(sample(f"s{i:04d}"), label="ab"[i % 2]) for i in range(1000)]


def drawn(**options: object) -> Manifest:
    return draw(SAMPLES, partitions.build("iid", {}), scenarios.build("noisy", options), 10, 1, 0)


def test_a_share_of_each_modality_is_corrupted(tmp_path: Path) -> None:
    manifest = drawn(share=0.3, severity=2, text=["typos"])
    kinds = Counter(bad for noise in manifest.noise.values() for bad in noise)
    assert sum(n for (modality, _, _), n in kinds.items() if modality == "image") == pytest.approx(300, abs=60)
    assert kinds["text", "typos", 2] == pytest.approx(300, abs=60)
    assert {kind for modality, kind, _ in kinds if modality == "image"} == set(IMAGES)
    assert manifest.patterns().sum(axis=0).tolist() == [1000, 0, 0, 0]
    manifest.write(tmp_path / "m.parquet")
    again = manifests.read(tmp_path / "m.parquet")
    assert again == manifest
    assert [h.noise for h in again] == [h.noise for h in manifest]
    assert manifest.digest() != drawn(share=0.3, severity=3, text=["typos"]).digest()


def test_at_severity_0_the_manifest_is_that_of_aligned() -> None:
    aligned = draw(SAMPLES, partitions.build("iid", {}), scenarios.build("aligned", {}), 10, 1, 0)
    assert drawn(severity=0) == drawn(share=0.0) == drawn(image=[], text=[]) == aligned
    assert drawn(severity=0).digest() == aligned.digest()


def test_noise_is_laid_over_what_is_left() -> None:
    noise = scenarios.build("noisy", {"share": 1.0})
    laid = composed(scenarios.build("missing", {"rate": 0.5}), [("noisy", noise)])
    manifest = draw(SAMPLES, partitions.build("iid", {}), laid, 10, 1, 0)
    assert all({modality for modality, _, _ in h.noise} == h.visible for h in manifest)
    with pytest.raises(ValueError, match="two of the scenarios corrupt samples"):
        composed(noise, [("noisy", noise)])


@pytest.mark.parametrize(
    "options", [{"share": 1.1}, {"severity": 6}, {"severity": -1}, {"image": ["typos"]}, {"text": "typos"}]
)
def test_options_out_of_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"^scenario"):
        scenarios.build("noisy", options)


def test_a_damaged_column_is_refused(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    path = tmp_path / "m.parquet"
    drawn().write(path)
    table = pq.read_table(path)
    for wrong in ("nonsense", "image blur x", "image blur 1;"):
        column = [wrong, *table.column("noise").to_pylist()[1:]]
        pq.write_table(table.set_column(4, "noise", [column]), path)
        with pytest.raises(DataError, match=r"manifest|digest"):
            manifests.read(path)


def test_noise_changes_what_is_trained(
    write_experiment: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    file = write_experiment(rounds=1)
    settings = ["--set", "scenario.name=aligned", "--set", "train.cohort=1"]
    clean = run("run", file, *settings, "--out", "clean")
    none = run("run", file, "--set", "scenario.name=noisy", "--set", "scenario.severity=0", *settings[2:], "--out", "none")
    noisy = run("run", file, "--set", "scenario.name=noisy", "--set", "scenario.share=1.0", *settings[2:], "--out", "noisy")
    assert none["adapter_sha256"] == clean["adapter_sha256"] != noisy["adapter_sha256"]
    assert noisy["modalities"]["drawn"] == clean["modalities"]["drawn"]
