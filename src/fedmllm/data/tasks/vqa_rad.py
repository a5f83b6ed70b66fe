"""VQA-RAD: clinicians' questions about radiology images (Lau et al. 2018, Scientific Data 5:180251).

The published folder contains `VQA_RAD Dataset Public.json`, a list of
`{qid, phrase_type, image_name, question, answer, answer_type, question_type, image_organ, …}`, and `VQA_RAD Image Folder/`.
The file holds both splits: entries with the `phrase_type` freeform or para are for training, those with test_freeform or
test_para for testing. An answer may be a number. The label of a sample is `question_type`, and its source is `image_organ`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fedmllm.data.files import Entry, EntryError, find_file, json_list, path_inside, samples_of
from fedmllm.data.medical_questions import read_answer
from fedmllm.data.samples import Problem, Sample, Split, Task
from fedmllm.data.tasks import tasks

FILE, PICTURES = "VQA_RAD Dataset Public.json", "VQA_RAD Image Folder"
PHRASES: dict[str, Split] = {"freeform": "train", "para": "train", "test_freeform": "test", "test_para": "test"}


def split_of(entry: Entry | Problem) -> Split:
    """The split of an entry. An entry without one is a bad sample of the training split only, so that it is counted once."""
    phrase = entry.values.get("phrase_type") if isinstance(entry, Entry) else None
    return PHRASES.get(phrase.strip(), "train") if isinstance(phrase, str) else "train"


def _sample(entry: Entry, folder: Path) -> Sample:
    if (phrase := entry.text("phrase_type")) not in PHRASES:
        raise EntryError(f"'phrase_type' is {phrase!r}, which is not one of {', '.join(PHRASES)}")
    answer, choices, closed = read_answer(entry)
    return Sample(
        id=f"vqa-rad/{entry.text('qid')}",
        question=entry.text("question"),
        answer=answer,
        image=path_inside(folder, PICTURES, entry.text("image_name")),
        choices=choices,
        label=entry.text("question_type", required=False).upper() or "OTHER",
        source=entry.text("image_organ", required=False),
        where=entry.where,
        closed=closed,
    )


@tasks.register("vqa-rad")
def vqa_rad(*, data_dir: str) -> Task:
    """Questions about radiology images; the published files in `data_dir`; accuracy on closed and open questions."""

    def load(split: Split) -> Iterator[Sample | Problem]:
        entries = json_list(find_file("vqa-rad", data_dir, FILE))
        return samples_of((e for e in entries if split_of(e) == split), lambda entry: _sample(entry, Path(data_dir)))

    return Task("vqa-rad", "accuracy", load)
