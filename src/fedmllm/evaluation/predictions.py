"""A model's prediction for one test question, and the modality patterns under which questions are put to it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from fedmllm.data.samples import Modality
from fedmllm.kinds import Pattern

PATTERNS: dict[Pattern, frozenset[Modality]] = {
    "both": frozenset(("image", "text")),
    "image": frozenset(("image",)),
    "text": frozenset(("text",)),
}
"""The modalities that a test sample may show under each pattern."""


@dataclass(frozen=True)
class Prediction:
    """One row of `predictions.jsonl`.

    `option` is the index of the chosen option, None for a free answer; an option is `correct` if it is the reference's own, not
    if it reads like it. `score` is the probability of the task's positive answer, None if the sample's choices do not include
    it. `failed` means that the model gave no readable answer. `judged` is a judge's verdict on an open answer, None without a
    readable one. `probabilities` are those of the options; they are for suites and not stored. `probability`, that of the
    chosen option to three digits, is.
    """

    pattern: str
    id: str
    answer: str
    predicted: str
    correct: bool
    closed: bool
    failed: bool
    score: float | None = None
    judged: bool | None = None
    option: int | None = None
    probabilities: tuple[float, ...] = field(default=(), compare=False)
    probability: float | None = field(default=None, compare=False)

    def to_json(self) -> dict[str, Any]:
        line = {name: value for name, value in asdict(self).items() if name != "probabilities"}
        if self.probability is None:  # as for free answers
            del line["probability"]
        return line
