"""Questions that people put to a trained model: one, or a file of them, with or without the right answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fedmllm.data.files import EntryError, parse_choices, path_inside
from fedmllm.data.images import Images
from fedmllm.data.loading import read_split
from fedmllm.data.samples import Problem, Sample, Task
from fedmllm.data.tasks.jsonl import KEYS, entries_of, sample_of
from fedmllm.errors import DataError, suggest

UNKNOWN = "?"
"""Stands for the right answer to a question without choices, if it is not known."""


@dataclass(frozen=True)
class Usual:
    """What a task asks about every sample: the question and the choices, each None if they differ between samples, and whether
    choices are lettered."""

    question: str | None = None
    choices: tuple[str, ...] | None = None
    lettered: bool = False

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Usual:
        questions, choices = {sample.question for sample in samples}, {sample.choices for sample in samples}
        return cls(
            questions.pop() if len(questions) == 1 else None,
            choices.pop() if len(choices) == 1 else None,
            bool(samples) and all(sample.lettered for sample in samples if sample.choices),
        )

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Usual:
        choices = value["choices"]
        return cls(value["question"], tuple(choices) if choices is not None else None, value["lettered"])

    def to_json(self) -> dict[str, Any]:
        return {"question": self.question, "choices": list(self.choices) if self.choices else None, "lettered": self.lettered}


def question(
    usual: Usual,
    image: Images | None = None,
    text: str | None = None,
    question: str | None = None,
    choices: Sequence[str] | None = None,
) -> Sample:
    """One question about a picture, a text, both or neither; what is not given is what the task usually asks.

    The usual choices belong to the usual question. Raises DataError if there is no question, or for an unusable picture or
    choices.
    """
    try:
        offered = parse_choices(list(choices), "the choices") if choices else usual.choices if question is None else None
    except EntryError as error:
        raise DataError(f"{error}.") from None
    asked = usual.question if question is None else question
    lettered = usual.lettered and offered is not None
    if not asked and not lettered:
        raise DataError("the questions of this run's task differ from sample to sample; give yours as --question.")
    answer = offered[0] if offered else UNKNOWN
    sample = Sample("question", asked or "", answer, image, text or None, offered, lettered, where="your question")
    return _checked([sample])[0]


def read_questions(path: Path, usual: Usual) -> tuple[list[Sample], frozenset[str]]:
    """The questions of a JSON-lines or CSV file in its order, and the ids of those whose right answer it gives.

    The keys are those of the task `jsonl`; the answer and the id are optional, and the question is if the task asks always the
    same. Raises DataError for the first line that cannot be used.
    """
    samples, known = [], set()
    for entry in entries_of(path):
        if isinstance(entry, Problem):
            raise DataError(f"{entry}.")
        line = dict(entry.values)
        if unknown := next((key for key in line if key not in KEYS), None):
            raise DataError(f"{entry.where}: unknown key {unknown!r}; {suggest(unknown, KEYS)}")
        line.setdefault("id", str(entry.index))
        if line.get("question") is None and line.get("choices") is None and usual.choices is not None:
            line["choices"] = list(usual.choices)
        if line.get("question") is None:
            line["question"] = usual.question
        given = line.get("answer") is not None
        if not given:
            choices = line.get("choices")
            line["answer"] = choices[0] if isinstance(choices, list) and choices else UNKNOWN
        try:
            sample = sample_of(replace(entry, values=line), partial(path_inside, path.parent), usual.lettered)
        except EntryError as error:
            raise DataError(f"{entry.where}: {error}.") from None
        samples.append(sample)
        known |= {sample.id} if given else set()
    if not samples:
        raise DataError(f"{path}: there is no question in it; write one JSON object per line.")
    return _checked(samples), frozenset(known)


def _checked(samples: Sequence[Sample]) -> list[Sample]:
    """The samples, cleaned, in their order. Raises DataError for one that cannot be used."""
    task = Task("questions", "accuracy", lambda split: samples)
    loaded = read_split(task, "test")
    if loaded.problems:
        raise DataError(f"{loaded.problems[0]}.")
    usable = {sample.id: sample for sample in loaded.samples}
    return [usable[sample.id] for sample in samples]
