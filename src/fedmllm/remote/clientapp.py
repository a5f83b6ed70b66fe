"""The ClientApp. Flower starts a process of it for each message, so it only passes the message to the site's worker.

The node's configuration names the worker's Unix socket (`worker`, set by `fedmllm client`). A node without one, as in
simulations, is the client with the number `partition-id` and does the work in this process, which simulations keep alive.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedmllm.errors import UserError
from fedmllm.remote.records import HEADER, pack, unpack
from fedmllm.remote.wire import VERSION, NoAnswer, request

if TYPE_CHECKING:
    from fedmllm.remote.worker import Worker

PATIENCE = 120.0
"""Seconds that a worker may be away: it may be loading its libraries, or have been restarted."""

app = ClientApp()


@cache
def local_worker() -> Worker:
    """This process's own worker. Its clients' memory is beside the cached features."""
    from fedmllm.models.features import cache_folder
    from fedmllm.remote.worker import Worker

    return Worker(cache_folder() / "clients")


def _answer_locally(content: bytes, context: Context) -> bytes:
    """The answer of a client that works in this process."""
    from dataclasses import replace

    from fedmllm.remote.protocol import Job, parts_of, to_bytes

    if "partition-id" not in context.node_config:
        raise UserError(
            "this node's configuration has neither `worker` nor `partition-id`; start it with `fedmllm client`, or with "
            "--node-config 'partition-id=0'."
        )
    job = Job.of(*parts_of(content))
    if job.kind == "describe":
        job = replace(job, client=int(context.node_config["partition-id"]))
    return to_bytes(local_worker().answer([job])[0])


def answer(message: Message, context: Context) -> Message:
    """Never raises: Flower would send the traceback, which may quote data."""
    try:
        content = pack(message.content)
        worker = context.node_config.get("worker")
        reply = request(Path(str(worker)), content, PATIENCE) if worker else _answer_locally(content, context)
        return Message(unpack(reply), reply_to=message)
    except (UserError, NoAnswer) as error:
        problem = str(error)
    except Exception as error:  # report the type of any other error, and not its message
        problem = f"{type(error).__name__} in the site's app"
    # The header of a protocol.Reply, whose import would load PyTorch.
    header = {"client": -1, "examples": 0, "steps": 0, "problem": problem, "metrics": {}, "about": {}, "groups": []}
    return Message(RecordDict({HEADER: ConfigRecord({"head": json.dumps({**header, "version": VERSION})})}), reply_to=message)


QUERIES = ("describe", "personal", "keys", "shares", "masked", "unmask")
"""The last four are the phases of a secure round (`fedmllm.secure.settings.PHASES`, whose import would take too long here)."""

for register in (app.train(), app.evaluate(), *map(app.query, QUERIES)):
    register(answer)
