"""The client side of secure rounds, for all the clients that one process serves. What a fleet calls where clients train."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from fedmllm.algorithms import Algorithm, RoundInfo, Update
from fedmllm.secure import primitives as crypto
from fedmllm.secure.fixed import FixedPoint
from fedmllm.secure.party import MaskGroup, Party, Refusal, unboxed
from fedmllm.secure.settings import Pairwise, Phase
from fedmllm.tensors import State, digest, flatten

Train = Callable[[Mapping[int, State]], Iterable[Update]]
"""(client -> its message of the round) -> their updates, as in a round without secure aggregation."""


class Parties:
    """Keeps what clients must remember from one question of a round to the next: in memory alone, and for one round each.

    The four questions of a round must therefore reach the same object. One that comes twice, as networks have it, is answered
    with the same words; a second one that differs is refused.
    """

    def __init__(self, settings: Pairwise, algorithm: Algorithm) -> None:
        self._settings, self._algorithm = settings, algorithm
        self._known: dict[int, tuple[MaskGroup, Party]] = {}
        self._answered: dict[int, dict[Phase, tuple[str, Update]]] = {}

    def answer(self, phase: Phase, run: str, info: RoundInfo, messages: Mapping[int, State], train: Train) -> Sequence[Update]:
        """What each client says: groups of tensors, or a problem. `run` names one run for good, `info` is the round.

        Nothing else is in the answers: the counts and metrics of single clients stay here.
        """
        asked = {client: digest(flatten(state)) for client, state in messages.items()}
        again = {client: self._answered.get(client, {}).get(phase, ("", None)) for client in messages}
        known = {client: said for client, (was, said) in again.items() if said is not None and was == asked[client]}
        new = {client: state for client, state in messages.items() if client not in known}
        if phase == "masked":
            made = self._masked(run, info, new, train)
        else:
            made = {c: _said(c, partial(self._step, phase, c, run, info, state)) for c, state in new.items()}
        for client, one in made.items():
            answered = {} if phase == "keys" else self._answered.get(client, {})
            answered.setdefault(phase, (asked[client], one))
            if phase == "unmask":  # it is large, and of no more use
                answered.pop("masked", None)
            self._answered[client] = answered
        said = known | made
        return [said[client] for client in messages if client in said]

    def _step(self, phase: Phase, client: int, run: str, info: RoundInfo, state: State) -> State:
        if phase == "keys":
            attempt = unboxed(state.get("keys", {}), "attempt", crypto.SECRET)
            group = MaskGroup.of(self._settings, run, info, attempt)
            self._known[client] = group, Party(group, client)
            return self._party(client, run, info).keys()
        party = self._party(client, run, info)
        return party.shares(state) if phase == "shares" else party.unmask(state)

    def _party(self, client: int, run: str, info: RoundInfo) -> Party:
        if client not in self._known or self._known[client][0].name[:2] != (run, info.round):
            raise Refusal("secure aggregation: it was restarted in the middle of the round")
        return self._known[client][1]

    def _masked(self, run: str, info: RoundInfo, messages: Mapping[int, State], train: Train) -> dict[int, Update]:
        opened = {c: _said(c, partial(self._open, c, run, info, state)) for c, state in messages.items()}
        refused = {client: said for client, said in opened.items() if said.problem}
        plain = {c: {g: t for g, t in state.items() if g != "shares"} for c, state in messages.items() if c not in refused}
        # Who withdraws is not trained; who trained and cannot be summed withdraws after all.
        updates = {update.client: update for update in train(plain)} if plain else {}
        return refused | {c: _said(c, partial(self._mask, c, run, info, plain[c], one)) for c, one in updates.items()}

    def _open(self, client: int, run: str, info: RoundInfo, state: State) -> State:
        self._party(client, run, info).open(state)
        return {}

    def _mask(self, client: int, run: str, info: RoundInfo, received: State, update: Update) -> State:
        if update.problem:
            raise Refusal(update.problem)
        if self._algorithm.averages is None:
            raise Refusal("secure aggregation: the algorithm does not average")
        fixed = FixedPoint.of(self._settings, len(info.sampled), self._algorithm.averages)
        return self._party(client, run, info).masked(fixed.encode(change_of(update.groups, received), update), fixed)


def _said(client: int, what: Callable[[], State]) -> Update:
    try:
        return Update(client, what(), 0, 0)
    except ValueError as error:  # of this package alone, and so without anything of the data
        return Update(client, {}, 0, 0, problem=str(error))


def change_of(upload: State, received: State) -> State:
    """What of an upload is summed: the change of the adapter against what was sent, and other groups as they are."""
    change = {name: tensor - received["adapter"][name].to(tensor) for name, tensor in upload["adapter"].items()}
    return {**upload, "adapter": change}


__all__ = ["Parties", "Train", "change_of"]
