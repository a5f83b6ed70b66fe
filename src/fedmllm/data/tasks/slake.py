"""SLAKE: questions about medical images in English and Chinese (Liu et al. 2021, 2102.09542).

The published folder contains `train.json`, `validate.json` (`validation.json` in the copy on the hub) and `test.json`, each a
list of `{img_id, img_name ("xmlab1/source.jpg"), question, answer, q_lang, answer_type, content_type, modality, location, qid,
…}`, and the images in `imgs/`. Only the questions of one language are read. The label of a sample is `content_type`, and its
source is `location`, the part of the body.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from fedmllm.data.files import Entry, EntryError, find_file, json_list, path_inside, samples_of
from fedmllm.data.medical_questions import read_answer
from fedmllm.data.samples import Problem, Sample, Split, Task
from fedmllm.data.tasks import tasks

LANGUAGES = ("en", "zh")


def _sample(entry: Entry, folder: Path, language: str) -> Sample | None:
    entry_language = entry.text("q_lang").lower()
    if entry_language not in LANGUAGES:
        raise EntryError(f"'q_lang' is {entry_language!r}, neither en nor zh")
    if entry_language != language:
        return None
    answer, choices, closed = read_answer(entry)
    return Sample(
        id=f"slake/{entry.text('qid')}",
        question=entry.text("question"),
        answer=answer,
        image=path_inside(folder, "imgs", entry.text("img_name")),
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
    """Questions about medical images; the published files in `data_dir`; accuracy on closed and open questions."""

    def load(split: Split) -> Iterator[Sample | Problem]:
        entries = json_list(find_file("slake", data_dir, "train.json" if split == "train" else f"{test_set}.json"))
        return samples_of(entries, lambda entry: _sample(entry, Path(data_dir), language))

    return Task("slake", "accuracy", load)
