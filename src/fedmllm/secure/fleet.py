"""A fleet that wraps another one: clients send masked updates, and the round loop receives copies of their mean.

An algorithm that only averages cannot distinguish the updates from copies of their mean. `Algorithm.averages` says which
algorithms these are, and a test checks every algorithm. The loop, the records and the algorithms therefore work unchanged.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedmllm.algorithms import Algorithm, RoundInfo, Update, failed
from fedmllm.algorithms.combining import as_upload
from fedmllm.federation import Fleet, TooFewUpdates
from fedmllm.progress import ProgressCallback, no_progress
from fedmllm.secure.clients import SecureClients
from fedmllm.secure.fixed import COUNTS, FixedPoint, size
from fedmllm.secure.secure_round import SecureRound, TooFew
from fedmllm.secure.settings import PHASES, Pairwise, Phase
from fedmllm.secure.transport import SecureTransport
from fedmllm.tensors import State


class LocalTransport:
    """The transport to clients that `fleet` trains in this process."""

    def __init__(self, settings: Pairwise, algorithm: Algorithm, fleet: Fleet, run: str) -> None:
        self._clients, self._fleet, self._run = SecureClients(settings, algorithm), fleet, run

    def request(self, phase: Phase, info: RoundInfo, messages: Mapping[int, State]) -> Sequence[Update]:
        return self._clients.answer(phase, self._run, info, messages, lambda unmasked: self._fleet.train(info, unmasked))


class SecureFleet:
    """`fleet` handles everything but training: `forget`, `commit` and `personal`. `transport` carries the requests of the
    protocol and may be the same object. `run` is the run's permanent name, which the clients know as well."""

    def __init__(
        self,
        settings: Pairwise,
        algorithm: Algorithm,
        fleet: Fleet,
        transport: SecureTransport,
        run: str,
        progress: ProgressCallback = no_progress,
    ) -> None:
        self._settings, self._algorithm, self._run, self._progress = settings, algorithm, run, progress
        self.fleet, self._transport = fleet, transport
        self.forget, self.commit, self.personal = fleet.forget, fleet.commit, fleet.personal

    def train(self, info: RoundInfo, messages: Mapping[int, State]) -> Sequence[Update]:
        """One update per client: a copy of the mean for clients in the sum, a problem for the others.

        Raises TooFewUpdates if the sum cannot be unmasked.
        """
        assert self._algorithm.averages is not None, "refused before a run begins"
        received = next(iter(messages.values()))
        # Uploads have the shapes of what is sent down, so a message determines them as well as the server's state.
        shapes = self._algorithm.uploads(received, info.sampled[0], info)
        fixed = FixedPoint.of(self._settings, len(info.sampled), self._algorithm.averages)

        def request(phase: Phase, requests: Mapping[int, State]) -> Sequence[Update]:
            self._progress("secure round", PHASES.index(phase), len(PHASES), f"{phase}: {len(requests)} clients")
            return self._transport.request(phase, info, requests)

        secure_round = SecureRound(self._settings, self._run, info, fixed, request)
        try:
            total, present = secure_round.run(messages, shapes)
            mean, sums = fixed.decode(total, shapes, len(present))
            self._progress("secure round", len(PHASES), len(PHASES), "")
        except (TooFew, ValueError) as error:
            self.fleet.forget(info.round, sorted(info.sampled))
            raise TooFewUpdates(str(error)) from None
        if sums["clipped"]:
            share = sums["clipped"] / (size(shapes) * len(present))
            logging.getLogger(__name__).warning(
                "round %d: %.2g of the numbers exceeded secure.clip = %g and were clipped; raise it",
                info.round, share, self._settings.clip,
            )  # fmt: skip
        groups = as_upload(mean, received, shapes)
        metrics = {name: value for name, value in sums.items() if name not in COUNTS}
        examples, steps = (_even_parts(int(sums[name]), len(present)) for name in ("examples", "steps"))
        counts = zip(present, examples, steps, strict=True)
        updates = {client: Update(client, groups, n_examples, n_steps, metrics) for client, n_examples, n_steps in counts}
        updates |= {c: failed(c, secure_round.problems[c]) for c in info.sampled if c not in updates}
        return [replace(updates[c], travelled=(dict(secure_round.down[c]), dict(secure_round.up[c]))) for c in info.sampled]


def _even_parts(count: int, parts: int) -> list[int]:
    """`count` in parts that differ by at most 1: their sum is correct, and none of them is a client's own number."""
    return [count // parts + (position < count % parts) for position in range(parts)]
