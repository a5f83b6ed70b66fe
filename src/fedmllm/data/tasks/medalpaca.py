"""MedAlpaca's flashcards: medical questions and answers without images (Han et al. 2023, 2304.08247).

The published file `medical_meadow_wikidoc_medical_flashcards.json` is a list of `{instruction, input, output}` without a test
split; it serves as the text-only companion of `vqa-rad`. `input` is the text, which a scenario may hide, and `instruction` is
the question; for a card without input, the instruction is the text. The id of a card is its index in the file.
"""

from __future__ import annotations

from collections.abc import Iterator

from fedmllm.data.files import Entry, find_file, json_list, samples_of
from fedmllm.data.samples import Problem, Sample, Split, Task
from fedmllm.data.tasks import tasks

FILE = "medical_meadow_wikidoc_medical_flashcards.json"


def _sample(entry: Entry) -> Sample:
    instruction, text = entry.text("instruction", required=False), entry.text("input", required=False)
    return Sample(
        id=f"medalpaca/{entry.index:05d}",
        question=instruction if text else "",
        answer=entry.text("output", required=False),
        text=text or entry.text("instruction"),
        label="medalpaca",
        source="medalpaca",
        where=entry.where,
        closed=False,
    )


@tasks.register("medalpaca")
def medalpaca(*, data_dir: str) -> Task:
    """Medical flashcards, text only and for training only, as the companion of vqa-rad; the published file in `data_dir`."""

    def load(split: Split) -> Iterator[Sample | Problem]:
        return samples_of(json_list(find_file("medalpaca", data_dir, FILE)) if split == "train" else (), _sample)

    return Task("medalpaca", "accuracy", load, splits=("train",))
