"""The messages: a Job from the round loop to a client, and a Reply back. Each is a State and a JSON header; nothing is pickled.

A Reply contains the groups that an algorithm uploads, counts and metrics, or one sentence about what went wrong. It never
contains a sample or a part of one. The field names are the keys of the JSON header, except that the groups of the state or of
the reply are listed under "groups", so that groups without tensors are not lost.

Replies come from machines of others. Everything in one has a limit, here or in wire.py, and a reply beyond it is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

from safetensors import SafetensorError
from safetensors.torch import load

from fedmllm.algorithms.screening import MAX_COUNT
from fedmllm.errors import brief
from fedmllm.remote.wire import VERSION
from fedmllm.storage.state_file import state_bytes
from fedmllm.tensors import State, unflatten

JobKind = Literal["describe", "train", "personal", "evaluate", "keys", "shares", "masked", "unmask"]


MAX_HEADER = 1 << 20
"""Characters of a reply's header; that of an honest reply has a few thousand."""
MAX_NAME = 500
"""Characters of the name of a tensor, a group, a metric or any other text in a reply; a problem is cut instead."""
MAX_DEPTH = 6
"""Objects and lists inside one another in a reply's metrics and counts."""
MAX_SAMPLES = 500_000
"""Samples of a site. The server has a row for each in the run's manifest."""


class ProtocolError(ValueError):
    """The content is not a message of this protocol, or has another version. What it quotes is made printable and cut."""

    def __init__(self, message: str) -> None:
        super().__init__(brief(message))


@dataclass(frozen=True)
class Job:
    """A request to one client, of one of these kinds:

    - `describe`: report the amount of data;
    - `train`: train `client` from `state`, its message of the round;
    - `personal`: send the adapter of a client that keeps part of it, as of `round` finished rounds;
    - `evaluate`: test that adapter on the site's own test data;
    - the phases of a secure round (`fedmllm.secure`), which replace `train` and whose replies contain only groups.

    `run` is the permanent name of a run, resumed or not, and `config` its experiment as TOML. `last` is the last round that
    used an update of this client, or −1: state that the client saved in later rounds is discarded. `steps` has the most
    optimizer steps that a simulated client may make, for those of the round that may not make all of theirs.
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
    steps: Mapping[int, int] = field(default_factory=dict)

    def header(self) -> str:
        """Everything except the tensors."""
        fields = {key: getattr(self, key) for key in ("kind", "run", "config", "client", "round", "sampled", "lr", "last")}
        fields |= {"ranks": sorted(self.ranks.items()), "groups": sorted(self.state), "version": VERSION}
        if self.steps:  # only in simulations, so that sites of an earlier release understand all their jobs
            fields["steps"] = sorted(self.steps.items())
        return json.dumps(fields)

    @classmethod
    def of(cls, header: str, state: State) -> Job:
        """Raises ProtocolError."""
        fields, complete = _parse(header, state)
        try:
            collections = {"sampled": tuple(fields["sampled"]), "ranks": dict(fields["ranks"])}
            job = cls(**{**fields, **collections, "steps": dict(fields.get("steps", ()))}, state=complete)
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"not a job: {error}") from None
        pairs = (*job.ranks.items(), *job.steps.items())
        integers = (job.client, job.round, job.last, *job.sampled, *(number for pair in pairs for number in pair))
        if not all(type(number) is int and abs(number) <= MAX_COUNT for number in integers):
            raise ProtocolError("not a job: its clients and rounds are not integers of 63 bits")
        if any(count < 1 for count in job.steps.values()):
            raise ProtocolError("not a job: it asks for no optimizer steps")
        texts = isinstance(job.run, str) and isinstance(job.config, str) and job.kind in get_args(JobKind)
        if not texts or type(job.lr) not in (int, float) or not math.isfinite(job.lr):
            raise ProtocolError("not a job: its kind, run, experiment or learning rate is none")
        return job


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
        if len(header) > MAX_HEADER:
            raise ProtocolError(f"not a reply: a header of {len(header)} characters, of {MAX_HEADER} at most")
        fields, complete = _parse(header, state)
        for name in (*complete, *(name for tensors in complete.values() for name in tensors)):
            _check_limits(name)
        try:
            reply = cls(**fields, groups=complete)
        except TypeError as error:
            raise ProtocolError(f"not a reply: {error}") from None
        counts = (reply.client, reply.examples, reply.steps)
        if not all(type(count) is int for count in counts) or not isinstance(reply.problem, str):
            raise ProtocolError("not a reply: its counts are not integers")
        if not isinstance(reply.metrics, dict) or not isinstance(reply.about, dict):
            raise ProtocolError("not a reply: its metrics are not a table")
        for value in (*counts, reply.metrics, reply.about):
            _check_limits(value)
        if not all(type(value) in (int, float) for value in reply.metrics.values()):
            raise ProtocolError("not a reply: its metrics are not numbers")
        metrics = {name: float(value) for name, value in reply.metrics.items()}
        return cls(**{**vars(reply), "metrics": metrics, "problem": brief(reply.problem)})


def _check_limits(value: Any, depth: int = MAX_DEPTH) -> None:
    """Raises ProtocolError for a text, an integer or a depth beyond the limits. Floats have none: NaN says that training
    diverged."""
    if depth < 0:
        raise ProtocolError(f"not a reply: lists or tables more than {MAX_DEPTH} deep")
    if isinstance(value, str) and len(value) > MAX_NAME:
        raise ProtocolError(f"not a reply: a text of {len(value)} characters, of {MAX_NAME} at most")
    if isinstance(value, int) and abs(value) > MAX_COUNT:
        raise ProtocolError("not a reply: a number of more than 63 bits")
    if isinstance(value, dict | list):
        for entry in (*value, *value.values()) if isinstance(value, dict) else value:
            _check_limits(entry, depth - 1)


def counts_of(about: Mapping[str, Any]) -> tuple[int, int, int]:
    """(samples, with image, with text) of a site, as its reply to `describe` reports them.

    `samples` = image + text − both. Raises ProtocolError for counts that are impossible or too large to be kept.
    """
    reported = [about.get(key) for key in ("samples", "image", "text")]
    samples, image, text = (count if type(count) is int and count >= 0 else -1 for count in reported)
    if not (0 <= max(image, text) <= samples <= image + text) or min(image, text) < 0:
        raise ProtocolError(f"{samples} samples, {image} with image and {text} with text, which is impossible")
    if type(about.get("skipped", 0)) is not int or about.get("skipped", 0) < 0:
        raise ProtocolError("a number of skipped samples that is none")
    if samples > MAX_SAMPLES:
        raise ProtocolError(f"{samples} samples; a site may hold {MAX_SAMPLES} at most, so split its data among several")
    return samples, image, text


def _parse(header: str, state: State) -> tuple[dict[str, Any], State]:
    """The fields of a header, and the state completed with the groups that have no tensors."""
    try:
        fields = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"its header is not JSON: {error}") from None
    if not isinstance(fields, dict) or fields.pop("version", None) != VERSION:
        raise ProtocolError(
            f"the other side does not use version {VERSION} of the protocol; install the same version of fedmllm there"
        )
    groups = fields.pop("groups", None)
    if not isinstance(groups, list) or not all(isinstance(g, str) for g in groups) or not state.keys() <= set(groups):
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
    except (SafetensorError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ProtocolError(f"not a message: {error}") from None


class Transport(Protocol):
    """Carries jobs to clients and replies back. A client that does not answer in time has no reply."""

    def exchange(self, jobs: Mapping[int, Job], timeout: float) -> Mapping[int, Reply]: ...
