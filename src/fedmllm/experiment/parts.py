"""The parts that an experiment file names, each built once per run and checked against the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fedmllm.algorithms import Algorithm, algorithms, compressions, regularizations
from fedmllm.algorithms.asynchronous import Asynchronous, asynchronies
from fedmllm.algorithms.combining import Robust, robusts
from fedmllm.attacks.settings import Attack, attacks
from fedmllm.config import Experiment, Named, ScenarioTable, TaskTable
from fedmllm.data.dataset import Dataset, LoadedSplit, Source, check_splits, open_source, prepare, read_splits, splits_of
from fedmllm.data.partitions import Deal, partitions
from fedmllm.data.prompts import Strategy, prompts
from fedmllm.data.scenarios import Scenario, composed, scenarios
from fedmllm.data.tasks import tasks
from fedmllm.errors import ConfigError, suggest
from fedmllm.evaluation.judges import Judge, judges
from fedmllm.evaluation.suites import suites
from fedmllm.experiment.compatibility import (
    check_adapter_kind,
    check_attack,
    check_privacy,
    check_ranks,
    check_robust,
    check_secure,
    check_sites,
)
from fedmllm.experiment.keeping import check_keeping
from fedmllm.experiment.simulated import check_asynchronous, check_devices
from fedmllm.fleets.options import FleetOptions, fleets
from fedmllm.privacy.settings import UserLevel, privacies
from fedmllm.privacy.user_level import Mechanism
from fedmllm.registry import Registry
from fedmllm.secure.settings import Pairwise, secures

REGISTRIES: dict[str, Registry[Any]] = {
    "task": tasks,
    "partition": partitions,
    "scenario": scenarios,
    "prompt": prompts,
    "algorithm": algorithms,
    "regularization": regularizations,
    "compression": compressions,
    "secure": secures,
    "robust": robusts,
    "privacy": privacies,
    "attack": attacks,
    "asynchronous": asynchronies,
    "judge": judges,
    "fleet": fleets,
}
"""The registry behind each table of the experiment file that names a part."""


@dataclass(frozen=True)
class Parts:
    """Everything that an experiment names, built. `config` has all defaults filled in; `transfer` has the tasks of
    `eval.transfer` by name; `algorithm` is wrapped in its regularisation and compression; `secure` is None if updates travel
    in the clear, `robust` None if the algorithm's own mean is taken, `privacy` None if no noise is added, `attack` None if
    every client is honest, `asynchronous` None if rounds are synchronous, `judge` None if there is none."""

    config: Experiment
    source: Source
    transfer: dict[str, Source]
    deal: Deal
    scenario: Scenario
    strategy: Strategy
    algorithm: Algorithm
    secure: Pairwise | None
    robust: Robust | None
    privacy: UserLevel | None
    attack: Attack | None
    asynchronous: Asynchronous | None
    judge: Judge | None
    fleet: FleetOptions

    @cached_property
    def mechanism(self) -> Mechanism | None:
        """What the run does for privacy, None if nothing. Raises ConfigError if the budget does not suffice for a round."""
        if self.privacy is None:
            return None
        clients, train = self.config.partition.clients, self.config.train
        try:
            return Mechanism.plan(self.privacy, clients, train.clients_per_round, train.rounds)
        except ValueError as error:
            raise ConfigError(f"{error}.") from None

    def check_splits(self) -> None:
        """Raises ConfigError if a task lacks a split that a run in one process reads. A site of a federation may lack the
        test split."""
        check_splits(self.source, splits_of(self.config))
        for source in self.transfer.values():
            check_splits(source, ("test",))

    def read_splits(self) -> list[LoadedSplit]:
        """Read the splits that the experiment uses. Raises ConfigError or DataError if one cannot be read at all."""
        return read_splits(self.source, splits_of(self.config))

    def prepare(self, loaded_splits: Sequence[LoadedSplit] | None = None) -> Dataset:
        """The samples, distributed over the clients; pass `loaded_splits` if they were read before. Raises ConfigError or
        DataError."""
        splits = self.read_splits() if loaded_splits is None else loaded_splits
        return prepare(self.config, splits, self.deal, self.scenario)

    @cached_property
    def ranks(self) -> dict[int, int]:
        """The LoRA rank of every client if ranks differ, else empty."""
        return {c: self.config.rank_of(c) for c in range(self.config.partition.clients)} if self.config.clients.rank else {}


def options_of(table: str, name: str) -> Sequence[str]:
    """The options of a named part, those of earlier versions too, for `--set table.name=…`. Raises ConfigError for an unknown
    part."""
    registry = REGISTRIES.get(table)
    return [*registry.option_names(name), *registry.former_options(name)] if registry else []


def _filled(table: Named, registry: Registry[Any], where: str) -> Named:
    values = {key: getattr(table, key) for key in type(table).model_fields}
    if isinstance(table, TaskTable) and table.companion is not None:
        values["companion"] = _filled(table.companion, registry, f"{where}.companion")
    if isinstance(table, ScenarioTable):
        values["then"] = tuple(_filled(later, registry, f"{where}.then.{i}") for i, later in enumerate(table.then))
    options = registry.check(table.name, table.options, where)
    return type(table).model_validate(values | {key: value for key, value in options.items() if value is not None})


def with_defaults(config: Experiment) -> Experiment:
    """The experiment with the defaults of all its parts filled in, so that `alpha = 1`, `alpha = 1.0` and no `alpha`, if 1 is
    the default, are one experiment with one digest. Raises ConfigError for the first invalid option."""
    filled: dict[str, Any] = {key: _filled(getattr(config, key), registry, key) for key, registry in REGISTRIES.items()}
    if unknown := [name for name in config.eval.suites or () if name not in suites.names()]:
        raise ConfigError(f"eval.suites: there is no suite {unknown[0]!r}; {suggest(unknown[0], suites.names())}")
    if config.eval.transfer:
        transfer = tuple(_filled(table, tasks, f"eval.transfer.{i}") for i, table in enumerate(config.eval.transfer))
        filled["eval"] = config.eval.model_copy(update={"transfer": transfer})
    return config.model_copy(update=filled)


def build(config: Experiment) -> Parts:
    """Build every part of the experiment; reads no data and no model. Raises ConfigError for the first part that is invalid or
    cannot be combined with the others."""
    config = with_defaults(config)
    config.track.check()
    deal = partitions.build(config.partition.name, config.partition.options)
    scenario = build_scenario(config.scenario)
    strategy = prompts.build(config.prompt.name, config.prompt.options)
    algorithm = build_algorithm(config)
    check_devices(config)
    fleet = fleets.build(config.fleet.name, config.fleet.options)
    secure = secures.build(config.secure.name, config.secure.options)
    if secure is not None:
        check_secure(config, algorithm, secure)
    robust = robusts.build(config.robust.name, config.robust.options)
    if robust is not None:
        check_robust(config, algorithm, robust)
    privacy = privacies.build(config.privacy.name, config.privacy.options)
    if privacy is not None:
        check_privacy(config, algorithm, privacy)
    attack = attacks.build(config.attack.name, config.attack.options)
    if attack is not None:
        check_attack(config, algorithm, attack)
    asynchronous = asynchronies.build(config.asynchronous.name, config.asynchronous.options)
    if asynchronous is not None:
        check_asynchronous(config, algorithm, asynchronous)
    check_keeping(config, algorithm)
    judge = judges.build(config.judge.name, config.judge.options)
    transfer = {
        table.name: open_source(table, f"eval.transfer.{number}") for number, table in enumerate(config.eval.transfer or ())
    }
    wrappers = (secure, robust, privacy, attack, asynchronous)
    return Parts(config, open_source(config.task), transfer, deal, scenario, strategy, algorithm, *wrappers, judge, fleet)


def build_scenario(table: ScenarioTable) -> Scenario:
    """The scenario with those of `then` laid over it. Raises ConfigError if they cannot be combined."""
    first = scenarios.build(table.name, table.options)
    then = [
        (later.name, scenarios.build(later.name, later.options, f"scenario.then.{i}")) for i, later in enumerate(table.then)
    ]
    try:
        return composed(first, then) if then else first
    except ValueError as error:
        raise ConfigError(f"scenario.then: {error}.") from None


def build_algorithm(config: Experiment) -> Algorithm:
    """The algorithm wrapped in its regularisation and compression.

    Raises ConfigError if they cannot work with each other, with the adapter's kind, or with clients of unequal rank.
    """
    algorithm = algorithms.build(config.algorithm.name, config.algorithm.options)
    check_ranks(config, algorithm)
    check_sites(config)
    algorithm = regularizations.build(config.regularization.name, config.regularization.options)(algorithm)
    check_adapter_kind(config, algorithm)
    try:
        return compressions.build(config.compression.name, config.compression.options)(algorithm)
    except ValueError as error:
        raise ConfigError(
            f"compression.name: {config.compression.name!r} cannot be used with {config.algorithm.name!r}: {error}."
        ) from None
