"""The worker answers jobs: it keeps one experiment loaded and trains, evaluates or describes as requested."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedmllm.algorithms import Update
from fedmllm.algorithms.factors import fold_of
from fedmllm.errors import ConfigError, DataError, UserError
from fedmllm.evaluation.summary import summarise
from fedmllm.fleets.memory import ClientMemory
from fedmllm.registry import load_plugin
from fedmllm.remote.files import SiteData
from fedmllm.remote.limits import TimeIsUp, time_limit
from fedmllm.remote.protocol import Job, Reply
from fedmllm.remote.site import SiteExperiment, check_job, structure
from fedmllm.secure.clients import SecureClients
from fedmllm.secure.settings import PHASES
from fedmllm.tensors import State, Tensors, bytes_by_group

_RUN = re.compile(r"[0-9a-f]{8,64}")
"""A run's name becomes the name of a folder, so nothing else is accepted."""


def _reply(update: Update) -> Reply:
    return Reply(update.client, update.groups, update.examples, update.steps, update.metrics, update.problem)


class Worker:
    """Answers jobs, one experiment at a time. `folder` holds the clients' memory, with one folder per run.

    `site` is None if the data of all clients are in the experiment's own task, as in simulations. `log` receives what must not
    leave the site. `plugins` are files that register parts, loaded before the first experiment.
    """

    def __init__(
        self,
        folder: Path,
        site: SiteData | None = None,
        log: Callable[[str], None] = lambda line: None,
        plugins: Sequence[Path] = (),
    ) -> None:
        self._folder, self._site, self._log, self._plugins = folder, site, log, plugins
        self._loaded: tuple[str, SiteExperiment] | None = None

    def answer(self, jobs: Sequence[Job]) -> list[Reply]:
        """One reply per job, in their order; jobs to train must belong to one run and round.

        Never raises: errors are reported in the replies, without any of the data.
        """
        try:
            return self._answer_within_limits(jobs)
        except TimeIsUp:
            self._loaded = None  # it was interrupted anywhere
            problem = "the job took longer than limits.seconds in this site's file allows, and was ended"
            self._log(problem)
        except DataError as error:  # it names the sample, and may quote it
            self._log(f"the data cannot be used: {error}")
            problem = "the site's data cannot be used; its own log says why"
        except UserError as error:
            self._log(str(error))
            problem = str(error)
        except Exception as error:  # the message of any other error may quote data; its place in the code does not
            place = traceback.extract_tb(error.__traceback__)[-1]
            self._log("".join(traceback.format_exception(error)))
            problem = f"{type(error).__name__} at the site ({Path(place.filename).name}, line {place.lineno})"
        return [Reply(job.client, problem=problem) for job in jobs]

    def experiment(self, text: str) -> SiteExperiment:
        """The experiment of this TOML text, loaded unless it is the current one. Raises UserError."""
        if self._loaded is None or self._loaded[0] != text:
            self._loaded = None  # frees the old model before the new one is loaded
            for plugin in self._plugins:
                load_plugin(plugin)
            attempts = self._folder / "attempts" if self._site else None
            self._loaded = text, SiteExperiment(text, self._site, attempts)
        return self._loaded[1]

    def _answer_within_limits(self, jobs: Sequence[Job]) -> list[Reply]:
        if self._site is None:
            return self._answer(jobs)
        limits = self._site.limits
        with time_limit(limits.seconds):
            replies = self._answer(jobs)
            for reply in replies:
                limits.check_reply(sum(bytes_by_group(reply.groups).values()))
        return replies

    def _answer(self, jobs: Sequence[Job]) -> list[Reply]:
        first = jobs[0]
        if not _RUN.fullmatch(first.run):
            raise ConfigError("the run's name is not one that fedmllm creates.")
        experiment = self.experiment(first.config)
        if first.kind == "describe":
            return [self._describe(experiment, job) for job in jobs]
        if self._site is not None:
            for job in jobs:
                check_job(job, experiment.config, self._site)
        if experiment.secure_clients is not None:
            return self._secure(experiment, experiment.secure_clients, jobs)
        if first.kind in PHASES:
            raise ConfigError("secure.name: the server requests a secure round, and its experiment has none.")
        self._roll_back(jobs)
        if first.kind == "train":
            updates = self._train(experiment, jobs, {job.client: job.state for job in jobs})
            return [_reply(updates[job.client]) for job in jobs]
        if first.kind == "evaluate":
            return [self._evaluate(experiment, job) for job in jobs]
        return [Reply(job.client, {"adapter": self._own_adapter(experiment, job)}) for job in jobs]

    def _roll_back(self, jobs: Sequence[Job]) -> None:
        """Discard the clients' states of rounds that did not count."""
        for job in jobs:
            ClientMemory(self._folder / job.run).roll_back(job.client, min(job.last, job.round - 1))

    def _describe(self, experiment: SiteExperiment, job: Job) -> Reply:
        client = job.client
        if self._site is not None:
            client = experiment.config.fleet.options["sites"].index(self._site.name)
        counts = experiment.session.clients.manifest.counts()[client].tolist()
        if experiment.secure_clients is not None:  # report whether there are any, but not how many
            counts = [min(count, 1) for count in counts]
        about: dict[str, Any] = dict(zip(("samples", "image", "text"), counts, strict=True))
        about |= {"skipped": experiment.session.dataset.skipped, "fedmllm": version("fedmllm")}
        return Reply(client, about=about | {"adapter": structure(experiment.session.initial)})

    def _secure(self, experiment: SiteExperiment, clients: SecureClients, jobs: Sequence[Job]) -> list[Reply]:
        first = jobs[0]
        if first.kind not in PHASES:
            raise ConfigError(f"secure.name: updates are hidden in this run, so {first.kind!r} is not answered.")

        def train(messages: Mapping[int, State]) -> Iterable[Update]:
            # Only here, before clients do train: a repeated request must not discard what they learned.
            self._roll_back(jobs)
            return self._train(experiment, jobs, messages).values()

        messages = {job.client: job.state for job in jobs}
        answers = clients.answer(first.kind, first.run, experiment.info(first), messages, train)
        for answer in answers:
            if answer.problem:
                self._log(answer.problem)
        return [_reply(answer) for answer in answers]

    def _train(self, experiment: SiteExperiment, jobs: Sequence[Job], messages: Mapping[int, State]) -> dict[int, Update]:
        fleet = experiment.fleet(self._folder / jobs[0].run, list(messages), jobs[0].round)
        return {update.client: update for update in fleet.train(experiment.info(jobs[0]), messages)}

    def _own_adapter(self, experiment: SiteExperiment, job: Job) -> Tensors:
        fleet = experiment.fleet(self._folder / job.run, [job.client], job.round)
        return fleet.personal(job.client, job.state, job.round)

    def _evaluate(self, experiment: SiteExperiment, job: Job) -> Reply:
        task, test_set = experiment.test_set(self._site)
        own = self._own_adapter(experiment, job)
        tested = experiment.session.parts.algorithm.tested(job.state, own, experiment.info(job))
        experiment.session.model.adapter.set_fold(fold_of(tested))
        (predictions,) = test_set.predict_each(experiment.config.eval, [tested["adapter"]])
        metrics = summarise(task, [predictions], experiment.config.eval.match, test_set.choices)
        return Reply(job.client, about={"metrics": metrics})
