"""Rounds of secure aggregation with toy clients, whose messages are recorded and may be altered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from fedmllm.algorithms import Algorithm, RoundInfo, Update, algorithms
from fedmllm.secure.attempts import Attempts
from fedmllm.secure.clients import SecureClients, change_of
from fedmllm.secure.fixed import FixedPoint
from fedmllm.secure.fleet import LocalTransport, SecureFleet
from fedmllm.secure.settings import PHASES, Pairwise, Phase, secures
from fedmllm.tensors import State
from helpers import (
    FakeFleet,
    lora_adapter,
    round_info,
)

RUN = "ab" * 8
AVERAGING = [name for name in algorithms.names() if algorithms.build(name, {}).averages]
Alter = Callable[[Phase, Update], Update | None]


def settings(**options: object) -> Pairwise:
    pairwise = secures.build("pairwise", options)
    assert pairwise is not None
    return pairwise


class Clients(FakeFleet):
    """Trains only the clients that receive a message, as in a round that lost some clients."""

    def train(self, info: RoundInfo, messages: Mapping[int, State]) -> Sequence[Update]:
        self.trained = super().train(replace(info, sampled=tuple(messages)), messages)
        return self.trained

    def forget(self, round: int, clients: Sequence[int]) -> None:
        for client in clients:
            if client in self.before:
                self.memory[client] = self.before[client]


@dataclass
class RecordingTransport:
    """Keeps everything that the server sends and receives; `alter` may replace an answer, or lose it by returning None."""

    inner: LocalTransport
    alter: Alter = lambda phase, answer: answer
    sent: dict[Phase, Mapping[int, State]] = field(default_factory=dict)
    received: dict[Phase, dict[int, Update]] = field(default_factory=dict)

    def request(self, phase: Phase, info: RoundInfo, messages: Mapping[int, State]) -> Sequence[Update]:
        self.sent[phase] = messages
        answers = [self.alter(phase, answer) for answer in self.inner.request(phase, info, messages)]
        self.received[phase] = {answer.client: answer for answer in answers if answer is not None}
        return list(self.received[phase].values())


def secure(
    algorithm: Algorithm, alter: Alter = lambda phase, answer: answer, **options: object
) -> tuple[SecureFleet, RecordingTransport]:
    pairwise, fleet = settings(**options), Clients(algorithm)
    transport = RecordingTransport(LocalTransport(pairwise, algorithm, fleet, RUN), alter)
    return SecureFleet(pairwise, algorithm, fleet, transport, RUN), transport


def clients_of(fleet: SecureFleet) -> Clients:
    assert isinstance(fleet.fleet, Clients)
    return fleet.fleet


def one_round(
    clients: int = 4, alter: Alter = lambda phase, answer: answer, name: str = "fedavg", **options: object
) -> tuple[list[Update], RecordingTransport, Clients, RoundInfo, dict[int, State]]:
    algorithm = algorithms.build(name, {})
    fleet, transport = secure(algorithm, alter, **options)
    info = round_info(0, range(clients), clients=clients)
    state = algorithm.init(lora_adapter())
    messages = {client: algorithm.message(state, client, info) for client in info.sampled}
    return list(fleet.train(info, messages)), transport, clients_of(fleet), info, messages


def dropping(at: Mapping[int, Phase]) -> Alter:
    """Lose the answers of clients from the given phase on."""

    def alter(phase: Phase, answer: Update) -> Update | None:
        gone = answer.client in at and PHASES.index(phase) >= PHASES.index(at[answer.client])
        return None if gone else answer

    return alter


def total(fixed: FixedPoint, updates: Sequence[Update], messages: Mapping[int, State]) -> np.ndarray:
    """The sum in Python integers, which cannot overflow."""
    sums: list[int] = []
    for update in updates:
        vector = fixed.encode(change_of(update.groups, messages[update.client]), update)
        head, body = (part.view(part.dtype.str.replace("u", "i")) for part in fixed.words(vector))
        numbers = [int(x) for x in (*head, *body)]
        sums = [a + b for a, b in zip(sums, numbers, strict=True)] if sums else numbers
    return np.array(sums, dtype=object)


def fixed_of(info: RoundInfo, algorithm: Algorithm, **options: object) -> FixedPoint:
    assert algorithm.averages is not None
    return FixedPoint.of(settings(**options), len(info.sampled), algorithm.averages)


class MaliciousServer:
    """Sends requests to the client halves of three clients, honest ones or others. `attempts` is what they remember on disk."""

    def __init__(self, clients: int = 3, attempts: Attempts | None = None) -> None:
        self.algorithm = algorithms.build("fedavg", {})
        self.clients = SecureClients(settings(), self.algorithm, attempts)
        self.info = round_info(0, range(clients), clients=clients)
        self.attempt = torch.zeros(16, dtype=torch.uint8)
        self.trained = 0
        self.model: State = {"adapter": lora_adapter()}

    def request(self, phase: Phase, messages: Mapping[int, State], run: str = RUN) -> dict[int, Update]:
        def train(unmasked: Mapping[int, State]) -> list[Update]:
            self.trained += len(unmasked)
            return [Update(c, state, 5, 1) for c, state in unmasked.items()]

        return {u.client: u for u in self.clients.answer(phase, run, self.info, messages, train)}

    def keys(self) -> dict[int, Update]:
        return self.request("keys", {c: {"keys": {"attempt": self.attempt}} for c in self.info.sampled})

    def shares(self) -> dict[int, Update]:
        keys = {c: torch.cat([u.groups["keys"]["seal"], u.groups["keys"]["mask"]]) for c, u in self.keys().items()}
        return self.request("shares", {c: {"keys": {str(p): keys[p] for p in keys if p != c}} for c in keys})

    def sealed(self) -> dict[int, State]:
        shares = self.shares()
        return {c: {"shares": {str(p): shares[p].groups["shares"][str(c)] for p in shares if p != c}} for c in shares}

    def masked(self, change: Callable[[dict[int, State]], object] = lambda inboxes: None) -> dict[int, Update]:
        inboxes = self.sealed()
        change(inboxes)
        return self.request("masked", {c: {**self.model, **inbox} for c, inbox in inboxes.items()})

    def unmask(self, present: Sequence[int], gone: Sequence[int], client: int = 0) -> Update:
        ids = {"here": torch.tensor(present, dtype=torch.int64), "gone": torch.tensor(gone, dtype=torch.int64)}
        return self.request("unmask", {client: {"unmask": ids}})[client]
