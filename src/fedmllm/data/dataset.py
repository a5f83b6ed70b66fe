"""The data of an experiment: read from its tasks, checked, and dealt out to the clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from fedmllm.config import Experiment, TaskTable
from fedmllm.data import manifest as manifests
from fedmllm.data.manifest import Manifest
from fedmllm.data.partitions import Deal
from fedmllm.data.samples import Loaded, Sample, Split, Task, demand, survey
from fedmllm.data.scenarios import Scenario
from fedmllm.data.tasks import tasks
from fedmllm.errors import ConfigError, DataError
from fedmllm.rng import stream


@dataclass(frozen=True)
class Source:
    """A task, its table in the experiment file at `where` (such as "task.companion"), and the companion that joins it."""

    task: Task
    table: TaskTable
    where: str
    companion: Source | None = None


@dataclass(frozen=True)
class SurveyedSplit:
    """One split of one task with its good and bad samples: `check` reports it before `prepare` may refuse it."""

    task: Task
    split: Split
    table: TaskTable
    loaded: Loaded


@dataclass(frozen=True)
class Dataset:
    """`test` is evaluated: the test split, or the part of the training data that `eval.split = "validation"` holds out."""

    task: Task
    train: list[Sample]
    test: list[Sample]
    skipped: int
    manifest: Manifest


def open_source(table: TaskTable, where: str = "task") -> Source:
    """Build the task and its companion without reading any sample. Raises ConfigError."""
    companion = open_source(table.companion, f"{where}.companion") if table.companion is not None else None
    return Source(tasks.build(table.name, table.options, where), table, where, companion)


def draw_subset(samples: list[Sample], count: int | None, names: Sequence[str]) -> list[Sample]:
    """`count` of the samples, drawn alike for every seed of the experiment, so that seeds are compared on the same data."""
    if count is None or count >= len(samples):
        return samples
    chosen = stream(0, "subset", *names).choice(len(samples), size=count, replace=False)
    return [samples[i] for i in sorted(chosen.tolist())]


def look(source: Source, splits: Sequence[Split]) -> list[SurveyedSplit]:
    """Read the splits with all their bad samples. Raises ConfigError or DataError if nothing can be read."""
    task, table = source.task, source.table
    lacking = [split for split in splits if split not in task.splits]
    if lacking and not source.where.endswith("companion"):
        remedy = 'make it the task.companion of another, or set eval.split = "validation"'
        if source.where != "task":
            remedy = "choose a task that has one"
        raise ConfigError(f"{source.where}.name: {table.name!r} has no {lacking[0]} split; {remedy}.")
    companion = source.companion
    if companion is not None and companion.task.metric != task.metric:  # checked before any data is read
        raise ConfigError(
            f"{companion.where}: {companion.task.name!r} is measured by {companion.task.metric}, "
            f"{task.name!r} by {task.metric}; choose a companion with the same metric."
        )
    surveyed = []
    for split in splits:
        if split not in lacking:
            count = table.train_samples if split == "train" else table.test_samples
            choose = partial(draw_subset, count=count, names=(table.name, split))
            surveyed.append(SurveyedSplit(task, split, table, survey(task, split, choose)))
    return surveyed if companion is None else surveyed + look(companion, splits)


def join(surveyed: Sequence[SurveyedSplit], split: Split) -> list[Sample]:
    """The samples of one split of all tasks, ordered by id. Raises DataError for bad samples, unless they are skipped."""
    joined: dict[str, Sample] = {}
    for part in surveyed:
        if part.split == split:
            usable = demand(part.loaded, part.task, split, part.table.on_bad_sample).samples
            if shared := joined.keys() & {s.id for s in usable}:
                raise DataError(f"task.companion: the id {min(shared)!r} is in both tasks; make the ids differ.")
            joined |= {s.id: s for s in usable}
    return [joined[sample_id] for sample_id in sorted(joined)]


def load_split(source: Source, split: Split) -> tuple[Task, list[Sample], int]:
    """(the task, its samples of one split ordered by id, the number of skipped samples). Raises ConfigError or DataError."""
    surveyed = look(source, (split,))
    return surveyed[0].task, join(surveyed, split), sum(len(part.loaded.skipped) for part in surveyed)


def splits_of(config: Experiment) -> tuple[Split, ...]:
    """The splits that the experiment reads."""
    return ("train",) if config.eval.split == "validation" else ("train", "test")


def prepare(config: Experiment, surveyed: Sequence[SurveyedSplit], deal: Deal, scenario: Scenario) -> Dataset:
    """Split the samples into training and test data and draw the manifest. Raises ConfigError or DataError."""
    task, samples = surveyed[0].task, join(surveyed, "train")
    if config.eval.split == "validation":
        count = max(1, round(len(samples) * config.eval.validation_share))
        held_out = {s.id for s in draw_subset(samples, count, ("validation",))}
        test = [s for s in samples if s.id in held_out]
        samples = [s for s in samples if s.id not in held_out]
    else:
        test = join(surveyed, "test")
    if config.task.companion is not None:
        task = replace(task, ceiling={})  # the ceiling of one task does not hold for a mixture
    if task.metric == "auc" and not any(task.positive in (s.choices or ()) for s in test):
        raise ConfigError(f"task.positive: {task.positive!r} is not among the choices of any test sample.")
    manifest = manifests.draw(samples, deal, scenario, config.partition.clients, config.partition.min_samples, config.seed)
    return Dataset(task, samples, test, sum(len(part.loaded.skipped) for part in surveyed), manifest)
