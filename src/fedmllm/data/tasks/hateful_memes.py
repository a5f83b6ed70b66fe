"""Hateful Memes: is an image with its caption hateful? (Kiela et al. 2020, 2005.04790.)

The published folder contains `train.jsonl`, `dev_seen.jsonl`, `test_seen.jsonl` and others, with lines such as
`{"id": 42953, "img": "img/42953.png", "label": 0, "text": "…"}`, and the images in `img/`. These files have `label` 0 or 1;
`test.jsonl` of the challenge's first phase has no labels and cannot be used.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from fedmllm.data.files import Entry, EntryError, find_file, json_lines, path_inside, samples_of
from fedmllm.data.samples import Problem, Sample, Split, Task
from fedmllm.data.tasks import tasks

CHOICES = ("not hateful", "hateful")  # in the order of the published labels 0 and 1


def _sample(entry: Entry, folder: Path) -> Sample:
    label = entry.values.get("label")
    if isinstance(label, bool) or label not in (0, 1):
        raise EntryError(f"'label' must be 0 or 1, not {label!r}" if "label" in entry.values else "'label' is missing")
    return Sample(
        id=f"hateful-memes/{entry.text('id')}",
        question="is this meme hateful?",
        answer=CHOICES[int(label)],
        image=path_inside(folder, entry.text("img")),
        text=entry.text("text", required=False) or None,
        choices=CHOICES,
        lettered=True,
        label=CHOICES[int(label)],
        source="hateful-memes",
        where=entry.where,
    )


@tasks.register("hateful-memes")
def hateful_memes(
    *, data_dir: str, test_set: Literal["test_seen", "test_unseen", "dev_seen", "dev_unseen"] = "test_seen"
) -> Task:
    """Memes that are hateful or not; the published files in `data_dir`; AUC."""

    def load(split: Split) -> Iterator[Sample | Problem]:
        path = find_file("hateful-memes", data_dir, "train.jsonl" if split == "train" else f"{test_set}.jsonl")
        return samples_of(json_lines(path), lambda entry: _sample(entry, Path(data_dir)))

    return Task("hateful-memes", "auc", load, positive="hateful")
