"""A Flower Grid without Flower's processes: it calls the ClientApp of each node in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

App = Callable[[Message, Context], Message]


class DirectGrid(Grid):
    """`nodes` maps each node to its configuration, `names` to the name under which it is registered. If `lose(message)`, a
    message gets no answer. `sent` and `received` contain all messages."""

    def __init__(
        self,
        app: App,
        nodes: Mapping[int, dict[str, bool | float | int | str]],
        names: Mapping[int, str] | None = None,
        lose: Callable[[Message], bool] = lambda message: False,
    ) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 0, 1, 0  # as Flower's processes do
        self.app, self.nodes, self.names, self.lose = app, dict(nodes), names or {}, lose
        self.sent: list[Message] = []
        self.received: list[Message] = []
        self.activated: dict[int, str] = dict.fromkeys(nodes, "")
        self._replies: dict[str, Message] = {}

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=n, name=self.names.get(n, ""), last_activated_at=self.activated[n]) for n in self.nodes]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            self.sent.append(message)
            ids.append(message.metadata.message_id)
            node = message.metadata.dst_node_id
            if node in self.nodes and not self.lose(message):
                context = Context(0, node, self.nodes[node], RecordDict(), {})
                reply = self.app(message, context)
                reply.metadata.__dict__["_message_id"] = str(uuid4())
                self._replies[message.metadata.message_id] = reply
        return ids

    def fail(self, message: Message, code: int) -> None:
        """Answer a message with an error of Flower instead of its node's answer."""
        self._replies[message.metadata.message_id] = Message(Error(code, "a reason"), reply_to=message)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = [self._replies.pop(id_) for id_ in list(message_ids) if id_ in self._replies]
        self.received += replies
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))
