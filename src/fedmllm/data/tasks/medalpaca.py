"""MedAlpaca's flashcards: medical questions and answers in text alone (Han et al. 2023, 2304.08247).

The published file `medical_meadow_wikidoc_medical_flashcards.json` is a list of `{instruction, input, output}` and has no test
split: it is the text-only companion of `vqa-rad`. `input` is the text, which a scenario may hide, and `instruction` the
question; a card without input has its instruction as the text. A card's id is its index in the file.
"""

from __future__ import annotations

from collections.abc import Iterator

from fedmllm.data.files import Entry, find, json_list, samples_of
from fedmllm.data.samples import Problem, Sample, Split, Task
from fedmllm.data.tasks import tasks

FILE = "medical_meadow_wikidoc_medical_flashcards.json"


def _sample(entry: Entry) -> Sample:
    instruction, given = entry.text("instruction", required=False), entry.text("input", required=False)
    return Sample(
        id=f"medalpaca/{entry.index:05d}",
        question=instruction if given else "",
        answer=entry.text("output", required=False),
        text=given or entry.text("instruction"),
        label="medalpaca",
        source="medalpaca",
        where=entry.where,
        closed=False,
    )


@tasks.register("medalpaca")
def medalpaca(*, data_dir: str) -> Task:
    """Medical flashcards, text alone and for training alone: the companion of vqa-rad, from the file in `data_dir`."""

    def load(split: Split) -> Iterator[Sample | Problem]:
        return samples_of(json_list(find("medalpaca", data_dir, FILE)) if split == "train" else (), _sample)

    return Task("medalpaca", "accuracy", load, splits=("train",))
