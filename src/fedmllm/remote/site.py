"""A site: its own data, and the server's experiment as the site sees it.

A site with data of its own takes from the server's experiment how to train, but never on which data.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedmllm.algorithms import RoundInfo
from fedmllm.config import Experiment, Named, validate
from fedmllm.data.dataset import Dataset, load_split, open_source
from fedmllm.data.manifest import Manifest
from fedmllm.data.samples import MODALITIES, Task
from fedmllm.errors import ConfigError, brief
from fedmllm.evaluation.test_set import TestSet
from fedmllm.experiment.parts import Parts, build
from fedmllm.federation import FederationPlan, sample_clients
from fedmllm.fleets.base import FleetContext
from fedmllm.fleets.inprocess import InProcessFleet
from fedmllm.remote.files import SiteData
from fedmllm.remote.protocol import Job
from fedmllm.runs.session import Session
from fedmllm.secure.attempts import Attempts
from fedmllm.secure.clients import SecureClients
from fedmllm.secure.settings import PHASES
from fedmllm.tensors import Tensors
from fedmllm.training.capacity import cohort_size


def structure(adapter: Tensors) -> str:
    """A digest of the names and shapes: sites and server must adapt the same model in the same way."""
    shapes = [f"{name} {tuple(tensor.shape)}" for name, tensor in sorted(adapter.items())]
    return hashlib.sha256("\n".join(shapes).encode()).hexdigest()


def site_dataset(parts: Parts, site: SiteData) -> Dataset:
    """The site's samples as those of its client. Raises ConfigError if the federation does not name the site."""
    config = parts.config
    sites = list(config.fleet.options.get("sites") or [])
    if site.name not in sites:
        raise ConfigError(f"the federation has no site {site.name!r}; its sites are {', '.join(sites) or 'not named'}.")
    task, samples, skipped = load_split(parts.source, "train")
    site.limits.check_samples(len(samples), config.train_of(sites.index(site.name)).epochs)
    holdings = site.holdings(samples, sites.index(site.name))
    return Dataset(task, samples, [], skipped, Manifest.of(holdings, config.partition.clients))


def parts_at(text: str, site: SiteData | None) -> Parts:
    """The experiment of the server's TOML text, as far as the site's file allows it. Opens nothing; raises ConfigError.

    Of what the server names, a site uses no data, no judge, no tracker and no device. It opens a model only as its file says.
    """
    raw = tomllib.loads(text)
    raw.pop("track", None)
    if site is None:
        return build(validate(raw, "the server's experiment"))
    raw["task"] = site.task.model_dump(mode="json", exclude_none=True)
    config = validate(raw, "the server's experiment")
    site.limits.check_clients(config.partition.clients)
    if not site.model:
        site.limits.check_model(config.model.name)
    if config.model.trust_remote_code and not site.trust_remote_code:
        raise ConfigError(
            "model.trust_remote_code: the experiment runs code that comes with the model, and this site's file does not allow "
            "it."
        )
    placed = {"device": site.device, "device_map": config.model.device_map if site.device == "auto" else "none"}
    own = {
        "model": config.model.model_copy(update={**placed, "name": site.model or config.model.name}),
        "eval": config.eval.model_copy(update={"transfer": None, "suites": None}),
        "judge": Named(name="none"),
    }
    parts = build(config.model_copy(update=own))
    if site.secure and parts.secure is None:
        raise ConfigError('secure.name: this site\'s file requires hidden updates, and the experiment says "none".')
    if parts.secure is not None and config.train.clients_per_round < site.min_peers:
        raise ConfigError(
            f"train.clients_per_round = {config.train.clients_per_round} is less than min_peers = {site.min_peers} in this "
            "site's file: a sum of so few updates reveals too much about each."
        )
    return parts


def check_job(job: Job, config: Experiment, site: SiteData) -> None:
    """Raises ConfigError for a job that a server which follows the experiment does not send to this site."""
    client, train = config.fleet.options["sites"].index(site.name), config.train
    if job.client != client:
        raise ConfigError(f"the server sends a job for client {job.client}, and this site is client {client}.")
    if job.kind not in ("train", *PHASES):
        return
    if not 0 <= job.round < train.rounds:
        raise ConfigError(f"the server begins round {job.round}, and the experiment has {train.rounds}.")
    if job.steps:
        raise ConfigError("the server limits the optimizer steps of a round, which it may only in simulations.")
    plan = FederationPlan.of(train, range(config.partition.clients), config.seed)
    if job.kind in PHASES and job.sampled != (drawn := sample_clients(plan, job.round)):
        raise ConfigError(
            f"the server hides updates in a sum over clients {brief(str(job.sampled), 100)}, and the experiment draws "
            f"{len(drawn)} others for round {job.round}, so nothing is sent."
        )


class SiteExperiment:
    """One experiment as a site sees it, with the model loaded. `attempts` is the folder in which a site remembers masked
    rounds."""

    def __init__(self, text: str, site: SiteData | None, attempts: Path | None = None) -> None:
        parts = parts_at(text, site)
        self.config, self.algorithm = parts.config, parts.algorithm
        memory = Attempts(attempts, text) if attempts else None
        self.secure_clients = SecureClients(parts.secure, self.algorithm, memory) if parts.secure else None
        dataset = parts.prepare() if site is None else site_dataset(parts, site)
        self.session = Session(parts, replace(dataset, test=[], of_rounds=None))  # the server tests
        if site is not None:
            site.limits.check_reply(sum(self.session.first_messages()[1].values()))
        self._cohort = 1
        self._test_set: tuple[Task, TestSet] | None = None

    def test_set(self, site: SiteData | None) -> tuple[Task, TestSet]:
        """The questions of the site's own test data. Raises ConfigError if it has none."""
        if site is None or not site.has_test_data:
            raise ConfigError("this site has no test data; name some in its file (jsonl_test), or set fleet.evaluate = false.")
        if self._test_set is None:
            task, samples, _ = load_split(open_source(site.task), "test")
            hidden: dict[str, Any] = dict.fromkeys(set(MODALITIES) - site.modalities)
            limited = [replace(sample, **hidden) for sample in samples]
            site.limits.check_samples(len(limited))
            visible, config, session = [sample for sample in limited if sample.modalities], self.config, self.session
            strategy, bad = session.parts.strategy, site.task.on_bad_sample
            test_set = TestSet(session.model, task, visible, config.eval.patterns, strategy, config.train, bad)
            session.model.prepare_features()
            self._test_set = task, test_set
        return self._test_set

    def info(self, job: Job) -> RoundInfo:
        """The round of a job. What the job leaves out, a site knows from the experiment and from its own model."""
        config, adapter, mechanism = self.config, self.session.model.info, self.session.parts.mechanism
        rounds = mechanism.rounds if mechanism else config.train.rounds  # a privacy budget may end a run early
        clients = config.partition.clients
        return RoundInfo(job.round, rounds, clients, job.sampled, config.seed, adapter, job.ranks, lr=job.lr, steps=job.steps)

    def fleet(self, memory: Path, clients: Sequence[int], round: int) -> InProcessFleet:
        """A fleet that trains these clients in this process in that round, with as many in one pass as fit in memory."""
        session, train, attack = self.session, self.config.train, self.session.parts.attack
        falsified = attack is not None and attack.falsify is not None and round >= attack.start
        data = session.attacked if falsified else session.clients
        session.prepare(data, clients)
        if len(clients) > self._cohort:
            samples = (sample for client in clients for sample in data[client])
            self._cohort = cohort_size(session.model, samples, self.config.largest_batches(clients), len(clients))
        context = FleetContext(session.model, self.algorithm, data, train, session.initial, session.gaps, memory, self._cohort)
        return InProcessFleet(replace(context, in_round=data.changing, train_of=self.config.train_of))
