"""A Grid without Ray and without a network: each message goes through Flower's own serialisation and straight into the
ClientApp."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.app.error import Error
from flwr.clientapp import ClientApp
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedmllm.remote.client_app import app as client_app

RUN = 7
Spoil = Callable[[int, Message], Message | None]
"""(node, reply) -> the reply that arrives; None where it is lost."""


@pytest.fixture
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Flower sets in a ServerApp's process, without which no message can be made."""
    for name, value in {"_run_id": RUN, "_node_id": 1, "_task_id": 1}.items():
        monkeypatch.setattr(TaskIdentity, name, value)


@dataclass
class LocalGrid(Grid):
    """`nodes` are the node configurations by node id, `names` those under which nodes were registered, `sent` all bytes
    that travelled, with the node that they were to or from."""

    nodes: dict[int, dict[str, Any]]
    names: Mapping[int, str] = field(default_factory=dict)
    app: ClientApp = client_app
    spoil: Spoil = lambda node, reply: reply
    sent: list[tuple[str, int, bytes]] = field(default_factory=list)

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=node, name=self.names.get(node, "")) for node in self.nodes]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        assert timeout is not None, "every wait must be bounded"
        assert timeout > 0
        replies = (self._answer(message) for message in messages)
        return [reply for reply in replies if reply is not None]

    def _answer(self, message: Message) -> Message | None:
        node = message.metadata.dst_node_id
        message.content = self._travel("down", node, message.content)
        context = Context(RUN, node, self.nodes[node], RecordDict(), {})
        reply = self.spoil(node, self.app(message, context))
        if reply is not None and reply.has_content():
            reply.content = self._travel("up", node, reply.content)
        return reply

    def _travel(self, way: str, node: int, content: RecordDict) -> RecordDict:
        wire = recorddict_to_proto(content).SerializeToString()
        self.sent.append((way, node, wire))
        return unpacked(wire)


def unpacked(wire: bytes) -> RecordDict:
    return recorddict_from_proto(RecordDictProto.FromString(wire))


def gone(reply: Message) -> Message:
    """What Flower's SuperLink makes of a node that died with a message in its hands."""
    made = Message(Error(5, "Node unavailable"), reply_to=reply)
    made.metadata.__dict__["_src_node_id"] = reply.metadata.src_node_id
    return made
