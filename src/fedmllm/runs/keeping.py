"""Which model a run ends with: that of the last round, that of the best score, or the mean of the last ones.

Scores are read from the records of the rounds, so a resumed run knows them all. The models that may still be kept are in the
checkpoint, beside the server's state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedmllm.config import TrainTable
from fedmllm.tensors import State, weighted_mean

MEAN_OF = 5
_MODEL = ("adapter", "fold")
"""The groups of the server's state that make up its model."""
_PREFIX = "kept-"

Score = Callable[[dict[str, dict[str, Any]]], float]
"""The score of the metrics of a round."""


def scores_of(records: Sequence[Mapping[str, Any]], score: Score) -> dict[int, float]:
    """round -> its score, in order, for the rounds that have one."""
    return {record["round"]: score(record["metrics"]) for record in records if record.get("metrics")}


def best_round(scores: Mapping[int, float]) -> int:
    """The first round with the highest score; NaN is lower than any."""
    return max(scores, key=lambda number: -math.inf if math.isnan(scores[number]) else scores[number])


def kept_rounds(train: TrainTable, records: Sequence[Mapping[str, Any]], score: Score) -> list[int]:
    """The rounds, counted from 0, whose models make up the one that is kept; empty if nothing was trained."""
    if train.keep == "best" and records:
        return [best_round(scores_of(records, score))]
    count = (train.mean_of or MEAN_OF) if train.keep == "mean" else 1
    return list(range(len(records)))[-count:]


@dataclass
class Keeping:
    """`rounds` is the number of planned rounds, `scores` has those of the rounds so far, and `models` the groups adapter and
    fold of the rounds whose models may be kept."""

    train: TrainTable
    rounds: int
    scores: dict[int, float]
    models: dict[int, State]

    @classmethod
    def resumed(cls, train: TrainTable, rounds: int, scores: dict[int, float], saved: State) -> tuple[Keeping, State]:
        """What was kept when `saved` was written, and the rest of it, which is the server's state."""
        state, models = State(), dict[int, State]()
        for group, tensors in saved.items():
            if group.startswith(_PREFIX):
                number, _, own = group.removeprefix(_PREFIX).partition("-")
                models.setdefault(int(number), {})[own] = tensors
            else:
                state[group] = tensors
        return cls(train, rounds, scores, dict(sorted(models.items()))), state

    def add(self, number: int, score: float | None, state: State) -> None:
        """Consider the model after a round, which has a score if it was evaluated."""
        if score is not None:
            self.scores[number] = score
        model = {group: state[group] for group in _MODEL if group in state}
        if self.train.keep == "best" and score is not None and best_round(self.scores) == number:
            self.models = {number: model}
        if self.train.keep == "mean":
            count = self.train.mean_of or MEAN_OF
            if self.train.patience is not None or number >= self.rounds - count:  # earlier ones cannot be among the last
                self.models = dict([*self.models.items(), (number, model)][-count:])

    @property
    def groups(self) -> State:
        """The models, as groups that are saved beside the server's state."""
        return {f"{_PREFIX}{number}-{group}": t for number, model in self.models.items() for group, t in model.items()}

    @property
    def exhausted(self) -> bool:
        """Whether so many evaluations in a row did not improve the score that no further round follows."""
        patience = self.train.patience
        return bool(patience and self.scores and sum(n > best_round(self.scores) for n in self.scores) >= patience)

    def why_stopped(self, done: int) -> str:
        best = best_round(self.scores)
        return (
            f"stopped after {done} of {self.rounds} rounds: {self.train.patience} evaluations have not improved on "
            f"{100 * self.scores[best]:.1f} % after round {best + 1}"
        )

    def model(self, state: State) -> State:
        """The server's state after the last round, with the model that is kept in place of its own."""
        if not self.models:
            return state
        models = list(self.models.values())
        kept = models[-1]
        if len(models) > 1:
            kept = {**kept, "adapter": weighted_mean([model["adapter"] for model in models], [1.0] * len(models))}
        return {**{group: tensors for group, tensors in state.items() if group not in _MODEL}, **kept}
