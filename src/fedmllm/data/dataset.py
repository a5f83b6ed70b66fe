"""The data of an experiment: read from its tasks, checked, and distributed over the clients."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

from fedmllm.config import Experiment, TaskTable
from fedmllm.data.dealing import draw
from fedmllm.data.images import Picture, image_key
from fedmllm.data.loading import read_split, usable_samples
from fedmllm.data.manifest import Manifest
from fedmllm.data.notes import notes
from fedmllm.data.partitions import Deal, GroupedDeal
from fedmllm.data.samples import Loaded, Sample, Split, Task
from fedmllm.data.scenarios import Scenario
from fedmllm.data.stored import Samples, pick
from fedmllm.data.subsets import draw_subset
from fedmllm.data.tasks import tasks
from fedmllm.errors import ConfigError, DataError
from fedmllm.kinds import Pattern


@dataclass(frozen=True)
class Source:
    """A task, its table in the experiment file at `where` (such as "task.companion"), and its companion."""

    task: Task
    table: TaskTable
    where: str
    companion: Source | None = None


@dataclass(frozen=True)
class LoadedSplit:
    """One split of one task with its usable samples and its problems, so that `check` can report all problems before
    `prepare` raises on the first."""

    task: Task
    split: Split
    table: TaskTable
    loaded: Loaded


@dataclass(frozen=True)
class Dataset:
    """The samples of an experiment. `test` is the test split, or the part of the training data that
    `eval.split = "validation"` holds out."""

    task: Task
    train: Sequence[Sample]
    test: Sequence[Sample]
    skipped: int
    manifest: Manifest
    notes: tuple[str, ...] = ()
    """What may be a mistake in the data, in one sentence each."""
    of_rounds: Sequence[Sample] | None = None
    """What rounds are scored on, if it is not `test`."""

    def content_digest(self) -> str:
        """SHA-256 of what the samples contain, of which the manifest has the ids alone. A picture in a file counts by the
        file's name and size, so that it need not be read."""
        sha = hashlib.sha256()
        for s in chain(self.train, self.test, self.of_rounds or ()):
            pictures = [_content(picture) for picture in s.pictures]
            fields = (s.id, s.question, s.answer, s.text, s.choices, s.lettered, s.closed, s.label, pictures)
            sha.update(ascii(fields).encode())  # repr depends on the version of Unicode that Python knows
        return sha.hexdigest()


def _content(picture: Picture) -> str:
    if not isinstance(picture, Path):
        return image_key(picture)
    try:
        return f"{picture.name}, {picture.stat().st_size}"
    except OSError:  # one that has vanished since the data were checked is reported by what reads it
        return picture.name


def open_source(table: TaskTable, where: str = "task") -> Source:
    """Build the task and its companion without reading any sample. Raises ConfigError, also if their metrics differ."""
    companion, options = table.companion, table.options
    if table.draw is not None:
        options |= {"seed": table.draw} if "seed" in tasks.option_names(table.name) else {}
        if companion is not None and companion.draw is None:
            companion = companion.model_copy(update={"draw": table.draw})
    task = tasks.build(table.name, options, where)
    opened = open_source(companion, f"{where}.companion") if companion is not None else None
    if opened is not None and opened.task.metric != task.metric:
        raise ConfigError(
            f"{opened.where}: {opened.task.name!r} is measured by {opened.task.metric}, "
            f"{task.name!r} by {task.metric}; choose a companion with the same metric."
        )
    return Source(task, table, where, opened)


def check_splits(source: Source, splits: Sequence[Split]) -> None:
    """Raises ConfigError if the task lacks one of the splits. Its companion may lack any."""
    missing = [split for split in splits if split not in source.task.splits]
    if missing:
        remedy = 'use it as the task.companion of another task, or set eval.split = "validation"'
        if source.where != "task":
            remedy = "choose a task that has one"
        raise ConfigError(f"{source.where}.name: {source.table.name!r} has no {missing[0]} split; {remedy}.")


def read_splits(source: Source, splits: Sequence[Split]) -> list[LoadedSplit]:
    """Read the splits of the task and its companion. Raises ConfigError or DataError if a split cannot be read at all."""
    check_splits(source, splits)
    return _read(source, splits)


def _read(source: Source, splits: Sequence[Split]) -> list[LoadedSplit]:
    task, table = source.task, source.table
    loaded_splits = []
    for split in splits:
        if split in task.splits:
            count = table.train_samples if split == "train" else table.test_samples
            names, balanced = (table.name, split), bool(table.balanced)
            choose = partial(draw_subset, count=count, names=names, draw=table.draw, balanced=balanced)
            loaded_splits.append(LoadedSplit(task, split, table, read_split(task, split, choose)))
    return loaded_splits if source.companion is None else loaded_splits + _read(source.companion, splits)


def join_tasks(loaded_splits: Sequence[LoadedSplit], split: Split) -> Samples:
    """The samples of one split of all tasks, ordered by id. Raises DataError for bad samples unless they are to be skipped."""
    of_tasks = [usable_samples(p.loaded, p.task, split, p.table.on_bad_sample) for p in loaded_splits if p.split == split]
    joined = Samples.of(of_tasks[0] if len(of_tasks) == 1 else chain.from_iterable(of_tasks)).ordered()
    if len(shared := joined.repeated()):
        raise DataError(f"task.companion: the id {joined[shared[0]].id!r} occurs in both tasks; make the ids differ.")
    return joined


def count_problems(loaded_splits: Sequence[LoadedSplit]) -> int:
    return sum(len(part.loaded.problems) for part in loaded_splits)


def load_split(source: Source, split: Split) -> tuple[Task, Sequence[Sample], int]:
    """(the task, its samples of one split ordered by id, the number of skipped samples). Raises ConfigError or DataError."""
    loaded_splits = read_splits(source, (split,))
    return loaded_splits[0].task, join_tasks(loaded_splits, split), count_problems(loaded_splits)


def splits_of(config: Experiment) -> tuple[Split, ...]:
    """The splits that the experiment reads."""
    return ("train",) if config.eval.split == "validation" else ("train", "test")


_NAMES: dict[Pattern, str] = {"both": "anything to show", "image": "an image", "text": "a text"}


def shown_samples(pattern: Pattern, samples: Sequence[Sample]) -> list[Sample]:
    """The samples that are tested under the pattern: all under "both", otherwise those that have the modality."""
    return [sample for sample in samples if pattern == "both" or pattern in sample.modalities]


def check_patterns(patterns: Sequence[Pattern], task: Task, samples: Sequence[Sample], where: str) -> None:
    """Raises ConfigError if no sample can be tested under one of the patterns, or none that AUC needs."""
    for pattern in patterns:
        shown = shown_samples(pattern, samples)
        if not shown:
            raise ConfigError(
                f"eval.patterns: {pattern!r} tests nothing, because no sample of {where} has {_NAMES[pattern]}; leave it out."
            )
        if task.metric == "auc":
            _check_auc(task, shown, f"{where} under the pattern {pattern!r}")


def _check_auc(task: Task, samples: Sequence[Sample], where: str) -> None:
    ranked = [s for s in samples if task.positive in (s.choices or ())]
    if not ranked:
        raise ConfigError(f"task.positive: {task.positive!r} is not among the choices of any sample of {where}.")
    answers = {s.answer for s in ranked}
    if task.positive not in answers:
        raise ConfigError(
            f"task.positive: {task.positive!r} is the answer of no sample of {where}, so that there is no AUC; "
            f"the answers are {', '.join(map(repr, sorted(answers)[:5]))}."
        )
    if len(answers) == 1:
        raise ConfigError(
            f"task.positive: {task.positive!r} is the answer of every sample of {where}, so that there is no AUC; "
            "test on samples with other answers too."
        )


def prepare(config: Experiment, loaded_splits: Sequence[LoadedSplit], deal: Deal, scenario: Scenario) -> Dataset:
    """Separate training and test samples and draw the manifest. Raises ConfigError or DataError."""
    task = loaded_splits[0].task
    samples: Sequence[Sample] = join_tasks(loaded_splits, "train")
    held_out: Sequence[Sample] = []
    if config.eval.holds_out:
        count = max(1, round(len(samples) * config.eval.validation_share))
        held_out = draw_subset(samples, count, ("validation",), config.task.draw)
        ids = {s.id for s in held_out}
        samples = pick(samples, [index for index, s in enumerate(samples) if s.id not in ids])
    test = held_out if config.eval.split == "validation" else join_tasks(loaded_splits, "test")
    of_rounds = scored_in_rounds(config, test, held_out)
    if config.task.companion is not None:
        task = replace(task, ceiling={})  # the ceiling of one task does not hold for a mixture
    validation = config.eval.split == "validation"
    check_patterns(config.eval.patterns, task, test, "the validation split" if validation else "the test split")
    if of_rounds is not None:
        check_patterns(config.eval.patterns, task, of_rounds, "the samples that rounds are scored on")
    if isinstance(deal, GroupedDeal) and not any(map(deal.key, samples)):
        raise ConfigError(
            f"partition.name = {config.partition.name!r} keeps the samples of one source together, and no training sample "
            'names one; add it to the data (the key or the option "source"), or choose another partition.'
        )
    clients, least, rounds = config.partition.clients, config.partition.min_samples, config.train.rounds
    manifest = draw(samples, deal, scenario, clients, least, config.seed, rounds)
    return Dataset(task, samples, test, count_problems(loaded_splits), manifest, tuple(notes(samples, test)), of_rounds)


def scored_in_rounds(config: Experiment, test: Sequence[Sample], held_out: Sequence[Sample]) -> Sequence[Sample] | None:
    """What rounds are scored on: the test samples, the training samples that were held out, or a draw of them; None if it is
    the test samples themselves."""
    among = held_out if config.eval.every_split == "validation" else test
    drawn = draw_subset(among, config.eval.every_samples, ("rounds",), config.task.draw)
    return None if drawn is test else drawn
