"""The fleet whose clients are elsewhere: it writes jobs, waits a bounded time, and reads what came back with suspicion."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedmllm.algorithms import RoundInfo, Update
from fedmllm.errors import RunError
from fedmllm.evaluation.predictions import PATTERNS
from fedmllm.remote.protocol import Job, JobKind, Reply, Transport
from fedmllm.secure.settings import Phase
from fedmllm.tensors import State, Tensors


class RemoteFleet:
    """`run` and `config` are a run's name and its experiment as TOML; `timeout` the seconds that a round may take.

    `last` has for each client the last round whose update was used, of a run that is resumed. Clients are told it, so that
    what they remember of a round that came to nothing goes, whatever became of the messages about it.
    """

    def __init__(self, post: Transport, run: str, config: str, timeout: float, last: Mapping[int, int] | None = None) -> None:
        self._post, self._run, self._config, self._timeout = post, run, config, timeout
        self._last = dict(last or {})
        self._under_way: tuple[int, ...] = ()

    def train(self, info: RoundInfo, messages: Mapping[int, State]) -> Sequence[Update]:
        """An update of every client; of those that sent none that can be read, one that says why."""
        self._under_way = tuple(messages)
        jobs = {client: self._job("train", client, info.round, state, info) for client, state in messages.items()}
        replies = self._post.exchange(jobs, self._timeout)
        return [self._update(client, replies.get(client)) for client in messages]

    def ask(self, phase: Phase, info: RoundInfo, messages: Mapping[int, State]) -> Sequence[Update]:
        """Send one of the four questions of a secure round to clients whose updates are hidden (`SecureTransport`)."""
        self._under_way = tuple(info.sampled)
        jobs = {client: self._job(phase, client, info.round, state, info) for client, state in messages.items()}
        replies = self._post.exchange(jobs, self._timeout)
        return [self._update(client, replies.get(client)) for client in messages]

    def _job(self, kind: JobKind, client: int, round: int, state: State, info: RoundInfo | None = None) -> Job:
        sampled, ranks, lr = (info.sampled, info.ranks, info.lr) if info else ((), {}, 0.0)
        return Job(kind, self._run, self._config, client, round, sampled, ranks, lr, self._last.get(client, -1), state)

    def _update(self, client: int, reply: Reply | None) -> Update:
        if reply is None:
            return Update(client, {}, 0, 0, problem=f"no answer within {self._timeout:g} s")
        if reply.problem:
            return Update(client, {}, 0, 0, problem=reply.problem)
        if reply.client != client:  # not its own name, or another's
            return Update(client, {}, 0, 0, problem=f"answered as client {reply.client}")
        return Update(client, reply.groups, reply.examples, reply.steps, reply.metrics)

    def forget(self, round: int, clients: Sequence[int]) -> None:
        """Nothing is sent: with its next job a client is told of the last round that it was part of."""
        self._last |= dict.fromkeys(set(self._under_way) - set(clients), round)

    def commit(self, round: int) -> None:
        """Nothing is sent: a client drops what is older than the last round that it was part of by itself."""

    def personal(self, client: int, message: State, done: int) -> Tensors:
        """Raises RunError where the client does not answer."""
        reply = self._post.exchange({client: self._job("personal", client, done, message)}, self._timeout).get(client)
        if reply is None or reply.problem or "adapter" not in reply.groups:
            why = reply.problem if reply else f"no answer within {self._timeout:g} s"
            raise RunError(f"client {client} did not send its own adapter ({why}); go on with --resume when it is there.")
        return reply.groups["adapter"]

    def evaluate(self, messages: Mapping[int, State], done: int) -> dict[int, dict[str, Any]]:
        """For each client `site_metrics`, or a `site_problem` that says why there are none."""
        jobs = {client: self._job("evaluate", client, done, state) for client, state in messages.items()}
        replies = self._post.exchange(jobs, self._timeout)
        found: dict[int, dict[str, Any]] = {}
        for client in messages:
            reply = replies.get(client) or Reply(client, problem=f"no answer within {self._timeout:g} s")
            metrics = _figures(reply.about.get("metrics"))
            problem = reply.problem or ("" if metrics else "its answer holds no metrics")
            found[client] = {"site_problem": problem} if problem else {"site_metrics": metrics}
        return found


def _figures(told: Any) -> dict[str, dict[str, Any]]:
    """What of it is {pattern: {metric: number, metric_ci: [low, high]}}; a site could say anything."""

    def number(value: Any) -> bool:
        return type(value) in (int, float) and math.isfinite(value)

    def good(value: Any) -> bool:
        return number(value) or (isinstance(value, list) and len(value) == 2 and all(map(number, value)))

    patterns = told.items() if isinstance(told, dict) else ()
    kept = {p: {k: v for k, v in row.items() if good(v)} for p, row in patterns if p in PATTERNS and isinstance(row, dict)}
    return {pattern: row for pattern, row in kept.items() if row}


__all__ = ["RemoteFleet"]
