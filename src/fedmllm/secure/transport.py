"""How the requests of a secure round reach the clients and their answers come back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from fedmllm.algorithms import RoundInfo, Update
from fedmllm.secure.settings import Phase
from fedmllm.tensors import State


@runtime_checkable
class SecureTransport(Protocol):
    """Sends the requests of one phase to clients and returns their answers; `secure.clients` answers at the other end.

    `messages` holds the tensor groups for each client. An answer is an Update that contains only groups, or only a `problem`.
    Clients that do not answer in time may be left out. Clients train in the phase "masked".
    """

    def request(self, phase: Phase, info: RoundInfo, messages: Mapping[int, State]) -> Sequence[Update]: ...
