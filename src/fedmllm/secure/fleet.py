"""A fleet around a fleet: its updates come as one sum, and what the round loop is given are copies of their mean.

An algorithm that only averages cannot tell the updates from as many copies of their mean; `Algorithm.averages` says which do,
and a test holds every algorithm to it. So the loop, the records and the algorithms need not know that updates are hidden.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from fedmllm.algorithms import Algorithm, RoundInfo, Update
from fedmllm.federation import Fleet, TooFewUpdates
from fedmllm.secure.fixed import COUNTS, FixedPoint, size
from fedmllm.secure.secure_round import SecureRound, TooFew
from fedmllm.secure.settings import Pairwise, Phase
from fedmllm.secure.site import Parties
from fedmllm.secure.transport import SecureTransport
from fedmllm.tensors import State, Tensors


class LocalTransport:
    """For clients in this process: `fleet` trains them, and what passes between its two sides is what would travel."""

    def __init__(self, settings: Pairwise, algorithm: Algorithm, fleet: Fleet, run: str) -> None:
        self._parties, self._fleet, self._run = Parties(settings, algorithm), fleet, run

    def ask(self, phase: Phase, info: RoundInfo, messages: Mapping[int, State]) -> Sequence[Update]:
        return self._parties.answer(phase, self._run, info, messages, lambda plain: self._fleet.train(info, plain))


class SecureFleet:
    """`fleet` is who forgets, commits and knows personal adapters; `carrier` puts the questions, and may be the same object.
    `run` names the run for good, here and at the clients."""

    def __init__(self, settings: Pairwise, algorithm: Algorithm, fleet: Fleet, carrier: SecureTransport, run: str) -> None:
        self._settings, self._algorithm, self._fleet, self._carrier, self._run = settings, algorithm, fleet, carrier, run

    def train(self, info: RoundInfo, messages: Mapping[int, State]) -> Sequence[Update]:
        """An update for every client: copies of the mean for those in the sum, a problem for the others.

        Raises TooFewUpdates where the sum cannot be unmasked.
        """
        assert self._algorithm.averages is not None, "refused before a run begins"
        sent = next(iter(messages.values()))
        # What goes up is shaped like what goes down, so the message says it as well as the server's state.
        shapes = self._algorithm.uploads(sent, info.sampled[0], info)
        fixed = FixedPoint.of(self._settings, len(info.sampled), self._algorithm.averages)
        gathering = SecureRound(
            self._settings, self._run, info, fixed, lambda phase, asked: self._carrier.ask(phase, info, asked)
        )
        try:
            total, here = gathering.run(messages, shapes)
            mean, told = fixed.decode(total, shapes, len(here))
        except (TooFew, ValueError) as error:
            self._fleet.forget(info.round, sorted(info.sampled))
            raise TooFewUpdates(str(error)) from None
        if told["clipped"]:
            share = told["clipped"] / (size(shapes) * len(here))
            logging.getLogger(__name__).warning(
                "round %d: %.2g of the numbers were beyond secure.clip = %g and were cut; raise it",
                info.round, share, self._settings.clip,
            )  # fmt: skip
        return self._copies(info, gathering, _received(mean, sent, shapes), here, told)

    def _copies(
        self, info: RoundInfo, gathering: SecureRound, groups: State, here: Sequence[int], told: Mapping[str, float]
    ) -> list[Update]:
        metrics = {name: value for name, value in told.items() if name not in COUNTS}
        examples, steps = (_dealt(int(told[name]), len(here)) for name in ("examples", "steps"))
        updates = []
        for client in info.sampled:
            travelled = dict(gathering.down[client]), dict(gathering.up[client])
            if client in here:
                place = here.index(client)
                updates.append(Update(client, groups, examples[place], steps[place], metrics, travelled=travelled))
            else:
                updates.append(Update(client, {}, 0, 0, problem=gathering.problems[client], travelled=travelled))
        return updates

    def forget(self, round: int, clients: Sequence[int]) -> None:
        self._fleet.forget(round, clients)

    def commit(self, round: int) -> None:
        self._fleet.commit(round)

    def personal(self, client: int, message: State, done: int) -> Tensors:
        return self._fleet.personal(client, message, done)


def _dealt(count: int, shares: int) -> list[int]:
    """`count` in as equal parts as may be: their sum is true, and none is a client's own."""
    return [count // shares + (place < count % shares) for place in range(shares)]


def _received(mean: State, sent: State, shapes: State) -> State:
    """The mean as an upload: the adapter is the one that was sent, with the mean change."""
    made = {}
    for group, tensors in mean.items():
        start = sent["adapter"] if group == "adapter" else {}
        made[group] = {
            name: (tensor + start[name].double() if name in start else tensor).to(shapes[group][name].dtype)
            for name, tensor in tensors.items()
        }
    return made


__all__ = ["LocalTransport", "SecureFleet"]
