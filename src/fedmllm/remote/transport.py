"""Jobs and replies over Flower: a `Post` on top of the Grid that Flower hands to a ServerApp.

Nothing here waits without a bound. A job is sent again where its site's node came back from the dead, or Flower answered in
its place; a site answers the same job twice with the same reply, so that costs time and never changes a number.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from flwr.app import Message
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid

from fedmllm.remote.protocol import Job, ProtocolError, Reply, parts_of, to_bytes
from fedmllm.remote.records import RecordError, pack, unpack


class Absent(RuntimeError):  # noqa: N818 (it says what happened)
    """Clients did not come in time; they may yet."""


ATTEMPTS = 5
"""How often a job is sent in one round before what Flower says of it is taken for the answer."""
POLL = 0.5
"""Seconds between two looks for replies, at most."""
LOOK = 5.0
"""Seconds between two looks at which nodes there are."""


def read_reply(message: Message) -> Reply | str:
    """The reply in a message, or what Flower says in its place."""
    if message.has_error():
        # The reason can hold a traceback of another's code: the code alone is ours to show.
        return f"Flower's error {message.error.code} in place of an answer"
    try:
        return Reply.of(*parts_of(pack(message.content)))
    except (ProtocolError, RecordError) as error:
        return Reply(problem=str(error))


@dataclass
class _Sent:
    """A client's job on its way. `activated` is when its node came up, as far as was known when it was sent."""

    job: Job
    attempts: int = 0
    ids: set[str] = field(default_factory=set)
    activated: str = ""
    waiting: bool = True
    seen: float = 0.0
    problem: str = ""


class FlowerTransport:
    """`absent`: a client whose node is gone for so many seconds of a round is not waited for any longer. In the next round it
    is looked for, and not waited for again, unless all are gone.

    `names`, where sites are registered under names, has the name of each client's site in the order of the clients: a node
    that is registered under one name cannot answer for another.
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
        self._looked = -LOOK
        self._away: set[int] = set()

    # Who is there

    def _look(self) -> dict[int, NodeInfo]:
        """The nodes that are there, asked for every few seconds."""
        if self._clock() - self._looked >= LOOK:
            self._online = {node.node_id: node for node in self._grid.get_nodes()}
            self._looked = self._clock()
        return self._online

    def roll_call(self, job: Job, clients: int, wait: float, enough: int | None = None) -> dict[int, Reply]:
        """What each client says of itself, client by client.

        Returns when all `clients` have answered, or after `wait` seconds where at least `enough` have. Raises Absent, with what
        was wrong, where they have not.
        """
        enough = clients if enough is None else enough
        found: dict[int, Reply] = {}
        problems: dict[int, str] = {}
        asked: dict[str, int] = {}
        answered: set[tuple[int, str]] = set()
        end = self._clock() + wait
        while len(found) < clients and self._clock() < end:
            for node_id, node in self._look().items():
                # Each time that a node comes up it is asked anew: its file may have been mended.
                if node_id not in self._node.values() and (node_id, node.last_activated_at) not in answered:
                    answered.add((node_id, node.last_activated_at))
                    asked |= dict.fromkeys(self._push(job, node_id, end - self._clock()), node_id)
            for message in self._pull(asked):
                node_id = asked.pop(message.metadata.reply_to_message_id)
                reply = read_reply(message)
                problem = reply if isinstance(reply, str) else reply.problem or self._misnamed(node_id, reply, clients, found)
                if problem or isinstance(reply, str):
                    problems[node_id] = problem
                else:
                    problems.pop(node_id, None)
                    found[reply.client], self._node[reply.client] = reply, node_id
            if len(found) < clients:
                self._sleep(POLL)
        if len(found) < enough:
            lacking = ", ".join(self._names[c] if self._names else f"client {c}" for c in range(clients) if c not in found)
            said = "".join(f"; one node said: {problem}" for problem in sorted(set(problems.values())))
            raise Absent(
                f"{len(found)} of {clients} clients were there within {wait:g} s, lacking are {lacking}{said}; start them, "
                "or raise fleet.wait."
            )
        return found

    def _misnamed(self, node_id: int, reply: Reply, clients: int, found: Mapping[int, Reply]) -> str:
        """Why the node cannot be the client that it says it is; empty where it can."""
        if not 0 <= reply.client < clients:
            return f"it says it is client {reply.client}, of {clients}"
        name = getattr(self._online.get(node_id), "name", "")
        if self._names and name and self._names[reply.client] != name:
            return f"it is registered as {name!r} and says it is {self._names[reply.client]!r}"
        return f"it says it is client {reply.client}, as another does" if reply.client in found else ""

    # Jobs

    def exchange(self, jobs: Mapping[int, Job], timeout: float) -> Mapping[int, Reply]:
        """A reply of each client that answers in time; one that says why there is none where that is known."""
        now = self._clock()
        end, self._looked = now + timeout, -LOOK
        away = self._away & jobs.keys() if jobs.keys() - self._away else set()
        under_way = {client: _Sent(job, seen=now - self._absent * (client in away)) for client, job in jobs.items()}
        self._away -= jobs.keys()
        replies: dict[int, Reply] = {}
        pause = POLL / 32  # simulations answer at once
        while under_way and self._clock() < end:
            self._send(under_way, end)
            for message in self._pull(i for sent in under_way.values() for i in sent.ids):
                id = message.metadata.reply_to_message_id  # noqa: A001 (Flower's word)
                # A job that was sent twice may be answered twice.
                if (client := next((c for c, s in under_way.items() if id in s.ids), None)) is not None:
                    self._take(client, under_way, replies, read_reply(message), id)
            for client, sent in list(under_way.items()):
                if self._clock() - sent.seen > self._absent:
                    gone = "its node is still gone" if client in away else f"its node was gone for {self._absent:g} s"
                    replies[client] = Reply(client, problem=f"{gone} ({sent.problem})" if sent.problem else gone)
                    del under_way[client]
                    self._away.add(client)
            if under_way:
                self._sleep(pause)
                pause = min(2 * pause, POLL)
        return replies

    def _send(self, under_way: Mapping[int, _Sent], end: float) -> None:
        """Send what waits for a node that is there, and again what went to a node that has come up anew since."""
        online, now = self._look(), self._clock()
        for client, sent in under_way.items():
            node = self._node_of(client, online)
            if node is None:
                continue
            sent.seen = now
            again = sent.attempts > 0 and node.last_activated_at != sent.activated
            if (sent.waiting or again) and sent.attempts < ATTEMPTS:
                sent.ids |= set(self._push(sent.job, node.node_id, end - now))
                sent.attempts, sent.activated, sent.waiting = sent.attempts + 1, node.last_activated_at, False

    def _node_of(self, client: int, online: Mapping[int, NodeInfo]) -> NodeInfo | None:
        if client not in self._node and self._names:  # it was not there when the roll was called
            return next((node for node in online.values() if node.name == self._names[client]), None)
        return online.get(self._node.get(client, -1))

    def _take(self, client: int, under_way: dict[int, _Sent], replies: dict[int, Reply], said: Reply | str, id: str) -> None:
        sent = under_way[client]
        if isinstance(said, str):
            sent.ids.discard(id)
            sent.problem, sent.waiting = said, not sent.ids
            if sent.waiting and sent.attempts >= ATTEMPTS:
                said = Reply(client, problem=f"{said}, {sent.attempts} times")
            else:
                self._looked = -LOOK  # whether the node is still there is the question now
                return
        replies[client] = said
        del under_way[client]

    def _push(self, job: Job, node: int, seconds: float) -> list[str]:
        kind = job.kind if job.kind in ("train", "evaluate") else f"query.{job.kind}"
        group = str(job.round) if job.kind == "train" else job.kind
        message = Message(unpack(to_bytes(job)), node, kind, ttl=max(seconds, 1.0), group_id=group)
        return [i for i in self._grid.push_messages([message]) if i]

    def _pull(self, ids: Iterable[str]) -> list[Message]:
        wanted = list(ids)
        return [m for m in self._grid.pull_messages(wanted) if m.metadata.reply_to_message_id in wanted] if wanted else []


__all__ = ["ATTEMPTS", "Absent", "FlowerTransport", "read_reply"]
