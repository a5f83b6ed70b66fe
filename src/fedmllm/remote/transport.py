"""Jobs and replies over Flower: a `Transport` on top of the Grid that Flower gives to a ServerApp.

No wait is unbounded. A job is sent again if its site's node was restarted, or if Flower reported an error instead of an
answer. A site answers the same job twice with the same reply, so sending again costs time and never changes a number.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from flwr.app import Message
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid

from fedmllm.errors import brief
from fedmllm.remote.protocol import Job, ProtocolError, Reply, counts_of, parts_of, to_bytes
from fedmllm.remote.records import RecordError, pack, unpack


class Absent(RuntimeError):  # noqa: N818 (it says what happened)
    """Clients did not connect in time; they may still come."""


ATTEMPTS = 5
"""How often a job is sent in one round before Flower's error is accepted as the answer."""
POLL = 0.5
"""The longest pause between two looks for replies, in seconds."""
NODES_POLL = 5.0
"""Seconds between two queries of which nodes are online."""
ASK_AGAIN = 10.0
"""Seconds until a node that cannot be admitted is contacted again."""


def read_reply(message: Message) -> Reply:
    """The reply in a message; its `problem` is set if it cannot be read, or if there is an error of Flower in its place."""
    if message.has_error():
        # The reason may contain a traceback of foreign code, so only the error's code is shown.
        return Reply(problem=f"Flower's error {message.error.code} in place of an answer")
    try:
        return Reply.of(*parts_of(pack(message.content)))
    except (ProtocolError, RecordError) as error:
        return Reply(problem=brief(str(error)))


@dataclass
class _Pending:
    """A client's job that has no reply yet.

    `activated` is the time at which the node last came online, as known when the job was sent, `seen` the last time at which
    the node was online. `unsent` means that the job must be sent to the node, for the first time or again.
    """

    job: Job
    attempts: int = 0
    ids: set[str] = field(default_factory=set)
    activated: str = ""
    unsent: bool = True
    seen: float = 0.0
    problem: str = ""


class FlowerTransport:
    """`absent`: a round does not wait for a client whose node has been offline for this many seconds. The next rounds still
    send it its job if it is back, but do not wait for it again unless all clients are offline.

    `names` lists the names under which the sites are registered, in the order of the clients: a node that is registered under
    one name cannot answer for another. `clock` and `sleep` are replaced in tests.
    """

    def __init__(
        self,
        grid: Grid,
        absent: float,
        names: tuple[str, ...] = (),
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._grid, self._absent, self._names = grid, absent, names
        self._clock, self._sleep = clock, sleep
        self._node: dict[int, int] = {}
        self._online: dict[int, NodeInfo] = {}
        self._queried = -NODES_POLL
        self._away: set[int] = set()

    # Nodes

    def _nodes(self) -> dict[int, NodeInfo]:
        """The nodes that are online, queried every few seconds."""
        if self._clock() - self._queried >= NODES_POLL:
            self._online = {node.node_id: node for node in self._grid.get_nodes()}
            self._queried = self._clock()
        return self._online

    def find_clients(self, job: Job, clients: int, wait: float, required: int | None = None) -> dict[int, Reply]:
        """Send a `describe` job to every node, and return the reply of each client.

        Returns when all `clients` have replied, or after `wait` seconds if at least `required` have. Otherwise raises Absent,
        which lists the problems that nodes reported.
        """
        required = clients if required is None else required
        replies: dict[int, Reply] = {}
        problems: dict[int, str] = {}
        sent: dict[str, NodeInfo] = {}  # message id -> node
        due: dict[tuple[int, str], float] = {}  # (node, time at which it came online) -> when to contact it
        end = self._clock() + wait
        while len(replies) < clients and self._clock() < end:
            for node in self._nodes().values():
                # A node is contacted again when it comes online, as its site file may have been corrected, and some time after
                # a problem: Flower answers in place of a node whose heartbeat is late, even if it comes a moment later.
                key = (node.node_id, node.last_activated_at)
                if node.node_id not in self._node.values() and self._clock() >= due.get(key, 0.0):
                    due[key] = math.inf
                    sent |= dict.fromkeys(self._push(job, node.node_id, end - self._clock()), node)
            for message in self._pull(sent):
                node, reply = sent.pop(message.metadata.reply_to_message_id), read_reply(message)
                if node.node_id in self._node.values():  # it has answered another message already
                    continue
                if problem := reply.problem or self._not_admitted(node, reply, clients, replies):
                    problems[node.node_id] = problem
                    due[node.node_id, node.last_activated_at] = self._clock() + ASK_AGAIN
                else:
                    problems.pop(node.node_id, None)
                    replies[reply.client], self._node[reply.client] = reply, node.node_id
            if len(replies) < clients:
                self._sleep(POLL)
        if len(replies) < required:
            missing = ", ".join(self._names[c] if self._names else f"client {c}" for c in range(clients) if c not in replies)
            reported = "".join(f"; a node reported: {problem}" for problem in sorted(set(problems.values())))
            raise Absent(
                f"{len(replies)} of {clients} clients connected within {wait:g} s; missing: {missing}{reported}; start them, "
                "or raise fleet.wait."
            )
        return replies

    def _not_admitted(self, node: NodeInfo, reply: Reply, clients: int, replies: Mapping[int, Reply]) -> str:
        """Why the node cannot be the client that it claims to be, or hold what it reports; empty if it can."""
        if not 0 <= reply.client < clients:
            return f"it claims to be client {reply.client}, of {clients}"
        if self._names and node.name and self._names[reply.client] != node.name:
            return f"it is registered as {node.name!r} and claims to be {self._names[reply.client]!r}"
        if reply.client in replies:
            return f"it claims to be client {reply.client}, as another node does"
        try:
            if self._names:  # otherwise the server knows what its clients hold
                counts_of(reply.about)
        except ProtocolError as error:
            return f"{self._names[reply.client]!r} has {error}"
        return ""

    # Jobs

    def exchange(self, jobs: Mapping[int, Job], timeout: float) -> Mapping[int, Reply]:
        """The reply of each client that answers in time; if a client cannot answer, a reply that says why."""
        now = self._clock()
        end, self._queried = now + timeout, -NODES_POLL
        away = self._away & jobs.keys() if jobs.keys() - self._away else set()
        pending = {client: _Pending(job, seen=now - self._absent * (client in away)) for client, job in jobs.items()}
        self._away -= jobs.keys()
        replies: dict[int, Reply] = {}
        pause = POLL / 32  # simulations answer at once
        while pending and self._clock() < end:
            self._send(pending, end)
            for message in self._pull(sent for entry in pending.values() for sent in entry.ids):
                self._receive(message, pending, replies)
            for client, entry in list(pending.items()):
                if self._clock() - entry.seen > self._absent:
                    reason = "its node is still offline" if client in away else f"its node was offline for {self._absent:g} s"
                    replies[client] = Reply(client, problem=f"{reason} ({entry.problem})" if entry.problem else reason)
                    del pending[client]
                    self._away.add(client)
            if pending:
                self._sleep(pause)
                pause = min(2 * pause, POLL)
        return replies

    def _send(self, pending: Mapping[int, _Pending], end: float) -> None:
        """Send the jobs whose node is online and has not received them, or has been restarted since it did."""
        online, now = self._nodes(), self._clock()
        for client, entry in pending.items():
            node = self._node_of(client, online)
            if node is None:
                continue
            entry.seen = now
            restarted = entry.attempts > 0 and node.last_activated_at != entry.activated
            if (entry.unsent or restarted) and entry.attempts < ATTEMPTS:
                entry.ids |= set(self._push(entry.job, node.node_id, end - now))
                entry.attempts, entry.activated, entry.unsent = entry.attempts + 1, node.last_activated_at, False

    def _node_of(self, client: int, online: Mapping[int, NodeInfo]) -> NodeInfo | None:
        if client not in self._node and self._names:  # it was offline when clients were looked for
            return next((node for node in online.values() if node.name == self._names[client]), None)
        return online.get(self._node.get(client, -1))

    def _receive(self, message: Message, pending: dict[int, _Pending], replies: dict[int, Reply]) -> None:
        sent = message.metadata.reply_to_message_id
        client = next((client for client, entry in pending.items() if sent in entry.ids), None)
        if client is None:  # a job that was sent twice may be answered twice
            return
        entry, reply = pending[client], read_reply(message)
        if message.has_error():
            entry.ids.discard(sent)
            entry.problem, entry.unsent = reply.problem, not entry.ids
            if not entry.unsent or entry.attempts < ATTEMPTS:
                self._queried = -NODES_POLL  # find out at once whether the node is still online
                return
            reply = Reply(client, problem=f"{reply.problem}, {entry.attempts} times")
        replies[client] = reply
        del pending[client]

    def _push(self, job: Job, node: int, seconds: float) -> list[str]:
        kind = job.kind if job.kind in ("train", "evaluate") else f"query.{job.kind}"
        group = str(job.round) if job.kind == "train" else job.kind
        message = Message(unpack(to_bytes(job)), node, kind, ttl=max(seconds, 1.0), group_id=group)
        return [sent for sent in self._grid.push_messages([message]) if sent]

    def _pull(self, ids: Iterable[str]) -> list[Message]:
        expected = list(ids)
        messages = self._grid.pull_messages(expected) if expected else []
        return [message for message in messages if message.metadata.reply_to_message_id in expected]
