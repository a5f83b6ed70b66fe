"""The tables of the experiment file as frozen models, and the digest that identifies an experiment.

This module checks which tables there are and the settings of the engine. The options of a named part, such as `alpha` of the
Dirichlet partition, are checked by the part's registry when it is built.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import Field, ValidationInfo, field_validator, model_validator

from fedmllm.config.base import BatchSize, FolderName, Named, Positive, Seed, Table, at_most, most_rounds
from fedmllm.config.clients import ClientsTable
from fedmllm.config.model import ModelTable
from fedmllm.config.track import TrackTable
from fedmllm.config.train import TrainTable
from fedmllm.kinds import Match, Pattern

_LOWER_OR_RAISE = "lower the first or raise the second."


class TaskTable(Named):
    train_samples: Positive | None = None
    """Keep only this many training samples, drawn at random; by default all. The draw does not depend on the seed, so that
    different seeds are compared on the same data."""
    test_samples: Positive | None = None
    """In the same way, of the test samples."""
    draw: Annotated[int, Field(ge=0)] | None = None
    """Another draw of the training and test samples, in which every label keeps its share; for a task with an option `seed`,
    that seed. A companion follows. Sweeps with [replicates](statistics.md) set it."""
    balanced: bool | None = None
    """`true`: `train_samples` and `test_samples` keep equally many samples of every label, and all samples of a label that
    has fewer, so that answering the most frequent label gains nothing."""
    on_bad_sample: Literal["error", "skip"] = "error"
    """`"skip"` leaves [bad samples](data.md#what-is-a-bad-sample) out and counts them."""
    companion: TaskTable | None = None
    """A second task, written as a table like this one, whose samples are added, such as the text-only source of a benchmark
    with pictures. It may lack a test split."""


class PartitionTable(Named):
    clients: Annotated[Positive, at_most(1_000_000, "because each has its own state and its own row in the result")] = 10
    """The number of clients."""
    min_samples: Positive = 1
    """Every client gets at least this many samples; no sample is dropped."""


class ScenarioTable(Named):
    then: Annotated[tuple[Named, ...], Field(strict=False)] = ()
    """Further scenarios that are [laid over this one](scenarios.md#options-and-rules), each on what the one before it
    left."""


class EvalTable(Table):
    every: Annotated[int, Field(ge=0), most_rounds] = 0
    """Evaluate after every this many rounds and at the end; 0: only at the end."""
    every_split: Literal["same", "validation"] = "same"
    """Where rounds are scored: on the data of the final test, or on held-out training data, by which [a model can be
    chosen](keeping.md). `rounds.jsonl` and the curves of a report then have these scores."""
    every_samples: Positive | None = None
    """Score rounds on a random subset of this size, the same in every round, which makes `every = 1`
    [cheap](performance.md#what-evaluating-every-round-costs)."""
    patterns: Annotated[tuple[Pattern, ...], Field(strict=False, min_length=1)] = ("both",)
    """Test with `"both"` modalities, with the `"image"` alone, or with the `"text"` alone. A pattern that no test sample has
    is refused."""
    split: Literal["test", "validation"] = "test"
    """`"validation"` evaluates on held-out training data instead of the test set, for choosing settings."""
    validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """The share of the training data that is held out for `split` or `every_split`, the same samples for both."""
    batch_size: BatchSize = 64
    """Questions per forward pass."""
    match: Match = "exact"
    """[When a free answer is right](scoring.md#when-two-answers-are-the-same), and which answers are of one class."""
    bootstrap: Annotated[Positive, at_most(100_000, "because more change no printed digit of an interval")] = 1000
    """Without effect since intervals have closed forms; accepted because older files set it."""
    max_new_tokens: Annotated[Positive, at_most(32_768, "because every open answer may become this long")] = 16
    """The longest open answer, in tokens."""
    clients: Positive | None = None
    """If every client has its own model (`local`, personalised methods), evaluate only this many clients, drawn from the
    seed; by default all. `local` then trains only these."""
    transfer: Annotated[tuple[TaskTable, ...], Field(strict=False, min_length=1)] | None = None
    """Other tasks, each written as `[task]` is, on whose test sets the final model is also evaluated, without training on
    them: `transfer = [{ name = "shapes-qa", test_samples = 300 }]`."""
    suites: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | None = None
    """The [suites](suites.md) that examine the final model, by name: `suites = ["corruption", "attribution"]`."""

    @property
    def holds_out(self) -> bool:
        """Whether part of the training data is held out."""
        return "validation" in (self.split, self.every_split)

    @field_validator("patterns", "suites")
    @classmethod
    def _each_name_once(cls, names: tuple[str, ...] | None, info: ValidationInfo) -> tuple[str, ...] | None:
        if names and len(set(names)) < len(names):
            raise ValueError(f"must name each {str(info.field_name).removesuffix('s')} once")
        return names

    @field_validator("transfer")
    @classmethod
    def _each_task_once(cls, tables: tuple[TaskTable, ...] | None) -> tuple[TaskTable, ...] | None:
        names = [table.name for table in tables or ()]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"names {min(twice)!r} twice; give each task once")
        return tables


class Experiment(Table):
    """A whole experiment file. `Experiment.model_json_schema()` documents it for editors."""

    name: FolderName = "experiment"
    """Used in the name of the run directory, so without `/` and at most 200 bytes long."""
    seed: Seed = 0
    """Determines all randomness: partition, scenario, client sampling, order of batches, dropout, and the initial adapter."""
    task: TaskTable
    partition: PartitionTable = PartitionTable(name="iid")
    scenario: ScenarioTable = ScenarioTable(name="aligned")
    clients: ClientsTable = ClientsTable()
    prompt: Named = Named(name="modality-agnostic")
    model: ModelTable = ModelTable()
    algorithm: Named = Named(name="fedavg")
    regularization: Named = Named(name="none")
    compression: Named = Named(name="none")
    secure: Named = Named(name="none")
    robust: Named = Named(name="none")
    privacy: Named = Named(name="none")
    attack: Named = Named(name="none")
    asynchronous: Named = Named(name="none")
    train: TrainTable = TrainTable()
    eval: EvalTable = EvalTable()
    judge: Named = Named(name="none")
    fleet: Named = Named(name="in-process")
    track: TrackTable = TrackTable()

    @model_validator(mode="before")
    @classmethod
    def _default_parts(cls, tables: Any) -> Any:
        """Insert the default name into a table that sets options without a name."""
        if not isinstance(tables, dict):
            return tables
        defaults = default_names()
        unnamed = {key for key, table in tables.items() if key in defaults and isinstance(table, dict) and "name" not in table}
        return tables | {key: {"name": defaults[key], **tables[key]} for key in unnamed}

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        if self.train.clients_per_round > self.partition.clients:
            raise ValueError(
                f"train.clients_per_round = {self.train.clients_per_round} is more than "
                f"partition.clients = {self.partition.clients}; {_LOWER_OR_RAISE}"
            )
        if self.train.min_updates > self.train.clients_per_round:
            raise ValueError(
                f"train.min_updates = {self.train.min_updates} is more than "
                f"train.clients_per_round = {self.train.clients_per_round}; {_LOWER_OR_RAISE}"
            )
        for key, table in (("task", self.task), ("task.companion", self.task.companion)):
            if table and table.balanced and table.train_samples is None and table.test_samples is None:
                raise ValueError(
                    f"{key}.balanced = true changes nothing if all samples are used; set {key}.train_samples or "
                    f"{key}.test_samples, or leave it out."
                )
        self.model.check()
        if self.clients.shares and len(self.clients.shares) != len(self.clients.profile):
            raise ValueError(
                f"clients.shares has {len(self.clients.shares)} entries and clients.profile {len(self.clients.profile)}; "
                "give one share for each profile."
            )
        highest = max(self.clients.rank, default=0)
        if highest > self.model.lora.rank:
            raise ValueError(
                f"clients.rank = {highest} is more than model.lora.rank = {self.model.lora.rank}, the rank of the server; "
                f"{_LOWER_OR_RAISE}"
            )
        return self

    def rank_of(self, client: int) -> int:
        """The client's LoRA rank."""
        ranks = self.clients.rank
        return ranks[client % len(ranks)] if ranks else self.model.lora.rank

    def train_of(self, client: int) -> TrainTable:
        """[train] with the client's own epochs and batch size."""
        lists = {"epochs": self.clients.epochs, "batch_size": self.clients.batch_size}
        own = {key: values[client % len(values)] for key, values in lists.items() if values}
        return self.train.model_copy(update=own) if own else self.train

    def largest_batches(self, clients: Iterable[int]) -> TrainTable:
        """[train] of that client among `clients` whose batches are the largest."""
        return max(map(self.train_of, clients), key=lambda table: table.batch_size, default=self.train)

    def resolved(self) -> dict[str, Any]:
        """All settings but those of [track] as plain values, including defaults; keys that are None are left out."""
        dumped = self.model_dump(mode="json", exclude={"track"})
        return {key: _without_none(value) for key, value in dumped.items() if value is not None}

    def toml(self, *, track: bool = False) -> str:
        """The resolved settings as a file; with `track` those of [track] too, for a process that executes the run."""
        extra = {"track": _without_none(self.track.model_dump(mode="json", by_alias=True))} if track else {}
        return tomli_w.dumps(self.resolved() | extra)

    def digest(self) -> str:
        """SHA-256 of the resolved settings: two files that describe the same experiment have the same digest."""
        return hashlib.sha256(json.dumps(self.resolved(), sort_keys=True).encode()).hexdigest()


def default_names() -> dict[str, str]:
    """table -> the name of the part that it selects if it has no `name`."""
    return {key: field.default.name for key, field in Experiment.model_fields.items() if isinstance(field.default, Named)}


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(entry) for key, entry in value.items() if entry is not None}
    return [_without_none(entry) for entry in value] if isinstance(value, list) else value
