"""Samples in a temporary file: they are what was given, and holding them takes no memory for their texts."""

from __future__ import annotations

import json
import os
import tempfile
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmllm.data import stored
from fedmllm.data.images import StoredPicture
from fedmllm.data.loading import read_split
from fedmllm.data.manifest import pooled
from fedmllm.data.samples import Sample
from fedmllm.data.stored import Samples
from fedmllm.data.tasks.jsonl import jsonl
from fedmllm.errors import DataError

TEXT = st.text(max_size=12)
IDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
PICTURES = st.sampled_from([None, Path("a.png"), Path("b.png"), b"bytes", StoredPicture("d", lambda: b"")])
SAMPLES = st.builds(
    Sample, IDS, TEXT, TEXT, PICTURES, st.none() | TEXT, st.none() | st.lists(TEXT).map(tuple), st.booleans(), TEXT, TEXT, TEXT,
    st.none() | st.booleans(),
)  # fmt: skip


@given(st.lists(SAMPLES, max_size=8), st.data())
def test_samples_are_what_was_given(samples: list[Sample], data: st.DataObject) -> None:
    held = Samples.of(iter(samples))
    assert list(held) == samples
    assert held == samples
    assert [held[i] for i in range(len(samples))] == samples
    assert held[::-2] == samples[::-2]
    assert held.modalities() == [sample.modalities for sample in samples]
    chosen = data.draw(st.lists(st.integers(0, len(samples) - 1), max_size=8) if samples else st.just([]))
    part = held.take(chosen)
    assert part == [samples[i] for i in chosen]
    assert part.ordered() == sorted(part, key=lambda sample: sample.id)
    ids = [sample.id for sample in part]
    assert sorted(part.repeated().tolist()) == [i for i, name in enumerate(ids) if name in ids[:i]]
    for sample in part:
        assert part.ordered().find(sample.id).id == sample.id
    with pytest.raises(KeyError):
        part.ordered().find("no such id")
    unique = part.take(np.setdiff1d(np.arange(len(part)), part.repeated()))
    assert unique.places(unique.ordered().ids).tolist() == sorted(range(len(unique)), key=lambda i: unique[i].id)


def million(folder: Path, lines: int) -> Path:
    """A file of so many lines of about 1.2 kB each."""
    words = "what is seen in this picture and what else there is to say about it, at some length; " * 12
    with (folder / "train.jsonl").open("w") as file:
        for i in range(lines):
            line = {"id": f"train-{i:06d}", "text": f"{i} {words}", "question": "which?", "answer": "ab"[i % 2]}
            file.write(json.dumps(line) + "\n")
    return folder / "train.jsonl"


def test_a_sample_takes_few_bytes_of_memory_whatever_its_text(tmp_path: Path) -> None:
    lines = 5000
    path = str(million(tmp_path, lines))
    read_split(jsonl(train=path, test=path), "train")  # what is imported and remembered once
    tracemalloc.start()
    try:
        samples = read_split(jsonl(train=path, test=path), "train").samples
        manifest = pooled(samples)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(samples) == len(manifest) == lines
    assert samples[lines - 1].text is not None
    assert held < 100 * lines, f"{held / lines:.0f} bytes a sample"
    assert peak < 200 * lines + (3 << 20), f"{peak / lines:.0f} bytes a sample at the peak"  # and the buffer for texts


def test_no_space_for_the_texts_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    samples = [Sample("a", "q", "yes", text="long " * 500)]
    monkeypatch.setattr(stored, "_BUFFER", 1000)
    assert Samples.of(samples) == samples
    for module, name in ((os, "write"), (tempfile, "TemporaryFile")):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, full)
            with pytest.raises(
                DataError, match=r"temporary file \(No space left on device\); set the environment variable TMPDIR"
            ):
                Samples.of(samples)


def test_pictures_of_equal_content_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = Sample("a", "q", "yes", image=Path("a.png"))
    held = Samples.of([sample, replace(sample, id="b"), replace(sample, id="c", image=None)])
    assert held.images == [Path("a.png")]
    assert held.image.tolist() == [0, 0, -1]
