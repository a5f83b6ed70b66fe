"""Jobs and replies over Flower's Grid: which node is which client, bounded waits, one more try for a node that went away."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fedmllm.remote.messages import reply_of, to_record
from fedmllm.remote.protocol import Job, ProtocolError, Reply

_WENT_AWAY = (3, 4, 5, 8)
"""Flower's error codes for messages, nodes and client processes that were lost on the way. Trying again may help."""
_KINDS = {"describe": "query", "train": "train", "personal": "evaluate", "evaluate": "evaluate"}


class GridPost:
    """The nodes of a Grid as clients.

    `ask` is the job that makes a node say who it is; `clients` is their number. Where `sites` are given and a node was
    registered under a name, it is the client of that name and no other: what it says must agree. `rejoin` is how many seconds
    an exchange waits for clients that are away, `pause` those between two looks at who is there.
    """

    def __init__(
        self, grid: Grid, ask: Job, clients: int, sites: Sequence[str] = (), rejoin: float = 30.0, pause: float = 1.0
    ) -> None:
        self._grid, self._ask, self._clients, self._sites = grid, ask, clients, list(sites)
        self._rejoin, self._pause = rejoin, pause
        self._node: dict[int, int] = {}
        self._about: dict[int, Mapping[str, Any]] = {}
        self._strangers: dict[int, str] = {}
        self._answers: dict[int, str] = {}

    @property
    def problems(self) -> list[str]:
        """Why nodes that are there are no client of this run."""
        return sorted({*self._strangers.values(), *self._answers.values()})

    def gather(self, wanted: Iterable[int], timeout: float) -> Mapping[int, Mapping[str, Any]]:
        """What the clients that are there say of themselves, when all that are wanted are or `timeout` seconds are over."""
        wanted, end = set(wanted), time.monotonic() + timeout
        while True:
            self._meet(end)
            if wanted <= self._node.keys() or time.monotonic() + self._pause > end:
                return {client: self._about[client] for client in sorted(self._node)}
            time.sleep(self._pause)

    def exchange(self, jobs: Mapping[int, Job], timeout: float) -> dict[int, Reply]:
        """The replies that came within `timeout` seconds; a client that is away has one that says so."""
        end, waiting, replies = time.monotonic() + timeout, dict(jobs), dict[int, Reply]()
        for last in (False, True):
            self.gather(waiting, min(self._rejoin, end - time.monotonic()))
            away = waiting.keys() - self._node.keys()
            replies |= {client: Reply(client, problem="is not connected") for client in away}
            sent = {client: job for client, job in waiting.items() if client not in away}
            lost = self._send(sent, end, replies)
            waiting = {client: jobs[client] for client in {*lost, *away}}
            replies |= {client: Reply(client, problem=why) for client, why in lost.items()}
            if last or not waiting or end - time.monotonic() < 2 * self._pause:
                return replies
        raise AssertionError  # the loop returns

    def _send(self, jobs: Mapping[int, Job], end: float, replies: dict[int, Reply]) -> dict[int, str]:
        """Put the replies that come before `end` into `replies`; the clients that were lost on the way, and how."""
        client_of = {self._node[client]: client for client in jobs}
        lost: dict[int, str] = {}
        for answer in self._round_trip({self._node[client]: job for client, job in jobs.items()}, end):
            client = client_of[answer.metadata.src_node_id]
            if answer.has_error() and answer.error.code in _WENT_AWAY:
                lost[client] = f"went away ({_reason(answer)})"
            else:
                replies[client] = _read(client, answer)
        return lost

    def _round_trip(self, jobs: Mapping[int, Job], end: float) -> list[Message]:
        """The answers of these nodes; none from a node that was not asked, though it may say it was."""
        left = end - time.monotonic()
        if not jobs or left <= 0:
            return []
        # A message that was not fetched in time must not be trained on later: it goes when the wait does.
        messages = [
            Message(to_record(job), node, _KINDS[job.kind], ttl=left, group_id=str(job.round)) for node, job in jobs.items()
        ]
        answers = self._grid.send_and_receive(messages, timeout=left)
        return [answer for answer in answers if answer.metadata.src_node_id in jobs]

    def _meet(self, end: float) -> None:
        """Ask nodes that are new who they are, and forget those that are gone."""
        there = {node.node_id: node.name for node in self._grid.get_nodes()}
        self._node = {client: node for client, node in self._node.items() if node in there}
        self._strangers = {node: why for node, why in self._strangers.items() if node in there}
        new = [node for node in there if node not in self._node.values() and node not in self._strangers]
        self._answers.clear()
        for answer in self._round_trip(dict.fromkeys(new, self._ask), end):
            node = answer.metadata.src_node_id
            if answer.has_error() and answer.error.code in _WENT_AWAY:
                continue
            reply = _read(-1, answer)
            if reply.problem:  # it may be mended there, and is asked again
                self._answers[node] = f"{there[node] or f'node {node}'}: {reply.problem}"
            elif why := self._unfit(there[node], reply):
                self._strangers[node] = why
            else:
                self._node[reply.client], self._about[reply.client] = node, reply.about

    def _unfit(self, name: str, reply: Reply) -> str:
        if not 0 <= reply.client < self._clients:
            return f"a node says that it is client {reply.client}, and there are {self._clients}"
        said = self._sites[reply.client] if self._sites else ""
        if self._sites and name and name != said:
            return f"the node that was registered as {name!r} says that it is {said!r}"
        if reply.client in self._node:
            return f"two nodes say that they are {said or f'client {reply.client}'}"
        return ""


def _reason(answer: Message) -> str:
    return " ".join((answer.error.reason or f"code {answer.error.code}").split())


def _read(client: int, answer: Message) -> Reply:
    if answer.has_error():
        return Reply(client, problem=f"failed ({_reason(answer)})")
    try:
        return reply_of(answer.content)
    except ProtocolError as error:
        return Reply(client, problem=f"sent what cannot be read: {error}")


__all__ = ["GridPost"]
