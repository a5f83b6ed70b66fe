"""A session: a loaded model and its encoded data, ready for any number of runs."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cached_property, partial
from typing import TypeVar

import numpy as np

from fedmllm.algorithms import RoundInfo
from fedmllm.data import manifest as manifests
from fedmllm.data.corruptions import OtherTexts, corrupted
from fedmllm.data.dataset import Dataset, check_patterns, load_split, shown_samples
from fedmllm.data.files import EntryError
from fedmllm.data.loading import problem_of, refuse_problems
from fedmllm.data.manifest import Holding
from fedmllm.data.prompts import Conversation, render
from fedmllm.data.samples import Problem, Sample, Split
from fedmllm.data.scenarios import Modalities
from fedmllm.data.stored import Samples
from fedmllm.data.summary import gaps
from fedmllm.evaluation.test_set import TestSet
from fedmllm.evaluation.transfer import Transfer
from fedmllm.experiment.compatibility import check_adapter
from fedmllm.experiment.parts import Parts
from fedmllm.models.checkpointing import check_layers
from fedmllm.models.encoded import Encoded
from fedmllm.models.mllm import MLLM
from fedmllm.progress import DETAIL, ProgressCallback, RunLog, no_progress
from fedmllm.rng import stream
from fedmllm.runs.client_data import ClientData
from fedmllm.runs.machine import details
from fedmllm.runs.memory import check_enough, longest, memory_of, who_lacks
from fedmllm.secure.fixed import FixedPoint, size
from fedmllm.tensors import nbytes
from fedmllm.training.capacity import pass_bytes, training_bytes

T = TypeVar("T")
_LONGEST, _TOKENISED = 8, 200
"""How many of the longest samples, and about how many of all samples, `check_prompts` tokenises."""


class Session:
    """A loaded model, its test questions, and the clients' samples as far as runs have asked for them."""

    def __init__(self, parts: Parts, dataset: Dataset, progress: ProgressCallback = no_progress) -> None:
        """Raises ConfigError if the model cannot be loaded or its adapter does not suit the algorithm."""
        began = time.monotonic()
        self.parts, self.config, self.dataset, self.progress = parts, parts.config, dataset, RunLog.of(progress)
        for note in dataset.notes:
            self.progress("note", 0, 0, note)
        self.progress("loading the model", 0, 0, self.config.model.name)
        self.model = MLLM.load(self.config.model, self.config.seed)
        self.model.progress = self.progress
        self.model.limits.tell = partial(self.progress, "note", 0, 0)
        for detail in details(self.model):
            self.progress(DETAIL, 0, 0, detail)
        if self.config.train.checkpointing:
            check_layers(self.model.model, self.config.model.name)
        self.initial = self.model.adapter.get()
        check_adapter(self.config, parts.algorithm, self.initial, self.model.info)
        self._samples = Samples.of(dataset.train).ordered()
        self._refused: dict[str, Problem] = {}
        self.clients = ClientData(dataset.manifest, self.encode)
        of_rounds = "" if dataset.of_rounds is None else f", {len(dataset.of_rounds)} to score rounds on"
        self.progress("encoding questions", 0, 0, f"{len(dataset.test)} to test on{of_rounds}")
        patterns, train, bad = self.config.eval.patterns, self.config.train, self.config.task.on_bad_sample
        self.test_set = TestSet(self.model, dataset.task, dataset.test, patterns, parts.strategy, train, bad)
        self.round_set = self.test_set
        if dataset.of_rounds is not None:
            self.round_set = TestSet(self.model, dataset.task, dataset.of_rounds, patterns, parts.strategy, train, bad)
        self.seconds = time.monotonic() - began

    @cached_property
    def pooled(self) -> ClientData:
        """One client that holds everything: the data of centralised training."""
        return ClientData(manifests.pooled(self.dataset.train), self.encode)

    @cached_property
    def attackers(self) -> frozenset[int]:
        """The clients that attack."""
        attack = self.parts.attack
        return attack.attackers(self.config.partition.clients, self.config.seed) if attack else frozenset()

    @cached_property
    def attacked(self) -> ClientData:
        """As `clients`, with what the attackers train on once the attack has begun."""
        return ClientData(self.dataset.manifest, self._encode_attacked)

    @cached_property
    def excluded(self) -> frozenset[int]:
        """The clients that take no part in a federation, because their devices have less memory than training takes; the
        user is told. Raises ConfigError if too few are left."""
        memory, manifest = memory_of(self.config), self.dataset.manifest
        if not memory:
            return frozenset()
        held = (holding for client in memory for holding in manifest.of_client(client))
        with self.model.forgetting_pictures():
            samples = longest(
                held,
                talk=lambda holding: self._talk(self._samples.find(holding.sample_id), holding.visible),
                encode=lambda holding: self._encode_one(self._seen(holding), holding.visible),
            )
            of_sample = max((pass_bytes(self.model, [sample], self.config.train)[0] for sample in samples), default=0)
        takes_at = lambda size: training_bytes(  # noqa: E731 (as short as it is)
            self.model, of_sample, self.config.train.model_copy(update={"batch_size": size})
        )
        lacking, takes = who_lacks(self.config, memory, takes_at)
        if lacking:
            check_enough(self.parts, lacking, takes)
            note = f"{len(lacking)} of {manifest.clients} clients do not take part: training takes {takes}, and "
            self.progress("note", 0, 0, note + "their devices have less (clients.memory)")
        return lacking

    @cached_property
    def gaps(self) -> dict[int, float]:
        """client -> the share of its modality slots that are empty."""
        return dict(enumerate(gaps(self.dataset.manifest)))

    @cached_property
    def transfer(self) -> Transfer:
        """The test sets of `eval.transfer`. Raises ConfigError or DataError if they cannot be read."""
        test_sets = {name: load_split(source, "test")[:2] for name, source in self.parts.transfer.items()}
        for name, (task, samples) in test_sets.items():
            patterns = self.config.eval.patterns
            # The patterns are the main task's; another task need not have a modality that this one has.
            tested = [pattern for pattern in patterns if shown_samples(pattern, samples)]
            check_patterns(tested or patterns, task, samples, f"{name!r} in eval.transfer")
        bad = {name: source.table.on_bad_sample for name, source in self.parts.transfer.items()}
        return Transfer(self.model, test_sets, self.config.eval, self.parts.strategy, self.config.train, bad)

    def encode(self, holdings: Sequence[Holding]) -> list[Encoded]:
        """Samples as their client sees them; `prepare` encodes new pictures.

        Raises DataError for a prompt that is too long or a picture that the processor refuses. If bad samples are to be
        skipped, such samples are left out, and DataError is raised for a client that would keep none.
        """
        shown = ((self._seen(holding), holding.visible) for holding in holdings)
        return self._each(shown, len(holdings), holdings[0].client if holdings else 0, self._encode_one)

    def _encode_attacked(self, holdings: Sequence[Holding]) -> list[Encoded]:
        client, attack = holdings[0].client if holdings else 0, self.parts.attack
        if client not in self.attackers or attack is None or attack.falsify is None:
            return self.encode(holdings)
        shown = [(self._seen(holding), holding.visible) for holding in holdings]
        falsified = attack.falsify(shown, lambda s: stream(self.config.seed, "attack", client, s.id))
        return self._each(falsified, len(falsified), client, self._encode_one)

    def _each(
        self, shown: Iterable[tuple[Sample, Modalities]], count: int, client: int, do: Callable[[Sample, Modalities], T]
    ) -> list[T]:
        """What `do` returns for each of the client's samples but the bad ones, for which it raises EntryError."""
        done: list[T] = []
        problems: dict[str, Problem] = {}
        for number, (sample, visible) in enumerate(shown):
            self.progress("encoding samples", number, count, f"client {client}")
            try:
                done.append(do(sample, visible))
            except EntryError as error:
                problems[sample.id] = problem_of(sample, self.dataset.task, str(error), error.kind)
        self.progress("encoding samples", count, count, f"client {client}")
        if problems:
            nothing_left = f"the model can use none of the {count} samples of client {client}"
            refuse_problems(list(problems.values()), len(done), nothing_left, self.config.task.on_bad_sample)
        self._refused |= problems
        return done

    def _talk(self, sample: Sample, visible: Modalities) -> Conversation:
        return render(sample, visible, self.parts.strategy)

    def _encode_one(self, sample: Sample, visible: Modalities) -> Encoded:
        return self.model.encode_one(self._talk(sample, visible), sample.image, self.config.train.max_length)

    def _check_one(self, sample: Sample, visible: Modalities) -> tuple[int, Sample, Modalities]:
        """(a number of tokens that the sample does not exceed, the sample, what its client sees of it)."""
        tokens = self.model.check_one(self._talk(sample, visible), sample.image, self.config.train.max_length)
        return tokens, sample, visible

    def _seen(self, holding: Holding) -> Sample:
        """The sample as bad as its client sees it."""
        return self._as_bad(self._samples.find(holding.sample_id), holding)

    def _as_bad(self, sample: Sample, holding: Holding) -> Sample:
        for modality, kind, severity in holding.noise:
            others = self._texts if kind == "other-text" else None
            sample = corrupted(sample, modality, kind, severity, self.config.seed, others)
        return sample

    @cached_property
    def _texts(self) -> OtherTexts:
        return OtherTexts(sample.text for sample in self.dataset.train if sample.text)

    @property
    def problems(self) -> dict[Split, list[Problem]]:
        """The samples that were left out because the model cannot take them, as far as samples have been encoded."""
        apart = self.config.eval.split == "test" and self.config.eval.every_split == "validation"
        held_out = self.round_set.problems if apart and self.dataset.of_rounds is not None else []
        return {"train": [*self._refused.values(), *held_out], "test": self.test_set.problems}

    @property
    def skipped(self) -> int:
        """The number of samples that were left out, for any reason."""
        return self.dataset.skipped + sum(map(len, self.problems.values()))

    def prepare(self, clients: ClientData, participants: Collection[int]) -> int:
        """Encode the participants' samples and every picture seen so far; the number of pictures encoded.

        Called before a run starts, so that a prompt that is too long interrupts nothing. Raises DataError.
        """
        manifest = clients.manifest
        count = int(manifest.counts()[list(participants), 0].sum())
        if participants:
            self.progress("encoding samples", 0, 0, f"{count}, of {len(participants)} of {manifest.clients} clients")
        for number, client in enumerate(participants):
            self.progress("clients", number, len(participants), "")
            clients[client]
        self.progress("clients", len(participants), len(participants), "")
        # If the participants hold most of the data, encode the pictures of the other clients too: another seed samples other
        # clients and then finds the features on disk.
        if 2 * count >= len(manifest):
            encoded = set(participants)
            others = (h for h in manifest if h.client not in encoded and "image" in h.visible)
            self.model.register_pictures(self._seen(holding).pictures for holding in others)
        self.progress("encoding pictures", 0, 0, "once, then kept")
        return self.model.prepare_features()

    def check_prompts(self) -> tuple[Encoded | None, float]:
        """Look at every sample of every client as `encode` does, and encode the questions of `eval.transfer`.

        Returns one of the longest samples, and how many tokens one has on average. Only some samples are tokenised.
        Raises ConfigError or DataError as `encode` does.
        """
        self.transfer, self.excluded  # noqa: B018 (read and encoded now)
        longest: list[tuple[int, Sample, Modalities]] = []
        manifest = self.dataset.manifest
        places, number, every, drawn = self._samples.places(manifest.ids), 0, max(1, len(manifest) // _TOKENISED), list[int]()
        for client in self.clients:
            self.progress("checking prompts", client, len(self.clients), "")
            holdings, first = manifest.of_client(client), int(np.searchsorted(manifest.owner, client))
            samples = self._samples.take(places[first : first + len(holdings)])  # faster than finding them one by one
            shown = ((self._as_bad(s, h), h.visible) for s, h in zip(samples, holdings, strict=True))
            for checked in self._each(shown, len(holdings), client, self._check_one):
                if len(longest) < _LONGEST or checked[0] > longest[-1][0]:
                    longest = heapq.nlargest(_LONGEST, [*longest, checked], key=lambda entry: entry[0])
                number += 1
                if number % every == 0:
                    drawn.append(self._encode_one(*checked[1:]).length)
        encoded = [self._encode_one(sample, visible) for _, sample, visible in longest]
        return max(encoded, key=lambda sample: sample.length, default=None), sum(drawn) / max(len(drawn), 1)

    def first_messages(self) -> tuple[dict[str, int], dict[str, int]]:
        """Bytes by group that client 0 receives and sends in the first round."""
        config, algorithm, secure = self.config, self.parts.algorithm, self.parts.secure
        state = algorithm.init(self.initial)
        ranks = {0: config.rank_of(0)}
        info = RoundInfo(0, config.train.rounds, config.partition.clients, (0,), config.seed, self.model.info, ranks)
        down, up = algorithm.message(state, 0, info), algorithm.uploads(state, 0, info)
        bytes_down = {group: nbytes(tensors) for group, tensors in down.items()}
        if secure is not None and algorithm.averages is not None:
            fixed = FixedPoint.of(secure, config.train.clients_per_round, algorithm.averages)
            return bytes_down, {"masked": fixed.nbytes(size(up))}
        return bytes_down, {group: nbytes(tensors) for group, tensors in up.items()}
