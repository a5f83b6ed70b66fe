"""What travels: a Job from the round loop to a client, a Reply back. A State and one JSON text each, no pickle anywhere.

Nothing else ever does: a Reply holds the groups an algorithm uploads, counts and metrics, or one sentence about what went
wrong, never a sample or a part of one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from fedmllm.algorithms import RoundInfo
from fedmllm.remote.wire import VERSION
from fedmllm.tensors import State, flatten, unflatten

JobKind = Literal["describe", "train", "personal", "evaluate", "keys", "shares", "masked", "unmask"]


class ProtocolError(ValueError):
    """What arrived is no message of this protocol, or of another version of it."""


@dataclass(frozen=True)
class Job:
    """`describe`: what do you hold? `train`: train `client` from `state`, its message of the round. `personal`: what is the
    adapter of a client that keeps part of it, after `round` rounds? `evaluate`: how does it do on the site's own test data?
    The others are the questions of a secure round (`fedmllm.secure`): they take the place of `train` where updates are hidden,
    and their replies hold groups alone.

    `run` names one run for good, resumed or not; `config` is the experiment as TOML. `last` is the last round whose update of
    this client was used, −1 where there is none: what a client remembers of later ones came to nothing.
    """

    kind: JobKind
    run: str
    config: str
    client: int = -1
    round: int = 0
    sampled: tuple[int, ...] = ()
    ranks: Mapping[int, int] = field(default_factory=dict)
    lr: float = 0.0
    last: int = -1
    state: State = field(default_factory=dict)

    def head(self) -> str:
        """All but the tensors."""
        told = {key: getattr(self, key) for key in ("kind", "run", "config", "client", "round", "sampled", "lr", "last")}
        return json.dumps({**told, "ranks": sorted(self.ranks.items()), "groups": sorted(self.state), "version": VERSION})

    @classmethod
    def of(cls, head: str, state: State) -> Job:
        """Raises ProtocolError."""
        told, whole = _told(head, state)
        try:
            return cls(**{**told, "sampled": tuple(told["sampled"]), "ranks": dict(told["ranks"])}, state=whole)
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"not a job: {error}") from None

    def info(self, rounds: int, clients: int, seed: int) -> RoundInfo:
        """The round, but for the adapter, which a site knows from its own model."""
        return RoundInfo(self.round, rounds, clients, self.sampled, seed, ranks=self.ranks, lr=self.lr)


@dataclass(frozen=True)
class Reply:
    """`problem` is empty, or says why there is nothing else. `about` answers `describe` with counts, and `evaluate` with
    metrics, which are counts and means."""

    client: int = -1
    groups: State = field(default_factory=dict)
    examples: int = 0
    steps: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    problem: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)

    def head(self) -> str:
        """All but the tensors."""
        told = {key: getattr(self, key) for key in ("client", "examples", "steps", "problem")}
        more = {"metrics": dict(self.metrics), "about": dict(self.about)}
        return json.dumps({**told, **more, "groups": sorted(self.groups), "version": VERSION})

    @classmethod
    def of(cls, head: str, state: State) -> Reply:
        """Raises ProtocolError."""
        told, whole = _told(head, state)
        try:
            made = cls(**told, groups=whole)
            counts = (made.client, made.examples, made.steps)
            if not all(type(count) is int for count in counts) or not isinstance(made.problem, str):
                raise ProtocolError("not a reply: its counts are no integers")
            return cls(**{**vars(made), "metrics": {str(k): float(v) for k, v in made.metrics.items()}})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"not a reply: {error}") from None


def _told(head: str, state: State) -> tuple[dict[str, Any], State]:
    """What the head says, and the state with the groups that have no tensors, which travel by name only."""
    try:
        told = json.loads(head)
    except ValueError as error:
        raise ProtocolError(f"its head is no JSON: {error}") from None
    if not isinstance(told, dict) or told.pop("version", None) != VERSION:
        raise ProtocolError(f"the other side does not speak version {VERSION} of the protocol; install the same fedmllm there")
    groups = told.pop("groups", None)
    if not isinstance(groups, list) or not state.keys() <= set(groups):
        raise ProtocolError("its tensors are not in the groups that its head names")
    return told, {group: state.get(group, {}) for group in groups}


def to_bytes(message: Job | Reply) -> bytes:
    """One safetensors file, with the head in its header."""
    state = message.state if isinstance(message, Job) else message.groups
    flat = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in flatten(state).items()}
    return save(flat, {"head": message.head()})


def parts_of(content: bytes) -> tuple[str, State]:
    """(head, tensors by group). Raises ProtocolError."""
    try:
        length = int.from_bytes(content[:8], "little")
        head = json.loads(content[8 : 8 + length]).get("__metadata__", {})["head"]
        return head, unflatten(load(content))
    except (SafetensorError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ProtocolError(f"not a message: {error}") from None


class Transport(Protocol):
    """How jobs get to clients and replies back. A client that does not answer in time has no reply."""

    def exchange(self, jobs: Mapping[int, Job], timeout: float) -> Mapping[int, Reply]: ...


__all__ = ["Job", "JobKind", "ProtocolError", "Reply", "Transport", "parts_of", "to_bytes"]
