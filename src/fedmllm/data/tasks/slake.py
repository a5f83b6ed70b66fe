"""SLAKE: questions about medical pictures in English and Chinese (Liu et al. 2021, 2102.09542).

The published folder: `train.json`, `validate.json` (`validation.json` in the copy on the hub) and `test.json`, each a list of
`{img_id, img_name ("xmlab1/source.jpg"), question, answer, q_lang, answer_type, content_type, modality, location, qid, …}`,
and the pictures in `imgs/`. One language is read at a time. The label of a sample is the type of its content, its source the
place in the body.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from fedmllm.data.files import Entry, EntryError, find, inside, json_list, samples_of
from fedmllm.data.questions import answer_of
from fedmllm.data.samples import Problem, Sample, Split, Task
from fedmllm.data.tasks import tasks

LANGUAGES = ("en", "zh")


def _sample(entry: Entry, folder: Path, language: str) -> Sample | None:
    spoken = entry.text("q_lang").lower()
    if spoken not in LANGUAGES:
        raise EntryError(f"'q_lang' is {spoken!r}, neither en nor zh")
    if spoken != language:
        return None
    answer, choices, closed = answer_of(entry)
    return Sample(
        id=f"slake/{entry.text('qid')}",
        question=entry.text("question"),
        answer=answer,
        image=inside(folder, "imgs", entry.text("img_name")),
        choices=choices,
        label=entry.text("content_type", required=False) or "other",
        source=entry.text("location", required=False),
        where=entry.where,
        closed=closed,
    )


@tasks.register("slake")
def slake(
    *, data_dir: str, language: Literal["en", "zh"] = "en", test_set: Literal["test", "validate", "validation"] = "test"
) -> Task:
    """Questions about medical pictures, from the published files in `data_dir`; accuracy, closed and open."""

    def load(split: Split) -> Iterator[Sample | Problem]:
        entries = json_list(find("slake", data_dir, "train.json" if split == "train" else f"{test_set}.json"))
        return samples_of(entries, lambda entry: _sample(entry, Path(data_dir), language))

    return Task("slake", "accuracy", load)
