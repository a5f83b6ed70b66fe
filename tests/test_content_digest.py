"""The digest by which a run that is resumed notices that its data were changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fedmllm.data.dataset import Dataset
from fedmllm.data.manifest import Manifest
from fedmllm.data.samples import Sample, Task
from fedmllm.data.stored import Samples

SAMPLE = Sample("a", "what is it?", "cat", text="a tweet", choices=("cat", "dog"), label="cat", where="data.jsonl, line 1")


def digest(*train: Sample, test: tuple[Sample, ...] = (), of_rounds: tuple[Sample, ...] | None = None) -> str:
    task, manifest = Task("t", "accuracy", lambda split: iter(())), Manifest.of([], 1)
    return Dataset(task, Samples.of(train), test, 0, manifest, of_rounds=of_rounds).content_digest()


@pytest.mark.parametrize(
    "changed",
    [
        {"id": "b"}, {"question": "what?"}, {"answer": "dog"}, {"text": "another tweet"}, {"text": None},
        {"choices": ("cat", "cow")}, {"lettered": True}, {"closed": False}, {"label": "dog"}, {"image": b"picture"},
    ],
)  # fmt: skip
def test_it_changes_with_what_a_sample_contains(changed: dict[str, object]) -> None:
    other = replace(SAMPLE, **changed)  # type: ignore[arg-type]
    assert digest(other) != digest(SAMPLE)
    assert digest(SAMPLE, test=(other,)) != digest(SAMPLE, test=(SAMPLE,)), "test samples count too"
    assert digest(SAMPLE, of_rounds=(other,)) != digest(SAMPLE, of_rounds=(SAMPLE,)), "and what rounds are scored on"


def test_a_picture_counts_by_its_bytes_or_by_its_name_and_size(tmp_path: Path) -> None:
    assert digest(replace(SAMPLE, image=b"one")) != digest(replace(SAMPLE, image=b"two"))
    for folder, content in (("here", b"one"), ("there", b"one"), ("larger", b"three")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.png").write_bytes(content)
    here, there, larger = (digest(replace(SAMPLE, image=tmp_path / f / "x.png")) for f in ("here", "there", "larger"))
    assert here == there, "the folder may have been moved"
    assert here != larger
    (tmp_path / "here" / "x.png").unlink()
    assert digest(replace(SAMPLE, image=tmp_path / "here" / "x.png")) not in (here, larger)


def test_the_place_of_a_sample_in_its_file_does_not_count() -> None:
    assert digest(replace(SAMPLE, where="moved/data.jsonl, line 2")) == digest(SAMPLE)
