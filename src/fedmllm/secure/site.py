"""The client side of secure rounds, for all the clients that one process serves. What a fleet calls where clients train."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from fedmllm.algorithms import Algorithm, RoundInfo, Update
from fedmllm.secure.fixed import FixedPoint
from fedmllm.secure.party import Circle, Party, Refusal
from fedmllm.secure.settings import Pairwise, Phase
from fedmllm.tensors import State

Train = Callable[[Mapping[int, State]], Iterable[Update]]
"""(client -> its message of the round) -> their updates, as in a round without secure aggregation."""


class Parties:
    """Keeps what clients must remember from one question of a round to the next: in memory alone, and for one round each.

    The four questions of a round must therefore reach the same object.
    """

    def __init__(self, settings: Pairwise, algorithm: Algorithm) -> None:
        self._settings, self._algorithm = settings, algorithm
        self._known: dict[int, tuple[Circle, Party]] = {}

    def answer(self, phase: Phase, run: str, info: RoundInfo, messages: Mapping[int, State], train: Train) -> Sequence[Update]:
        """What each client says: groups of tensors, or a problem. `run` names one run for good, `info` is the round.

        Nothing else is in the answers: the counts and metrics of single clients stay here.
        """
        if phase == "keys":
            circle = Circle.of(self._settings, run, info)
            self._known |= {client: (circle, Party(circle, client)) for client in messages}
        if phase == "masked":
            return self._masked(run, info, messages, train)
        steps = {"keys": lambda party, state: party.keys(), "shares": Party.shares, "unmask": Party.unmask}
        return [self._said(client, run, info, partial(_apply, steps[phase], state=state)) for client, state in messages.items()]

    def _said(self, client: int, run: str, info: RoundInfo, what: Callable[[Party], State]) -> Update:
        circle, party = self._known.get(client, (None, None))
        if circle is None or party is None or circle.name != (run, info.round):
            return _problem(client, "secure aggregation: it was restarted in the middle of the round")
        try:
            return Update(client, what(party), 0, 0)
        except ValueError as error:  # of this package alone, and so without anything of the data
            return _problem(client, str(error))

    def _masked(self, run: str, info: RoundInfo, messages: Mapping[int, State], train: Train) -> list[Update]:
        opened = [self._said(c, run, info, partial(_open, state=state)) for c, state in messages.items()]
        refused = {one.client: one for one in opened if one.problem}
        plain = {c: {g: t for g, t in state.items() if g != "shares"} for c, state in messages.items() if c not in refused}
        # Who withdraws is not trained; who trained and cannot be summed withdraws after all.
        updates = {update.client: update for update in train(plain)} if plain else {}
        made = {c: self._said(c, run, info, partial(self._mask, plain[c], updates[c], info)) for c in updates}
        return [{**refused, **made}[client] for client in messages]

    def _mask(self, received: State, update: Update, info: RoundInfo, party: Party) -> State:
        if update.problem:
            raise Refusal(update.problem)
        if self._algorithm.averages is None:
            raise Refusal("secure aggregation: the algorithm does not average")
        fixed = FixedPoint.of(self._settings, len(info.sampled), self._algorithm.averages)
        return party.masked(fixed.encode(change_of(update.groups, received), update), fixed)


def change_of(upload: State, received: State) -> State:
    """What of an upload is summed: the change of the adapter against what was sent, and other groups as they are."""
    change = {name: tensor - received["adapter"][name].to(tensor) for name, tensor in upload["adapter"].items()}
    return {**upload, "adapter": change}


def _apply(step: Callable[[Party, State], State], party: Party, state: State) -> State:
    return step(party, state)


def _open(party: Party, state: State) -> State:
    party.open(state)
    return {}


def _problem(client: int, why: str) -> Update:
    return Update(client, {}, 0, 0, problem=why)


__all__ = ["Parties", "Train", "change_of"]
