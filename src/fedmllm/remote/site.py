"""A site: its own data, and the server's experiment as the site sees it.

A site with data of its own takes from the server's experiment how to train, but never on which data.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedmllm.config import TaskTable, validate
from fedmllm.data.dataset import Dataset, load_split, open_source
from fedmllm.data.manifest import Holding, Manifest
from fedmllm.data.samples import MODALITIES, Modality, Sample, Task
from fedmllm.errors import ConfigError
from fedmllm.evaluation.test_set import TestSet
from fedmllm.experiment.parts import Parts, build
from fedmllm.fleets.base import FleetContext
from fedmllm.fleets.inprocess import InProcessFleet
from fedmllm.runs.session import Session
from fedmllm.secure.clients import SecureClients
from fedmllm.tensors import Tensors
from fedmllm.training.capacity import cohort_size


@dataclass(frozen=True)
class SiteData:
    """A site's own data and settings: `modalities` are those that may be used. If `secure`, the site takes part only in runs
    whose server cannot see its updates."""

    name: str
    task: TaskTable
    modalities: frozenset[Modality] = frozenset(MODALITIES)
    device: str = "auto"
    trust_remote_code: bool = False
    has_test_data: bool = False
    model: str = ""
    """The model on this machine, if it is not where the experiment says."""
    secure: bool = False

    def holdings(self, samples: Sequence[Sample], client: int) -> list[Holding]:
        """The samples as those of a client, limited to the modalities that may be used."""
        held = [Holding(sample.id, client, sample.modalities & self.modalities) for sample in samples]
        return [holding for holding in held if holding.visible]


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
    holdings = site.holdings(samples, sites.index(site.name))
    return Dataset(task, samples, [], skipped, Manifest.of(holdings, config.partition.clients))


class SiteExperiment:
    """One experiment as a site sees it, with the model loaded."""

    def __init__(self, text: str, site: SiteData | None) -> None:
        raw = tomllib.loads(text)
        if site is not None:
            raw["task"] = site.task.model_dump(mode="json", exclude_none=True)
            raw.setdefault("model", {})["device"] = site.device
            if site.model:
                raw["model"]["name"] = site.model
            if raw["model"].get("trust_remote_code") and not site.trust_remote_code:
                raise ConfigError(
                    "model.trust_remote_code: the experiment runs code that comes with the model, and this site's file "
                    "does not allow it."
                )
        parts = build(validate(raw, "the server's experiment"))
        self.config, self.algorithm = parts.config, parts.algorithm
        if site is not None and site.secure and parts.secure is None:
            raise ConfigError('secure.name: this site\'s file requires hidden updates, and the experiment says "none".')
        self.secure_clients = SecureClients(parts.secure, self.algorithm) if parts.secure else None
        dataset = parts.prepare() if site is None else site_dataset(parts, site)
        self.session = Session(parts, replace(dataset, test=[]))  # the server tests
        self._cohort = 1
        self._test_set: tuple[Task, TestSet] | None = None

    def test_set(self, site: SiteData | None) -> tuple[Task, TestSet]:
        """The questions of the site's own test data. Raises ConfigError if it has none."""
        if site is None or not site.has_test_data:
            raise ConfigError("this site has no test data; name some in its file (jsonl_test), or set fleet.evaluate = false.")
        if self._test_set is None:
            task, samples, _ = load_split(open_source(site.task), "test")
            limited = [
                replace(
                    sample,
                    image=sample.image if "image" in site.modalities else None,
                    text=sample.text if "text" in site.modalities else None,
                )
                for sample in samples
            ]
            visible, config, session = [sample for sample in limited if sample.modalities], self.config, self.session
            test_set = TestSet(session.model, task, visible, config.eval.patterns, session.parts.strategy, config.train)
            session.model.prepare_features()
            self._test_set = task, test_set
        return self._test_set

    def fleet(self, memory: Path, clients: Sequence[int]) -> InProcessFleet:
        """A fleet that trains these clients in this process, with as many in one pass as fit in memory."""
        session, train = self.session, self.config.train
        session.prepare(session.clients, clients)
        if len(clients) > self._cohort:
            samples = (sample for client in clients for sample in session.clients[client])
            self._cohort = cohort_size(session.model, samples, train, len(clients))
        context = FleetContext(
            session.model, self.algorithm, session.clients, train, session.initial, session.gaps, memory, self._cohort
        )
        return InProcessFleet(context)
