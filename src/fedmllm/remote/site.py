"""What a site does with the jobs it is sent: keep the model, its own data and its clients' memory, and train.

A site with data of its own takes from the server's experiment how to train, and never what on.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedmllm.algorithms import Update
from fedmllm.algorithms.factors import fold_of
from fedmllm.config import TaskTable, validate
from fedmllm.data.dataset import Dataset, load_split, open_source
from fedmllm.data.manifest import Holding, Manifest
from fedmllm.data.samples import MODALITIES, Modality, Task
from fedmllm.data.summary import gaps
from fedmllm.errors import ConfigError, DataError, UserError
from fedmllm.evaluation.summary import summarise
from fedmllm.evaluation.test_set import TestSet
from fedmllm.experiment.parts import Parts, build
from fedmllm.fleets.base import FleetContext
from fedmllm.fleets.inprocess import InProcessFleet
from fedmllm.fleets.memory import ClientMemory
from fedmllm.remote.protocol import Job, Reply
from fedmllm.runs.session import Session
from fedmllm.secure.settings import PHASES
from fedmllm.secure.site import Parties
from fedmllm.tensors import State, Tensors
from fedmllm.training.capacity import cohort_size

_RUN = re.compile(r"[0-9a-f]{8,64}")
"""A run's name becomes a folder's: nothing else may."""


@dataclass(frozen=True)
class Own:
    """What a site brings: its data, which modalities of it are used, and where it computes. With `secure` it takes part only in
    runs whose server cannot see its updates."""

    name: str
    task: TaskTable
    modalities: frozenset[Modality] = frozenset(MODALITIES)
    device: str = "auto"
    trust_remote_code: bool = False
    tests: bool = False
    """Whether the task's test split is the site's to test on."""
    model: str = ""
    """Where this machine has the model, if not where the experiment says."""
    secure: bool = False


def structure(adapter: Tensors) -> str:
    """A digest of the names and shapes: sites and server must adapt the same model in the same way."""
    shapes = [f"{name} {tuple(tensor.shape)}" for name, tensor in sorted(adapter.items())]
    return hashlib.sha256("\n".join(shapes).encode()).hexdigest()


def own_data(parts: Parts, own: Own) -> Dataset:
    """The site's samples as those of its client. Raises ConfigError where the federation does not name the site."""
    config = parts.config
    sites = list(config.fleet.options.get("sites") or [])
    if own.name not in sites:
        raise ConfigError(f"the federation has no site {own.name!r}; its sites are {', '.join(sites) or 'not named'}.")
    task, samples, skipped = load_split(parts.source, "train")
    client = sites.index(own.name)
    held = (Holding(s.id, client, s.modalities & own.modalities) for s in samples)
    return Dataset(task, samples, [], skipped, Manifest.of((h for h in held if h.visible), config.partition.clients))


class _Experiment:
    """One experiment as a site sees it, with the model loaded."""

    def __init__(self, text: str, own: Own | None) -> None:
        raw = tomllib.loads(text)
        if own is not None:
            raw["task"] = own.task.model_dump(mode="json", exclude_none=True)
            raw.setdefault("model", {})["device"] = own.device
            if own.model:
                raw["model"]["name"] = own.model
            if raw["model"].get("trust_remote_code") and not own.trust_remote_code:
                raise ConfigError(
                    "model.trust_remote_code: the experiment runs code that comes with the model, and this site's file "
                    "does not allow it."
                )
        parts = build(validate(raw, "the server's experiment"))
        self.config, self.algorithm = parts.config, parts.algorithm
        if own is not None and own.secure and parts.secure is None:
            raise ConfigError('secure.name: this site\'s file demands that updates are hidden, and the experiment says "none".')
        self.parties = Parties(parts.secure, self.algorithm) if parts.secure else None
        dataset = parts.prepare() if own is None else own_data(parts, own)
        self.session = Session(parts, replace(dataset, test=[]))  # the server tests
        self.cohort = 1
        self._test_set: tuple[Task, TestSet] | None = None

    @cached_property
    def gaps(self) -> dict[int, float]:
        return dict(enumerate(gaps(self.session.clients.manifest)))

    def test_set(self, own: Own | None) -> tuple[Task, TestSet]:
        """The questions of the site's own test data. Raises ConfigError where it has none."""
        if own is None or not own.tests:
            raise ConfigError("this site has no test data; name some in its file (jsonl_test), or set fleet.evaluate = false.")
        if self._test_set is None:
            task, samples, _ = load_split(open_source(own.task), "test")
            limited = [
                replace(
                    s, image=s.image if "image" in own.modalities else None, text=s.text if "text" in own.modalities else None
                )
                for s in samples
            ]
            seen, config, session = [s for s in limited if s.modalities], self.config, self.session
            strategy, longest = session.parts.strategy, config.train.max_length
            made = TestSet(session.model, task, seen, config.eval.patterns, strategy, longest)
            session.model.prepare_features()
            self._test_set = task, made
        return self._test_set

    def site(self, memory: Path, clients: Sequence[int]) -> FleetContext:
        session, train = self.session, self.config.train
        session.prepare(session.clients, clients)
        if len(clients) > self.cohort:
            held = (one for client in clients for one in session.clients[client])
            self.cohort = cohort_size(session.model, held, train, len(clients))
        return FleetContext(
            session.model, self.algorithm, session.clients, train, session.initial, self.gaps, memory, self.cohort
        )


def _reply(update: Update) -> Reply:
    return Reply(update.client, update.groups, update.examples, update.steps, update.metrics, update.problem)


class Worker:
    """Answers jobs, one experiment at a time. `folder` is where clients' memory goes, a folder a run.

    `own` is None where every client's data is in the experiment's own task, dealt out by its manifest, as in simulations.
    """

    def __init__(self, folder: Path, own: Own | None = None, log: Callable[[str], None] = lambda line: None) -> None:
        """`log` is told what does not travel."""
        self._folder, self._own, self._log = folder, own, log
        self._known: tuple[str, _Experiment] | None = None

    def answer(self, jobs: Sequence[Job]) -> list[Reply]:
        """A reply to each job, in their order; jobs to train must be of one run and round. Never raises: what goes wrong is
        in the replies, without anything of the data."""
        try:
            return self._answer(jobs)
        except DataError as error:  # it names the sample, and may quote it
            self._log(f"the data cannot be used: {error}")
            problem = "the site's data cannot be used; its own log says why"
        except UserError as error:
            self._log(str(error))
            problem = str(error)
        except Exception as error:  # the boundary: a message of any other error may quote data, its place does not
            where = traceback.extract_tb(error.__traceback__)[-1]
            self._log("".join(traceback.format_exception(error)))
            problem = f"{type(error).__name__} at the site ({Path(where.filename).name}, line {where.lineno})"
        return [Reply(job.client, problem=problem) for job in jobs]

    def _answer(self, jobs: Sequence[Job]) -> list[Reply]:
        first = jobs[0]
        if not _RUN.fullmatch(first.run):
            raise ConfigError("the run's name is none that fedmllm gives.")
        if self._known is None or self._known[0] != first.config:
            self._known = None  # the old model goes before the new one comes
            self._known = first.config, _Experiment(first.config, self._own)
        experiment = self._known[1]
        if first.kind == "describe":
            return [self._describe(experiment, job) for job in jobs]
        if experiment.parties is not None:
            return self._secure(experiment, experiment.parties, jobs)
        if first.kind in PHASES:
            raise ConfigError("secure.name: the server asks for a secure round, and its experiment has none.")
        self._forget_later(jobs)
        if first.kind == "train":
            updates = self._train(experiment, jobs, {job.client: job.state for job in jobs})
            return [_reply(updates[job.client]) for job in jobs]
        answer = self._evaluate if first.kind == "evaluate" else self._personal
        return [answer(experiment, job) for job in jobs]

    def _forget_later(self, jobs: Sequence[Job]) -> None:
        """What clients remember of rounds whose updates came to nothing."""
        for job in jobs:
            ClientMemory(self._folder / job.run).go_back(job.client, min(job.last, job.round - 1))

    def _describe(self, experiment: _Experiment, job: Job) -> Reply:
        client = job.client
        if self._own is not None:
            client = experiment.config.fleet.options["sites"].index(self._own.name)
        samples, image, text = experiment.session.clients.manifest.counts()[client].tolist()
        if experiment.parties is not None:  # counts are hidden as the updates are; what there is, is not
            samples, image, text = (min(count, 1) for count in (samples, image, text))
        about: dict[str, Any] = {
            "samples": samples,
            "image": image,
            "text": text,
            "skipped": experiment.session.dataset.skipped,
        }
        about |= {"fedmllm": version("fedmllm"), "adapter": structure(experiment.session.initial)}
        return Reply(client, about=about)

    def _secure(self, experiment: _Experiment, parties: Parties, jobs: Sequence[Job]) -> list[Reply]:
        first, config = jobs[0], experiment.config
        if first.kind not in PHASES:
            raise ConfigError(f"secure.name: updates are hidden in this run, so {first.kind!r} is not answered.")
        info = first.info(config.train.rounds, config.partition.clients, config.seed)
        answers = parties.answer(
            first.kind, first.run, info, {job.client: job.state for job in jobs},
            lambda plain: self._train_hidden(experiment, jobs, plain),
        )  # fmt: skip
        return [_reply(answer) for answer in answers]

    def _train_hidden(self, experiment: _Experiment, jobs: Sequence[Job], messages: Mapping[int, State]) -> list[Update]:
        # Only where clients do train: a question that comes twice is not trained on twice, and what was learned must stay.
        self._forget_later(jobs)
        return list(self._train(experiment, jobs, messages).values())

    def _train(self, experiment: _Experiment, jobs: Sequence[Job], messages: Mapping[int, State]) -> dict[int, Update]:
        first, config, folder = jobs[0], experiment.config, self._folder / jobs[0].run
        info = first.info(config.train.rounds, config.partition.clients, config.seed)
        fleet = InProcessFleet(experiment.site(folder, list(messages)))
        return {u.client: u for u in fleet.train(replace(info, adapter=experiment.session.model.info), messages)}

    def _personal(self, experiment: _Experiment, job: Job) -> Reply:
        fleet = InProcessFleet(experiment.site(self._folder / job.run, [job.client]))
        return Reply(job.client, {"adapter": fleet.personal(job.client, job.state, job.round)})

    def _evaluate(self, experiment: _Experiment, job: Job) -> Reply:
        task, test_set = experiment.test_set(self._own)
        fleet = InProcessFleet(experiment.site(self._folder / job.run, [job.client]))
        adapter = fleet.personal(job.client, job.state, job.round)
        experiment.session.model.adapter.set_fold(fold_of(job.state))
        (predictions,) = test_set.predict_each(experiment.config.eval, [adapter])
        found = summarise(task, [predictions], experiment.config.seed, experiment.config.eval.bootstrap)
        return Reply(job.client, about={"metrics": found})


__all__ = ["Own", "Worker", "own_data", "structure"]
