"""The ClientApp. Flower starts a process of it for each message, so it only hands the message to the site's worker.

A node says in its configuration where that is (`worker`, a Unix socket, which `fedmllm client` writes there). A node without
one, in simulations, is a client by its `partition-id` and works in this very process, which simulations keep.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedmllm.errors import UserError
from fedmllm.remote.records import HEAD, pack, unpack
from fedmllm.remote.wire import VERSION, NoAnswer, ask

if TYPE_CHECKING:
    from fedmllm.remote.site import Worker

PATIENCE = 120.0
"""Seconds that a worker may be away: it may be loading its libraries, or have been started again."""

app = ClientApp()


@cache
def _worker() -> Worker:
    """This process's own worker; what clients remember is beside the cached features."""
    from fedmllm.models.features import cache_folder
    from fedmllm.remote.site import Worker

    return Worker(cache_folder() / "clients")


def _here(content: bytes, context: Context) -> bytes:
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
    return to_bytes(_worker().answer([job])[0])


def answer(message: Message, context: Context) -> Message:
    """Never raises: Flower would send the traceback, and a traceback may quote data."""
    try:
        content = pack(message.content)
        worker = context.node_config.get("worker")
        reply = ask(Path(str(worker)), content, PATIENCE) if worker else _here(content, context)
        return Message(unpack(reply), reply_to=message)
    except (UserError, NoAnswer) as error:
        problem = str(error)
    except Exception as error:  # the boundary: the kind of any other error, and nothing that it says
        problem = f"{type(error).__name__} in the site's app"
    told = {"client": -1, "examples": 0, "steps": 0, "problem": problem, "metrics": {}, "about": {}, "groups": []}
    return Message(RecordDict({HEAD: ConfigRecord({"head": json.dumps({**told, "version": VERSION})})}), reply_to=message)


QUERIES = ("describe", "personal", "keys", "shares", "masked", "unmask")
"""The last four are a secure round's (`fedmllm.secure.settings.PHASES`, whose import would take longer than the rest)."""

for register in (app.train(), app.evaluate(), *map(app.query, QUERIES)):
    register(answer)
