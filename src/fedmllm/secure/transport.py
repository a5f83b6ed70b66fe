"""How the questions of a secure round reach clients and their answers come back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from fedmllm.algorithms import RoundInfo, Update
from fedmllm.secure.settings import Phase
from fedmllm.tensors import State


@runtime_checkable
class SecureTransport(Protocol):
    """Puts one of the four questions of a secure round to clients, and brings back what they say; `secure.site` answers there.

    `messages` has the groups of tensors that each client is sent. An answer is an Update of groups alone, or with a `problem`;
    who does not answer in time may be left out. In the phase "masked" clients train.
    """

    def ask(self, phase: Phase, info: RoundInfo, messages: Mapping[int, State]) -> Sequence[Update]: ...
