"""The messages: a Job from the round loop to a client, and a Reply back. Each is a State and a JSON header; nothing is pickled.

A Reply contains the groups that an algorithm uploads, counts and metrics, or one sentence about what went wrong. It never
contains a sample or a part of one. The field names are the keys of the JSON header, except that the groups of the state or of
the reply are listed under "groups", so that groups without tensors are not lost.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from safetensors import SafetensorError
from safetensors.torch import load

from fedmllm.remote.wire import VERSION
from fedmllm.storage.state_file import state_bytes
from fedmllm.tensors import State, unflatten

JobKind = Literal["describe", "train", "personal", "evaluate", "keys", "shares", "masked", "unmask"]


class ProtocolError(ValueError):
    """The content is not a message of this protocol, or has another version."""


@dataclass(frozen=True)
class Job:
    """A request to one client, of one of these kinds:

    - `describe`: report the amount of data;
    - `train`: train `client` from `state`, its message of the round;
    - `personal`: send the adapter of a client that keeps part of it, as of `round` finished rounds;
    - `evaluate`: test that adapter on the site's own test data;
    - the phases of a secure round (`fedmllm.secure`), which replace `train` and whose replies contain only groups.

    `run` is the permanent name of a run, resumed or not, and `config` its experiment as TOML. `last` is the last round that
    used an update of this client, or −1: state that the client saved in later rounds is discarded.
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

    def header(self) -> str:
        """Everything except the tensors."""
        fields = {key: getattr(self, key) for key in ("kind", "run", "config", "client", "round", "sampled", "lr", "last")}
        return json.dumps({**fields, "ranks": sorted(self.ranks.items()), "groups": sorted(self.state), "version": VERSION})

    @classmethod
    def of(cls, header: str, state: State) -> Job:
        """Raises ProtocolError."""
        fields, complete = _parse(header, state)
        try:
            return cls(**{**fields, "sampled": tuple(fields["sampled"]), "ranks": dict(fields["ranks"])}, state=complete)
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"not a job: {error}") from None


@dataclass(frozen=True)
class Reply:
    """`problem` is empty, or says why the rest is missing. `about` contains counts in reply to `describe`, and metrics in
    reply to `evaluate`."""

    client: int = -1
    groups: State = field(default_factory=dict)
    examples: int = 0
    steps: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    problem: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)

    def header(self) -> str:
        """Everything except the tensors."""
        fields = {key: getattr(self, key) for key in ("client", "examples", "steps", "problem")}
        fields |= {"metrics": dict(self.metrics), "about": dict(self.about)}
        return json.dumps({**fields, "groups": sorted(self.groups), "version": VERSION})

    @classmethod
    def of(cls, header: str, state: State) -> Reply:
        """Raises ProtocolError."""
        fields, complete = _parse(header, state)
        try:
            reply = cls(**fields, groups=complete)
            counts = (reply.client, reply.examples, reply.steps)
            if not all(type(count) is int for count in counts) or not isinstance(reply.problem, str):
                raise ProtocolError("not a reply: its counts are not integers")
            return cls(**{**vars(reply), "metrics": {str(k): float(v) for k, v in reply.metrics.items()}})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"not a reply: {error}") from None


def _parse(header: str, state: State) -> tuple[dict[str, Any], State]:
    """The fields of a header, and the state completed with the groups that have no tensors."""
    try:
        fields = json.loads(header)
    except ValueError as error:
        raise ProtocolError(f"its header is not JSON: {error}") from None
    if not isinstance(fields, dict) or fields.pop("version", None) != VERSION:
        raise ProtocolError(
            f"the other side does not use version {VERSION} of the protocol; install the same version of fedmllm there"
        )
    groups = fields.pop("groups", None)
    if not isinstance(groups, list) or not state.keys() <= set(groups):
        raise ProtocolError("its tensors are not in the groups that its header lists")
    return fields, {group: state.get(group, {}) for group in groups}


def to_bytes(message: Job | Reply) -> bytes:
    """One safetensors file, with the JSON header as the metadata entry "head"."""
    return state_bytes(message.state if isinstance(message, Job) else message.groups, {"head": message.header()})


def parts_of(content: bytes) -> tuple[str, State]:
    """(JSON header, tensors by group). Raises ProtocolError."""
    try:
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length]).get("__metadata__", {})["head"]
        return header, unflatten(load(content))
    except (SafetensorError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ProtocolError(f"not a message: {error}") from None


class Transport(Protocol):
    """Carries jobs to clients and replies back. A client that does not answer in time has no reply."""

    def exchange(self, jobs: Mapping[int, Job], timeout: float) -> Mapping[int, Reply]: ...
