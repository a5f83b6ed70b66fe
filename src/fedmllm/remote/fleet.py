"""The fleet of clients on other machines: it sends jobs, waits for a limited time, and validates the replies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedmllm.algorithms import RoundInfo, Update, failed
from fedmllm.algorithms.screening import MAX_COUNT
from fedmllm.errors import RunError
from fedmllm.evaluation.predictions import PATTERNS
from fedmllm.remote.protocol import Job, JobKind, Reply, Transport
from fedmllm.secure.settings import Phase
from fedmllm.tensors import State, Tensors


class RemoteFleet:
    """`run` and `config` are the run's name and its experiment as TOML; `timeout` is the longest duration of a round in
    seconds.

    `last` maps each client of a resumed run to the last round that used its update. Every job carries this number, so that
    clients discard the state of rounds that did not count, whichever messages were lost.
    """

    def __init__(
        self, transport: Transport, run: str, config: str, timeout: float, last: Mapping[int, int] | None = None
    ) -> None:
        self._transport, self._run, self._config, self._timeout = transport, run, config, timeout
        self._last = dict(last or {})
        self._participants: tuple[int, ...] = ()

    def train(self, info: RoundInfo, messages: Mapping[int, State]) -> Sequence[Update]:
        """One update per client. If a client sent none that can be read, its update says why."""
        self._participants = tuple(messages)
        return self._updates("train", info, messages)

    def request(self, phase: Phase, info: RoundInfo, messages: Mapping[int, State]) -> Sequence[Update]:
        """Send the requests of one phase of a secure round (`SecureTransport`)."""
        self._participants = tuple(info.sampled)
        return self._updates(phase, info, messages)

    def _updates(self, kind: JobKind, info: RoundInfo, messages: Mapping[int, State]) -> list[Update]:
        updates = []
        for client, reply in self._replies(kind, info.round, messages, info).items():
            problem = reply.problem or ("" if reply.client == client else f"answered as client {reply.client}")
            update = Update(client, reply.groups, reply.examples, reply.steps, reply.metrics)
            updates.append(failed(client, problem) if problem else update)
        return updates

    def _replies(
        self, kind: JobKind, round: int, messages: Mapping[int, State], info: RoundInfo | None = None
    ) -> dict[int, Reply]:
        """Send one job per client; its reply, or one that says that there was none in time."""
        sampled, ranks, lr = (info.sampled, info.ranks, info.lr) if info else ((), {}, 0.0)
        steps = info.steps if info else {}
        jobs = {
            client: Job(
                kind, self._run, self._config, client, round, sampled, ranks, lr, self._last.get(client, -1), state, steps
            )
            for client, state in messages.items()
        }
        replies = self._transport.exchange(jobs, self._timeout)
        no_answer = f"no answer within {self._timeout:g} s"
        return {client: replies.get(client) or Reply(client, problem=no_answer) for client in messages}

    def forget(self, round: int, clients: Sequence[int]) -> None:
        """Send nothing: the next job of each client says which of its rounds was the last to count."""
        self._last |= dict.fromkeys(set(self._participants) - set(clients), round)

    def commit(self, round: int) -> None:
        """Send nothing: clients delete outdated states when they receive their next job."""

    def personal(self, client: int, message: State, done: int) -> Tensors:
        """Raises RunError if the client does not answer."""
        reply = self._replies("personal", done, {client: message})[client]
        if reply.problem or "adapter" not in reply.groups:
            raise RunError(
                f"client {client} did not send its own adapter ({reply.problem}); continue with --resume when it is back."
            )
        return reply.groups["adapter"]

    def evaluate(self, messages: Mapping[int, State], done: int) -> dict[int, dict[str, Any]]:
        """`site_metrics` of each client, or a `site_problem` that says why there are none."""
        rows: dict[int, dict[str, Any]] = {}
        for client, reply in self._replies("evaluate", done, messages).items():
            metrics = valid_metrics(reply.about.get("metrics"))
            problem = reply.problem or ("" if metrics else "its reply contains no metrics")
            rows[client] = {"site_problem": problem} if problem else {"site_metrics": metrics}
        return rows


def valid_metrics(content: Any) -> dict[str, dict[str, Any]]:
    """The part of `content` that has the form {pattern: {metric: number, metric_ci: [low, high]}}; sites may send anything."""

    def is_number(value: Any) -> bool:
        return type(value) in (int, float) and abs(value) <= MAX_COUNT  # which NaN is not

    def is_valid(value: Any) -> bool:
        return is_number(value) or (isinstance(value, list) and len(value) == 2 and all(map(is_number, value)))

    def valid(row: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in row.items() if name.isidentifier() and is_valid(value)}

    rows = content.items() if isinstance(content, dict) else ()
    figures = {pattern: valid(row) for pattern, row in rows if pattern in PATTERNS and isinstance(row, dict)}
    return {pattern: row for pattern, row in figures.items() if row}
