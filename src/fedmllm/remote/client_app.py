"""The ClientApp. Flower starts it in a new process for each message, so it only forwards to the site's worker, which keeps the
model. Without a worker, as in Flower's simulations, this process does the work and keeps the model for as long as it lives.

Node configuration: `worker` is the worker's socket; without it `partition-id` is the number of the client.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedmllm.models.features import cache_folder
from fedmllm.remote.messages import job_of, to_record
from fedmllm.remote.protocol import Job, ProtocolError, Reply
from fedmllm.remote.site import Worker
from fedmllm.remote.socket import ask


@cache
def _resident() -> Worker:
    return Worker(cache_folder() / "clients")


def _answer(job: Job, context: Context) -> Reply:
    if "worker" in context.node_config:
        try:
            return ask(Path(str(context.node_config["worker"])), job)
        except (OSError, ProtocolError) as error:
            return Reply(job.client, problem=f"the site's worker did not answer: {error}")
    number = context.node_config.get("partition-id")
    if not isinstance(number, int):
        return Reply(problem="its node configuration has neither worker nor partition-id; start it with `fedmllm client`")
    if job.kind == "describe":
        job = Job("describe", job.run, job.config, number)
    elif job.client != number:
        return Reply(number, problem=f"was sent the job of client {job.client}")
    return _resident().answer([job])[0]


def handle(message: Message, context: Context) -> Message:
    """A reply to any message: what goes wrong is in it, and nothing of the site's data is."""
    try:
        reply = _answer(job_of(message.content), context)
    except ProtocolError as error:
        reply = Reply(problem=f"cannot read the job: {error}")
    return Message(to_record(reply), reply_to=message)


app = ClientApp()
app.train()(handle)
app.evaluate()(handle)
app.query()(handle)

__all__ = ["app", "handle"]
