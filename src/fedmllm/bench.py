"""The loaded model with the data put before it, ready for any number of runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from fedmllm.config import Experiment
from fedmllm.data.manifest import Holding, Manifest
from fedmllm.data.prompts import Strategy, prompts, render
from fedmllm.evaluation.evaluate import Examination
from fedmllm.evaluation.transfer import Transfer
from fedmllm.experiment import Data, Report, check_model, load_transfer, silent
from fedmllm.models.mllm import Encoded


class Clients(Mapping[int, list[Encoded]]):
    """client -> its samples, encoded when it is first asked for and kept: what a run costs depends on the clients that take
    part in it, not on how many there are. Going over the values encodes everything."""

    def __init__(self, manifest: Manifest, encode: Callable[[Sequence[Holding]], list[Encoded]]) -> None:
        self.manifest = manifest
        self._encode = encode
        self._encoded: dict[int, list[Encoded]] = {}

    def __getitem__(self, client: int) -> list[Encoded]:
        if client not in self:
            raise KeyError(client)
        if client not in self._encoded:
            self._encoded[client] = self._encode(self.manifest.of_client(client))
        return self._encoded[client]

    def __contains__(self, client: object) -> bool:
        return isinstance(client, int) and 0 <= client < self.manifest.clients

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.manifest.clients))

    def __len__(self) -> int:
        return self.manifest.clients


class Bench:
    """A loaded model with the questions of the evaluation, and the clients' samples as far as runs ask for them."""

    def __init__(self, config: Experiment, data: Data, report: Report = silent) -> None:
        began = time.monotonic()
        report("loading the model", 0, 0, config.model.name)
        self.config, self.data, self._report = config, data, report
        self.model = check_model(config)
        self.initial = self.model.adapter.get()
        self.strategy: Strategy = prompts.build(config.prompt.name, config.prompt.options)
        self._sample = {s.id: s for s in data.train}
        self.clients = Clients(data.manifest, self.encode)
        report("encoding questions", 0, 0, f"{len(data.test)} to test on")
        self.examination = Examination(
            self.model, data.task, data.test, config.eval.patterns, self.strategy, config.train.max_length
        )
        self.seconds = time.monotonic() - began

    @cached_property
    def pooled(self) -> Clients:
        """One client that holds everything: what centralised training sees."""
        return Clients(self.data.manifest.pooled(self.data.train), self.encode)

    @cached_property
    def transfer(self) -> Transfer:
        """The test sets of `eval.transfer`. Raises ConfigError and DataError for what is wrong with them."""
        config = self.config
        return Transfer(self.model, load_transfer(config), config.eval, self.strategy, config.train.max_length)

    def encode(self, holdings: Sequence[Holding]) -> list[Encoded]:
        """Samples as their clients see them. Raises DataError for a prompt that is too long. Pictures met for the first
        time wait for `prepare_features`."""
        samples = [self._sample[h.sample_id] for h in holdings]
        conversations = [render(s, h.visible, self.strategy) for s, h in zip(samples, holdings, strict=True)]
        return self.model.encode(conversations, [s.image for s in samples], self.config.train.max_length)

    def prepare(self, clients: Clients, taking_part: Collection[int]) -> int:
        """Encode the clients that will take part, and put all pictures met so far through the vision tower; how many were.

        Before a run begins, so that a prompt that is too long ends nothing that has begun. Raises DataError.
        """
        manifest = clients.manifest
        count = int(manifest.counts()[list(taking_part), 0].sum())
        if taking_part:
            self._report("encoding samples", 0, 0, f"{count}, of {len(taking_part)} of {manifest.clients} clients")
        for client in taking_part:
            clients[client]
        # Where these are most of all there is, the pictures of the others too: another seed samples other clients, and then
        # finds the features made.
        if 2 * count >= len(manifest):
            shown = (self._sample[h.sample_id].image for h in manifest if "image" in h.visible)
            self.model.meet(image for image in shown if image is not None)
        self._report("encoding pictures", 0, 0, "once, then kept")
        return self.model.prepare_features()

    def check(self) -> None:
        """Encode every sample of every client, and keep none. Raises DataError for a prompt that is too long."""
        number = len(self.clients)
        for client in self.clients:
            if client % max(1, number // 10) == 0:
                self._report("checking prompts", client, number, "")
            self.encode(self.data.manifest.of_client(client))


def rounds_alone(config: Experiment) -> int:
    """Rounds for a client that trains alone: as many as it would take part in, on average, in the federation."""
    train = config.train
    return max(1, round(train.rounds * train.clients_per_round / config.partition.clients))


def gaps(manifest: Manifest) -> list[float]:
    """For each client the share of the 2 · samples modality slots that are empty; 1 where it holds nothing."""
    return [round(1 - (image + text) / (2 * n), 6) if n else 1.0 for n, image, text in manifest.counts().tolist()]


def client_rows(manifest: Manifest) -> list[dict[str, Any]]:
    """What each client holds and sees: `samples`, of them `image` and `text` visible, and its `gap`."""
    rows = zip(manifest.counts().tolist(), gaps(manifest), strict=True)
    return [
        {"client": client, "samples": n, "image": image, "text": text, "gap": gap}
        for client, ((n, image, text), gap) in enumerate(rows)
    ]
