"""Nodes that come, go, restart and fail, and what the server makes of their replies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message

from fedmllm.algorithms import RoundInfo
from fedmllm.remote.fleet import RemoteFleet
from fedmllm.remote.protocol import Job, Reply, parts_of, to_bytes
from fedmllm.remote.records import pack, unpack
from fedmllm.remote.transport import ASK_AGAIN, ATTEMPTS, NODES_POLL, Absent, FlowerTransport
from grids import DirectGrid

Write = Callable[..., Path]
FLEET = '[fleet]\nname = "flower"\nwait = 5.0\ntimeout = 60.0\nabsent = 2.0\n'


# Nodes


def clocked(
    grid: DirectGrid,
    absent: float = 30.0,
    names: tuple[str, ...] = (),
    after_sleep: Callable[[float], None] = lambda now: None,
) -> tuple[FlowerTransport, list[float]]:
    """A transport whose clock advances only while it sleeps."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds
        after_sleep(now[0])

    return FlowerTransport(grid, absent, names, lambda: now[0], sleep), now


def echo(message: Message, context: Context) -> Message:
    """A node that reports its client and returns the state that it received."""
    job = Job.of(*parts_of(pack(message.content)))
    about = {"samples": 3, "image": 2, "text": 2}
    client = int(context.node_config["partition-id"])
    return Message(unpack(to_bytes(Reply(client, job.state, 1, 1, about=about))), reply_to=message)


def nodes(*clients: int) -> dict[int, dict[str, bool | float | int | str]]:
    return {100 + client: {"partition-id": client} for client in clients}


DESCRIBE = Job("describe", "ab" * 8, "")


def train_job(client: int, value: float = 1.0) -> Job:
    return Job("train", "ab" * 8, "", client, 0, (0, 1), state={"adapter": {"a": torch.tensor([value])}})


def test_clients_are_awaited_until_all_are_found() -> None:
    transport, now = clocked(DirectGrid(echo, nodes(0, 1, 2)))
    assert transport.find_clients(DESCRIBE, 3, wait=60).keys() == {0, 1, 2}
    assert now[0] < 1
    transport, now = clocked(DirectGrid(echo, nodes(0, 2)))
    with pytest.raises(Absent, match="2 of 3 clients connected within 60 s; missing: client 1; start them"):
        transport.find_clients(DESCRIBE, 3, wait=60)
    assert now[0] == pytest.approx(60, abs=1)
    assert transport.find_clients(DESCRIBE, 3, wait=10, required=0).keys() == set(), "known clients are not contacted again"


def test_a_node_that_comes_online_late_is_found() -> None:
    grid = DirectGrid(echo, nodes(0))

    def come_online(seconds: float) -> None:
        if seconds > 20:
            grid.nodes.update(nodes(1))
            grid.activated.setdefault(101, "")

    transport, now = clocked(grid, after_sleep=come_online)
    assert transport.find_clients(DESCRIBE, 2, wait=60).keys() == {0, 1}
    assert 20 < now[0] < 30


@pytest.mark.parametrize("reason", ["Flower's error", "the node's own problem"])
def test_a_node_that_could_not_answer_is_contacted_again(reason: str) -> None:
    """Although it was online all the time, as far as Flower knows: its heartbeat may have been late for a second."""
    grid, answers = DirectGrid(echo, nodes(0, 1)), [0]

    def failing_twice(message: Message, context: Context) -> Message:
        job = Job.of(*parts_of(pack(message.content)))
        client = int(context.node_config["partition-id"])
        answers[0] += client
        problem = "the worker is away" if client and answers[0] <= 2 and "problem" in reason else ""
        return Message(unpack(to_bytes(Reply(client, job.state, 1, 1, problem=problem))), reply_to=message)

    grid.app, push = failing_twice, grid.push_messages

    def push_and_fail(messages: Any) -> Any:
        ids = list(push(messages))
        if grid.sent[-1].metadata.dst_node_id == 101 and answers[0] <= 2 and "Flower" in reason:
            grid.fail(grid.sent[-1], 3)
        return ids

    grid.push_messages = push_and_fail  # type: ignore[method-assign]
    transport, now = clocked(grid)
    assert transport.find_clients(DESCRIBE, 2, wait=60).keys() == {0, 1}
    assert 2 * ASK_AGAIN <= now[0] < 2 * ASK_AGAIN + 2
    assert [message.metadata.dst_node_id for message in grid.sent] == [100, 101, 101, 101], "no more often than that"


def test_the_last_of_two_answers_of_a_node_is_no_problem() -> None:
    grid = DirectGrid(echo, nodes(0, 1))
    grid.lose = lambda message: message.metadata.dst_node_id == 101

    def answer_twice(seconds: float) -> None:
        if seconds > 5:  # it came online again, and answers what it was sent before as well
            grid.activated[100] = "later"

    transport, _ = clocked(grid, after_sleep=answer_twice)
    pull = grid.pull_messages
    grid.pull_messages = lambda ids: pull(ids) if len(grid.sent) > 2 or len(list(ids)) > 2 else []  # type: ignore[method-assign]
    with pytest.raises(Absent, match="1 of 2 clients connected within 20 s; missing: client 1; start them"):
        transport.find_clients(DESCRIBE, 2, wait=20)


def test_a_node_that_goes_offline_after_its_answer_is_still_the_site_it_is_registered_as() -> None:
    grid = DirectGrid(echo, {100: {"partition-id": 0}, 102: {"partition-id": 1}}, names={100: "north", 102: "east"})
    transport, now = clocked(grid, names=("north", "south", "east"), after_sleep=lambda now: grid.nodes.pop(102, None))
    pull = grid.pull_messages
    grid.pull_messages = lambda ids: pull(ids) if now[0] > NODES_POLL + 1 else []  # type: ignore[method-assign]
    with pytest.raises(Absent, match="registered as 'east' and claims to be 'south'"):
        transport.find_clients(DESCRIBE, 3, wait=15)


def test_a_node_cannot_be_another_site_than_it_is_registered_as() -> None:
    grid = DirectGrid(echo, nodes(0, 1), names={100: "north", 101: "east"})
    transport, _ = clocked(grid, names=("north", "south"))
    with pytest.raises(Absent, match="registered as 'east' and claims to be 'south'"):
        transport.find_clients(DESCRIBE, 2, wait=5)


def test_two_nodes_cannot_be_one_client() -> None:
    grid = DirectGrid(echo, {100: {"partition-id": 0}, 101: {"partition-id": 0}})
    with pytest.raises(Absent, match="missing: client 1; a node reported: it claims to be client 0, as another node does"):
        clocked(grid)[0].find_clients(DESCRIBE, 2, wait=5)


def ready(
    grid: DirectGrid, clients: int = 2, after_sleep: Callable[[float], None] = lambda now: None
) -> tuple[FlowerTransport, list[float]]:
    """A transport that has found its clients, at time 0."""
    transport, now = clocked(grid, after_sleep=after_sleep)
    transport.find_clients(DESCRIBE, clients, wait=60)
    grid.sent.clear()
    now[0] = 0
    return transport, now


def test_a_slow_client_is_awaited_until_the_end_of_the_round() -> None:
    grid = DirectGrid(echo, nodes(0, 1))
    transport, now = ready(grid)
    grid.lose = lambda message: message.metadata.dst_node_id == 101
    replies = transport.exchange({0: train_job(0), 1: train_job(1)}, timeout=300)
    assert replies.keys() == {0}
    assert now[0] == pytest.approx(300, abs=1)
    assert len(grid.sent) == 2, "its node is online, so the job is not sent again"


def test_a_round_continues_without_a_client_that_is_offline_too_long() -> None:
    grid = DirectGrid(echo, nodes(0, 1))
    transport, now = ready(grid)
    del grid.nodes[101]
    replies = transport.exchange({0: train_job(0), 1: train_job(1)}, timeout=300)
    assert replies[0].problem == ""
    assert replies[1].problem == "its node was offline for 30 s"
    assert now[0] == pytest.approx(30, abs=2)


def test_a_client_that_was_offline_is_not_awaited_in_the_next_round() -> None:
    grid = DirectGrid(echo, nodes(0, 1))
    transport, now = ready(grid)
    jobs = {0: train_job(0), 1: train_job(1)}
    node = grid.nodes.pop(101)
    transport.exchange(jobs, timeout=300)
    assert now[0] == pytest.approx(30, abs=2)
    now[0] = 0
    assert transport.exchange(jobs, timeout=300)[1].problem == "its node is still offline"
    assert now[0] < 1
    assert transport.exchange({1: train_job(1)}, timeout=300)[1].problem == "its node was offline for 30 s", (
        "no other client is online"
    )
    grid.nodes[101] = node
    assert not any(reply.problem for reply in transport.exchange(jobs, timeout=300).values())


def test_a_restarted_node_is_sent_its_job_again() -> None:
    grid = DirectGrid(echo, nodes(0, 1))

    def restart(seconds: float) -> None:
        if seconds > 40:
            grid.activated[101] = "later"

    transport, now = ready(grid, after_sleep=restart)
    grid.lose = lambda message: message.metadata.dst_node_id == 101 and grid.activated[101] == ""
    replies = transport.exchange({0: train_job(0), 1: train_job(1)}, timeout=300)
    assert replies.keys() == {0, 1}
    assert 40 < now[0] < 50
    assert len(grid.sent) == 3


def test_an_error_of_flower_is_the_answer_only_after_several_attempts() -> None:
    grid = DirectGrid(echo, nodes(0, 1))
    transport, _ = ready(grid)
    grid.lose = lambda message: message.metadata.dst_node_id == 101
    push = grid.push_messages

    def failing(messages: Any) -> Any:
        ids = list(push(messages))
        if grid.sent[-1].metadata.dst_node_id == 101:
            grid.fail(grid.sent[-1], 8)
        return ids

    grid.push_messages = failing  # type: ignore[method-assign]
    replies = transport.exchange({0: train_job(0), 1: train_job(1)}, timeout=300)
    assert replies[0].groups["adapter"]["a"] == 1
    assert replies[1].problem == f"Flower's error 8 in place of an answer, {ATTEMPTS} times"
    assert "a reason" not in replies[1].problem


def test_a_fleet_gives_the_reason_for_each_missing_update() -> None:
    class FakeTransport:
        def exchange(self, jobs: Any, timeout: float) -> dict[int, Reply]:
            assert jobs[2].last == -1
            good = Reply(0, {"adapter": {"a": torch.ones(1)}}, 4, 2, {"loss": 1.0})
            return {0: good, 1: Reply(7, {}, 3, 1), 3: Reply(3, problem="out of disk")}

    fleet = RemoteFleet(FakeTransport(), "ab" * 8, "", 12.0)
    info = RoundInfo(0, 3, 5, (0, 1, 2, 3), 0)
    updates = fleet.train(info, {c: {} for c in info.sampled})
    assert [(u.client, u.examples, u.problem) for u in updates] == [
        (0, 4, ""), (1, 0, "answered as client 7"), (2, 0, "no answer within 12 s"), (3, 0, "out of disk")
    ]  # fmt: skip


def test_jobs_carry_the_last_round_that_counted() -> None:
    last_rounds: list[dict[int, int]] = []

    class FakeTransport:
        def exchange(self, jobs: Any, timeout: float) -> dict[int, Reply]:
            last_rounds.append({client: job.last for client, job in jobs.items()})
            return {}

    fleet = RemoteFleet(FakeTransport(), "ab" * 8, "", 1.0, {0: 4})
    for number, refused in ((5, [1]), (6, []), (7, [0, 1])):
        fleet.train(RoundInfo(number, 9, 3, (0, 1), 0), {0: {}, 1: {}})
        fleet.forget(number, refused)
    fleet.train(RoundInfo(8, 9, 3, (0, 2), 0), {0: {}, 2: {}})
    assert last_rounds == [{0: 4, 1: -1}, {0: 5, 1: -1}, {0: 6, 1: 6}, {0: 6, 2: -1}]
