"""A fleet that wraps others: from the attack's first round on, its attackers train on falsified samples or send distorted
updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace

from fedmllm.algorithms import Algorithm, RoundInfo, Update
from fedmllm.algorithms.combining import as_upload
from fedmllm.algorithms.screening import changes_since
from fedmllm.attacks.settings import Attack
from fedmllm.federation import Fleet
from fedmllm.tensors import State, Tensors, flatten, unflatten


class AttackedFleet:
    """`honest` trains the clients of rounds before the attack, `attacked` those of the rounds after it began. They share the
    clients' memory, and are the same fleet unless the attack falsifies samples."""

    def __init__(self, attack: Attack, attackers: Set[int], algorithm: Algorithm, honest: Fleet, attacked: Fleet) -> None:
        self._attack, self._attackers, self._algorithm = attack, attackers, algorithm
        self._honest, self._attacked = honest, attacked

    def _fleet(self, round: int) -> Fleet:
        return self._attacked if round >= self._attack.start else self._honest

    def train(self, info: RoundInfo, messages: Mapping[int, State]) -> Sequence[Update]:
        updates = self._fleet(info.round).train(info, messages)
        if self._attack.distort is None or info.round < self._attack.start:
            return updates
        # Clients that could not train have nothing to distort, and are refused as honest ones are.
        own = {u.client: u for u in updates if u.client in self._attackers and not u.problem and u.examples}
        summed = self._algorithm.summed
        changes = {c: flatten(changes_since(messages[c], update.groups, summed)) for c, update in sorted(own.items())}
        sent = self._attack.distort(changes, info) if changes else {}
        uploads = {
            client: as_upload(unflatten(change), messages[client], own[client].groups) for client, change in sent.items()
        }
        return [replace(u, groups={**u.groups, **uploads[u.client]}) if u.client in uploads else u for u in updates]

    def forget(self, round: int, clients: Sequence[int]) -> None:
        self._fleet(round).forget(round, clients)

    def commit(self, round: int) -> None:
        self._fleet(round).commit(round)

    def personal(self, client: int, message: State, done: int) -> Tensors:
        return self._fleet(done).personal(client, message, done)
