"""From an experiment file to its parts: data and manifest, model, algorithm, the questions of the evaluation.

`prepare` needs no model and says everything that can be wrong with the data; `bench.Bench` puts both together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fedmllm.algorithms import Algorithm, RoundInfo, algorithms, compressions, regularizations
from fedmllm.algorithms.factors import modules
from fedmllm.config import Experiment, Named, TaskTable
from fedmllm.data import manifest as manifests
from fedmllm.data.manifest import Manifest
from fedmllm.data.partition import partitions
from fedmllm.data.prompts import prompts
from fedmllm.data.samples import Loaded, Sample, Split, Task, demand, survey
from fedmllm.data.scenarios import scenarios
from fedmllm.data.tasks import tasks
from fedmllm.errors import ConfigError, DataError
from fedmllm.evaluation.judging import judges
from fedmllm.fleets import fleets
from fedmllm.models.mllm import MLLM
from fedmllm.registry import Registry
from fedmllm.rng import stream
from fedmllm.secure.chosen import chosen
from fedmllm.secure.fixed import FixedPoint, size
from fedmllm.secure.settings import Pairwise, secures
from fedmllm.tensors import nbytes

Report = Callable[[str, int, int, str], None]
"""(stage, done, total, note): what a long run tells whoever watches."""


def silent(stage: str, done: int, total: int, note: str) -> None:
    """A `Report` that tells nobody."""


@dataclass(frozen=True)
class Data:
    """`test` is what is evaluated on: the test split, or what `eval.split = "validation"` holds out."""

    task: Task
    train: list[Sample]
    test: list[Sample]
    skipped: int
    manifest: Manifest


_PARTS: dict[str, Registry[Any]] = {
    "task": tasks,
    "partition": partitions,
    "scenario": scenarios,
    "prompt": prompts,
    "algorithm": algorithms,
    "regularization": regularizations,
    "compression": compressions,
    "secure": secures,
    "judge": judges,
    "fleet": fleets,
}
"""The tables of the experiment file that name a part, and where the parts are."""


def options_of(table: str, name: str) -> Sequence[str]:
    """The options of a named part, for `--set table.name=…`. Raises ConfigError for an unknown part."""
    return _PARTS[table].option_names(name) if table in _PARTS else []


def _filled(table: Named, registry: Registry[Any], where: str) -> Named:
    known = {key: getattr(table, key) for key in type(table).model_fields}
    if isinstance(table, TaskTable) and table.companion is not None:
        known["companion"] = _filled(table.companion, registry, f"{where}.companion")
    options = registry.check(table.name, table.options, where)
    return type(table).model_validate(known | {key: value for key, value in options.items() if value is not None})


def with_defaults(config: Experiment) -> Experiment:
    """The experiment with all options of its parts written out, so that `alpha = 1`, `1.0` and nothing, where that is the
    default, are one experiment with one digest. Raises ConfigError for the first option that is unfit."""
    filled: dict[str, Any] = {key: _filled(getattr(config, key), parts, key) for key, parts in _PARTS.items()}
    if config.eval.transfer:
        others = tuple(_filled(table, tasks, f"eval.transfer.{i}") for i, table in enumerate(config.eval.transfer))
        filled["eval"] = config.eval.model_copy(update={"transfer": others})
    return config.model_copy(update=filled)


def build_algorithm(config: Experiment) -> Algorithm:
    """The server's algorithm with its regularisation and its compression around it.

    Raises ConfigError where one of them cannot work with the kind of adapter, or with clients of unequal rank.
    """
    algorithm = algorithms.build(config.algorithm.name, config.algorithm.options)
    kind, name = config.model.adapter.kind, config.algorithm.name
    if algorithm.needs_lora and kind not in ("lora", "rslora"):
        raise ConfigError(
            f"algorithm.name: {name!r} works on LoRA's factors A and B alone, and model.adapter.kind = {kind!r} has more or "
            'none; set the kind to "lora" or "rslora", or choose an algorithm for any adapter, such as "fedavg".'
        )
    if config.clients.rank and kind not in ("lora", "rslora"):
        raise ConfigError(f'clients.rank: model.adapter.kind = {kind!r} has no rank to vary; set it to "lora" or "rslora".')
    ranks = {config.rank_of(client) for client in range(config.partition.clients)}
    if ranks != {config.model.lora.rank} and not algorithm.unequal_ranks:
        able = [n for n in algorithms.names() if algorithms.build(n, {}).unequal_ranks]
        raise ConfigError(
            f"clients.rank: {name!r} cannot average adapters of ranks {sorted(ranks)} under model.lora.rank = "
            f"{config.model.lora.rank}; give all clients that rank, or choose one of {', '.join(able)}."
        )
    sites = config.fleet.options.get("sites")
    if sites and len(sites) != config.partition.clients:
        raise ConfigError(
            f"partition.clients = {config.partition.clients}, but fleet.sites names {len(sites)}; a client is a site there."
        )
    algorithm = regularizations.build(config.regularization.name, config.regularization.options)(algorithm)
    if algorithm.needs_layers and kind == "prompt-tuning":
        raise ConfigError(
            f"regularization.name: {config.regularization.name!r} ties the middle layers, and the vectors of "
            'model.adapter.kind = "prompt-tuning" belong to none; use "fedprox" or "none".'
        )
    try:
        return compressions.build(config.compression.name, config.compression.options)(algorithm)
    except ValueError as error:
        raise ConfigError(f"compression.name: {config.compression.name!r} cannot be used with {name!r}: {error}.") from None


def build_secure(config: Experiment) -> Pairwise | None:
    """How updates are hidden in their sum; None where they are not. Raises ConfigError for what needs single updates."""
    return chosen(config, build_algorithm(config))


def _draw_some(samples: list[Sample], count: int | None, names: Sequence[str]) -> list[Sample]:
    """A draw that is the same for every seed of the experiment, so that seeds are compared on the same data."""
    if count is None or count >= len(samples):
        return samples
    chosen = stream(0, "subset", *names).choice(len(samples), size=count, replace=False)
    return [samples[i] for i in sorted(chosen.tolist())]


@dataclass(frozen=True)
class Part:
    """One split of one task, good or bad: what `check` tells of before `prepare` refuses it."""

    task: Task
    split: Split
    table: TaskTable
    found: Loaded


def _look(table: TaskTable, splits: Sequence[Split], where: str) -> list[Part]:
    task = tasks.build(table.name, table.options, where)
    lacking = [split for split in splits if split not in task.splits]
    if lacking and not where.endswith("companion"):
        way_out = 'make it the task.companion of another, or set eval.split = "validation"'
        if where != "task":
            way_out = "choose one that has"
        raise ConfigError(f"{where}.name: {table.name!r} has no {lacking[0]} split; {way_out}.")
    if table.companion is not None:  # before anything is read
        other = tasks.build(table.companion.name, table.companion.options, f"{where}.companion")
        if other.metric != task.metric:
            raise ConfigError(
                f"{where}.companion: {other.name!r} is measured by {other.metric}, {task.name!r} by {task.metric}."
            )
    parts = []
    for split in splits:
        if split not in lacking:
            count = table.train_samples if split == "train" else table.test_samples
            choose = partial(_draw_some, count=count, names=(table.name, split))
            parts.append(Part(task, split, table, survey(task, split, choose)))
    return parts if table.companion is None else parts + _look(table.companion, splits, f"{where}.companion")


def check_parts(config: Experiment) -> None:
    """Build every named part and throw it away; reads no data and no model. Raises ConfigError for the first that is unfit."""
    partitions.build(config.partition.name, config.partition.options)
    scenarios.build(config.scenario.name, config.scenario.options)
    prompts.build(config.prompt.name, config.prompt.options)
    build_algorithm(config)
    fleets.build(config.fleet.name, config.fleet.options)
    build_secure(config)
    judges.build(config.judge.name, config.judge.options)
    others = ((f"eval.transfer.{number}", other) for number, other in enumerate(config.eval.transfer or ()))
    for place, head in (("task", config.task), *others):
        table: TaskTable | None = head
        where = place
        while table is not None:
            tasks.build(table.name, table.options, where)
            table, where = table.companion, f"{where}.companion"


def look(config: Experiment) -> list[Part]:
    """Read the data as it is, bad samples and all. Raises ConfigError and DataError for what leaves nothing to look at."""
    check_parts(config)
    return _look(config.task, ("train",) if config.eval.split == "validation" else ("train", "test"), "task")


def _join(parts: Sequence[Part], split: Split) -> list[Sample]:
    """The samples of a split, of all tasks. Raises DataError for bad ones, unless they are to be skipped."""
    joined: dict[str, Sample] = {}
    for part in parts:
        if part.split == split:
            usable = demand(part.found, part.task, split, part.table.on_bad_sample).samples
            if shared := joined.keys() & {s.id for s in usable}:
                raise DataError(f"task.companion: the id {min(shared)!r} is in both tasks; make the ids differ.")
            joined |= {s.id: s for s in usable}
    return [joined[sample_id] for sample_id in sorted(joined)]


def load_split(table: TaskTable, split: Split, where: str = "task") -> tuple[Task, list[Sample], int]:
    """A task's samples of one split, in the order of their ids, and how many were skipped. Raises ConfigError, which names
    the place in the experiment file, and DataError."""
    parts = _look(table, (split,), where)
    return parts[0].task, _join(parts, split), sum(len(part.found.skipped) for part in parts)


def load_transfer(config: Experiment) -> dict[str, tuple[Task, list[Sample]]]:
    """The test sets of `eval.transfer` by their tasks' names. Raises ConfigError and DataError."""
    tables = enumerate(config.eval.transfer or ())
    found = {table.name: load_split(table, "test", f"eval.transfer.{number}") for number, table in tables}
    return {name: (task, samples) for name, (task, samples, _) in found.items()}


def prepare(config: Experiment, parts: Sequence[Part] | None = None) -> Data:
    """Load the data, unless `look` did, and draw the manifest. Raises ConfigError and DataError for what is wrong with it."""
    parts = look(config) if parts is None else parts
    task, samples = parts[0].task, _join(parts, "train")
    if config.eval.split == "validation":
        held = {s.id for s in _draw_some(samples, max(1, round(len(samples) * config.eval.validation_share)), ("validation",))}
        test = [s for s in samples if s.id in held]
        samples = [s for s in samples if s.id not in held]
    else:
        test = _join(parts, "test")
    if config.task.companion is not None:
        task = replace(task, ceiling={})  # what is known of one task alone does not hold for a mixture
    if task.metric == "auc" and not any(task.positive in (s.choices or ()) for s in test):
        raise ConfigError(f"task.positive: {task.positive!r} is not among the choices of any test sample.")
    deal = partitions.build(config.partition.name, config.partition.options)
    scenario = scenarios.build(config.scenario.name, config.scenario.options)
    drawn = manifests.draw(samples, deal, scenario, config.partition.clients, config.partition.min_samples, config.seed)
    return Data(task, samples, test, sum(len(part.found.skipped) for part in parts), drawn)


def _check_adapter(config: Experiment, model: MLLM) -> None:
    """Raises ConfigError where the tensors that `model.lora.target` made do not suit the algorithm."""
    algorithm, where = build_algorithm(config), f"model.lora.target = {config.model.lora.target!r}"
    if algorithm.needs_layers and not model.info.layer:
        raise ConfigError(
            f"regularization.name: {config.regularization.name!r} ties layers of the text model, and {where} adapts none."
        )
    try:
        if algorithm.needs_lora or config.clients.rank:
            modules(model.adapter.get())
    except ValueError as error:
        raise ConfigError(f"algorithm.name: {config.algorithm.name!r} cannot work with {where} ({error}).") from None


def check_model(config: Experiment) -> MLLM:
    """The loaded model. Raises ConfigError where there is none, or its adapter does not suit the algorithm."""
    model = MLLM.load(config.model, config.seed)
    _check_adapter(config, model)
    return model


def first_messages(config: Experiment, model: MLLM) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes by group that client 0 would be sent and send in the first round."""
    algorithm = build_algorithm(config)
    state = algorithm.init(model.adapter.get())
    info = RoundInfo(0, config.train.rounds, config.partition.clients, (0,), config.seed, model.info, {0: config.rank_of(0)})
    down, up = algorithm.message(state, 0, info), algorithm.uploads(state, 0, info)
    told = {g: nbytes(t) for g, t in down.items()}
    settings = build_secure(config)
    if settings is not None and algorithm.averages is not None:
        fixed = FixedPoint.of(settings, config.train.clients_per_round, algorithm.averages)
        return told, {"masked": fixed.nbytes(size(up))}
    return told, {g: nbytes(t) for g, t in up.items()}


def default_stem(config: Experiment, kind: str) -> str:
    return f"{config.name}-{kind}-seed{config.seed}"
