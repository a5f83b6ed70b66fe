"""Flower as a fleet, on a grid without Flower's processes: what travels, what comes out, what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from commands import run as command
from fedmllm.algorithms import RoundInfo
from fedmllm.errors import ConfigError, RunError
from fedmllm.federation import TooFewUpdates
from fedmllm.remote import clientapp
from fedmllm.remote.fleet import RemoteFleet
from fedmllm.remote.protocol import Job, JobKind, ProtocolError, Reply, parts_of, to_bytes
from fedmllm.remote.records import HEAD, RecordError, pack, unpack
from fedmllm.remote.serverapp import load_experiment, manifest_of, run, told_to_sites
from fedmllm.remote.site import Worker
from fedmllm.remote.transport import ATTEMPTS, Absent, FlowerTransport
from fedmllm.runs.progress import no_progress
from fedmllm.secure.settings import PHASES
from fedmllm.storage.run_dir import RunDir
from grids import DirectGrid
from helpers import quick, same

Write = Callable[..., Path]
FLEET = '[fleet]\nname = "flower"\nwait = 5.0\ntimeout = 60.0\nabsent = 2.0\n'


# Codecs


@st.composite
def states(draw: st.DrawFn) -> dict[str, dict[str, torch.Tensor]]:
    kinds = [torch.float32, torch.float64, torch.int8, torch.int64, torch.bool, torch.float16]
    shapes = st.sampled_from([(), (0,), (1,), (3, 2), (2, 1, 4)])
    names = st.text("ab./_é", min_size=1, max_size=6)
    tensors = st.builds(
        lambda kind, shape, value: torch.full(shape, value).to(kind), st.sampled_from(kinds), shapes, st.integers(-120, 120)
    )
    groups = st.text("xyz_", min_size=1, max_size=3).filter(lambda name: name != HEAD)
    return draw(st.dictionaries(groups, st.dictionaries(names, tensors, max_size=3), max_size=3))


@quick
@given(states())
def test_a_state_comes_through_records_bit_for_bit(state: dict[str, dict[str, torch.Tensor]]) -> None:
    job = Job("train", "ab" * 8, "x = 1", 3, 2, (1, 3), {3: 4}, 0.1 + 0.2, 1, state)
    records = unpack(to_bytes(job))
    assert set(records.array_records) == {group for group, tensors in state.items() if tensors}
    back = Job.of(*parts_of(pack(records)))
    assert same(back.state, state)
    assert back.state.keys() == state.keys(), "a group without tensors is a group"
    assert back.head() == job.head()
    assert back.lr == 0.1 + 0.2, "exactly"


def test_numbers_come_through_exactly() -> None:
    groups = {"n": {"big": torch.tensor(2**62 + 1), "tiny": torch.tensor(1e-45), "nan": torch.tensor(math.nan)}}
    reply = Reply(2, groups, 2**53 + 1, 7, {"loss": 1 / 3}, about={"samples": 12})
    back = Reply.of(*parts_of(pack(unpack(to_bytes(reply)))))
    assert (back.client, back.examples, back.steps, back.metrics) == (2, 2**53 + 1, 7, {"loss": 1 / 3})
    assert int(back.groups["n"]["big"]) == 2**62 + 1
    assert float(back.groups["n"]["tiny"]) > 0
    assert back.groups["n"]["nan"].isnan()


def test_bfloat16_does_not_travel() -> None:
    with pytest.raises(RecordError, match="cannot be made"):
        unpack(to_bytes(Reply(0, {"adapter": {"a": torch.ones(2, dtype=torch.bfloat16)}})))


def records(head: object = "{}", **more: Any) -> RecordDict:
    return RecordDict({HEAD: ConfigRecord({"head": head}), **more})


@pytest.mark.parametrize(
    "bad",
    [
        RecordDict(),
        RecordDict({"other": ConfigRecord({"head": "{}"})}),
        records(head=3),
        records(more=MetricRecord({"x": 1.0})),
        records(more=ConfigRecord({"x": "y"})),
        records(adapter=ArrayRecord({"a": Array("float32", (2,), "numpy.ndarray", b"nonsense")})),
        records(adapter=ArrayRecord({"a": Array("float32", (2,), "pickle", b"cos\nsystem\n")})),
    ],
)
def test_records_that_are_not_ours_are_refused(bad: RecordDict) -> None:
    with pytest.raises(RecordError):
        pack(bad)


@pytest.mark.parametrize(
    ("head", "why"),
    [
        ("not json", "no JSON"),
        ("[]", "version"),
        ('{"version": 99}', "version 1"),
        ('{"version": 1}', "groups"),
        (Reply(1).head().replace('"examples": 0', '"examples": 0.5'), "no integers"),
        (Reply(1).head().replace('"examples": 0', '"examples": true'), "no integers"),
        (Reply(1).head().replace('"steps": 0', '"steps": "many"'), "no integers"),
        (Reply(1).head().replace('"groups": []', '"groups": 3'), "groups"),
        (Reply(1).head().replace('"metrics": {}', '"metrics": {"loss": "low"}'), "not a reply"),
        (Reply(1).head().replace('"about": {}', '"about": {}, "samples": []'), "not a reply"),
    ],
)
def test_replies_of_another_shape_are_refused(head: str, why: str) -> None:
    with pytest.raises(ProtocolError, match=why):
        Reply.of(head, {})


# Whole runs


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDMLLM_CACHE", str(tmp_path / "cache"))
    clientapp._worker.cache_clear()
    yield
    clientapp._worker.cache_clear()


def settings(file: Path, out: str = "out", **more: Any) -> dict[str, Any]:
    return {"experiment": str(file), "out": out, "resume": False, "overrides": "", "outcome": "", **more}


def grid(clients: int = 4, **more: Any) -> DirectGrid:
    return DirectGrid(clientapp.app, {100 + client: {"partition-id": client} for client in range(clients)}, **more)


def adapter(folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "adapter" / "adapter_model.safetensors")


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[n], b[n], rtol=1e-6, atol=1e-6) for n in a)


@pytest.mark.parametrize(
    "extra",
    [
        "",
        '[algorithm]\nname = "scaffold"\n',
        '[algorithm]\nname = "flora"\n',
        '[algorithm]\nname = "feddyn"\n[compression]\nname = "int8"\n',
        '[algorithm]\nname = "hetlora"\n[clients]\nrank = [1, 2]\n',
        '[regularization]\nname = "adaptive"\nstrength = "modality-gap"\n',
    ],
    ids=["fedavg", "scaffold", "flora", "feddyn+int8", "hetlora", "modality-gap"],
)
def test_a_run_over_flower_is_the_run_in_process(write_experiment: Write, extra: str) -> None:
    """One by one, as each site trains: adapters stacked in a cohort round otherwise, which AdamW can make much of."""
    here = command("run", write_experiment(extra), "--out", "here", "--set", "train.cohort=1")
    there = run(grid(), settings(write_experiment(extra + FLEET)), no_progress)
    assert close(adapter("here"), adapter("out"))
    for key in ("metrics", "per_client", "rounds", "bytes_up", "bytes_down", "manifest_digest", "refused_updates"):
        assert there[key] == here[key], key
    losses = [[record["loss"] for record in RunDir(Path(folder)).rounds()] for folder in ("here", "out")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_hidden_updates_make_the_same_run(write_experiment: Write) -> None:
    """Four questions a round in place of one, up to the rounding of the fixed point; only bytes under masks come back."""
    extra, wires = '[secure]\nname = "pairwise"\n', grid()
    here = command("run", write_experiment(""), "--out", "here", "--set", "train.cohort=1")
    there = run(wires, settings(write_experiment(extra + FLEET)), no_progress)
    plain, hidden = adapter("here"), adapter("out")
    assert all(float((plain[name] - hidden[name]).abs().max()) < 1e-4 for name in plain)
    assert there["rounds"] == here["rounds"]
    assert ("describe", "personal", *PHASES) == clientapp.QUERIES
    kinds = {message.metadata.message_type for message in wires.sent}
    assert kinds == {"query.describe", *(f"query.{phase}" for phase in PHASES)}
    for message in wires.received:
        head = json.loads(str(message.content.config_records[HEAD]["head"]))
        assert (head["examples"], head["steps"], head["metrics"], head["problem"]) == (0, 0, {}, "")
        kinds = {array.numpy().dtype.name for arrays in message.content.array_records.values() for array in arrays.values()}
        assert kinds <= {"uint8"}


def test_a_node_that_is_lost_in_a_secure_round_is_made_up_for(write_experiment: Write) -> None:
    lost: list[int] = []

    def lose(message: Message) -> bool:
        if message.metadata.message_type == "query.masked" and not lost:
            lost.append(message.metadata.dst_node_id)
        return message.metadata.message_type == "query.masked" and message.metadata.dst_node_id in lost

    three = [("train.clients_per_round", 3), ("train.min_updates", 1), ("train.rounds", 2)]
    wires = grid(lose=lose)
    file = write_experiment('[secure]\nname = "pairwise"\n' + FLEET.replace("60.0", "4.0"))
    run(wires, settings(file, overrides=";".join(f"{key}={value}" for key, value in three)), no_progress)
    records = RunDir(Path("out")).rounds()
    gone = [(r["round"], refusal["client"], refusal["why"]) for r in records for refusal in r["refused"]]
    assert gone
    assert {client for _, client, _ in gone} == {lost[0] - 100}
    assert all(len(r["sampled"]) - len(r["refused"]) >= 2 for r in records)


def test_a_personalised_method_asks_the_clients_for_their_own_adapters(write_experiment: Write) -> None:
    extra = '[algorithm]\nname = "fedsa-lora"\n'
    here = command("run", write_experiment(extra), "--out", "here")
    there = run(grid(), settings(write_experiment(extra + FLEET)), no_progress)
    assert there["metrics"] == here["metrics"]
    assert [row["metrics"] for row in there["per_client"]] == [row["metrics"] for row in here["per_client"]]


def test_the_bytes_of_the_result_are_those_of_the_messages(write_experiment: Write) -> None:
    wires = grid()
    result = run(wires, settings(write_experiment('[algorithm]\nname = "scaffold"\n' + FLEET)), no_progress)

    def weigh(messages: list[Message]) -> dict[str, int]:
        total: dict[str, int] = {}
        for message in messages:
            if message.metadata.message_type == "train":
                for group, arrays in message.content.array_records.items():
                    total[group] = total.get(group, 0) + sum(array.numpy().nbytes for array in arrays.values())
        return total

    assert result["bytes_down"] == weigh(wires.sent)
    assert result["bytes_up"] == weigh(wires.received)


def test_no_sample_and_no_text_travels(write_experiment: Write, dataset: Path) -> None:
    wires = grid()
    run(wires, settings(write_experiment(FLEET)), no_progress)
    secrets = {
        line[key]
        for line in map(json.loads, (dataset / "train.jsonl").read_text().splitlines())
        for key in ("id", "text")
        if key in line
    }
    assert len(secrets) > 20
    for message in wires.received:
        content = pack(message.content)
        assert not [secret for secret in secrets if secret.encode() in content]
        head = json.loads(str(message.content.config_records[HEAD]["head"]))
        # All that a site ever says, key by key: a new one must be thought about here.
        assert head.keys() == {"client", "examples", "steps", "problem", "metrics", "about", "groups", "version"}
        assert head["metrics"].keys() <= {"loss", "padding"}
        assert head["about"].keys() <= {"samples", "image", "text", "skipped", "fedmllm", "adapter"}
        assert set(message.content.array_records) <= {"adapter"}
        assert {a.dtype for arrays in message.content.array_records.values() for a in arrays.values()} <= {"float32"}


def test_an_error_at_a_site_says_its_place_and_quotes_nothing(write_experiment: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    wires, file = grid(), write_experiment(FLEET)

    def broken(*_: object) -> None:
        raise RuntimeError("patient 17: a red thing")

    monkeypatch.setattr("fedmllm.remote.site.InProcessFleet.train", broken)
    with pytest.raises(TooFewUpdates, match=r"RuntimeError at the site \(test_flower\.py, line \d+\)") as failed:
        run(wires, settings(file), no_progress)
    assert "patient" not in str(failed.value)
    assert not [m for m in wires.received if b"patient" in pack(m.content)]


def test_a_run_that_was_cut_short_goes_on_to_the_same_adapter(write_experiment: Write) -> None:
    file = write_experiment('[algorithm]\nname = "scaffold"\n' + FLEET, rounds=4)
    run(grid(), settings(file, "whole"), no_progress)
    clientapp._worker.cache_clear()
    wires = grid()
    dead: list[int] = []

    def lost(message: Message) -> bool:
        # From round 2 on nobody answers, though in round 2 all have trained and remembered.
        return message.metadata.message_type == "train" and int(message.metadata.group_id) >= 2

    def forgetful(message: Message, context: Context) -> Message:
        reply = clientapp.app(message, context)
        if lost(message):
            dead.append(int(message.metadata.group_id))
            return Message(RecordDict(), reply_to=message)
        return reply

    wires.app = forgetful
    with pytest.raises(TooFewUpdates, match="round 2"):
        run(wires, settings(file), no_progress)
    assert dead, "they trained, and what they remember of it must not count"
    clientapp._worker.cache_clear()
    run(grid(), settings(file, resume=True), no_progress)
    assert close(adapter("out"), adapter("whole"))
    with pytest.raises(RunError, match="is not empty"):
        run(grid(), settings(file), no_progress)


def test_a_client_whose_update_is_nan_is_refused_and_named(write_experiment: Write) -> None:
    wires = grid()

    def spoilt(message: Message, context: Context) -> Message:
        reply = clientapp.app(message, context)
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == 1:
            arrays = reply.content.array_records["adapter"]
            name = min(arrays)
            arrays[name] = Array(np.full_like(arrays[name].numpy(), np.nan))
            reply.content["adapter"] = arrays
        return reply

    wires.app = spoilt
    run(wires, settings(write_experiment(FLEET), overrides="train.clients_per_round=4; train.rounds=2"), no_progress)
    for record in RunDir(Path("out")).rounds():
        assert [(r["client"], r["why"].partition(" in ")[0]) for r in record["refused"]] == [(1, "NaN or infinity")]


def test_a_client_tells_nothing_of_a_round_that_did_not_count(write_experiment: Write, tmp_path: Path) -> None:
    """Its own adapter after a round that was refused is that of the round before."""
    text = told_to_sites(load_experiment(write_experiment('[algorithm]\nname = "fedsa-lora"\n' + FLEET), []))
    worker = Worker(tmp_path / "clients")
    job = Job("describe", "ab" * 8, text, 0, sampled=(0,), lr=0.01)
    assert not worker.answer([job])[0].problem
    assert worker._known is not None
    experiment = worker._known[1]
    algorithm, session = experiment.algorithm, experiment.session
    start = algorithm.message(algorithm.init(session.initial), 0, RoundInfo(0, 3, 4, (0,), 0, session.model.info))

    def own(kind: JobKind, round: int, last: int) -> dict[str, torch.Tensor]:
        (reply,) = worker.answer([replace(job, kind=kind, round=round, last=last, state=start)])
        assert not reply.problem
        return reply.groups["adapter"]

    own("train", 0, -1)
    first = own("personal", 1, 0)
    own("train", 1, 0)
    assert same({"a": own("personal", 2, 0)}, {"a": first})
    own("train", 1, 0)
    assert not same({"a": own("personal", 2, 1)}, {"a": first})


# Nodes


def clocked(wires: DirectGrid, absent: float = 30.0, names: tuple[str, ...] = ()) -> tuple[FlowerTransport, list[float]]:
    """A post whose seconds pass only while it sleeps."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    return FlowerTransport(wires, absent, names, lambda: now[0], sleep), now


def echo(message: Message, context: Context) -> Message:
    """A node that says who it is, and sends back the adapter it was sent."""
    job = Job.of(*parts_of(pack(message.content)))
    about = {"samples": 3, "image": 2, "text": 2}
    client = int(context.node_config["partition-id"])
    return Message(unpack(to_bytes(Reply(client, job.state, 1, 1, about=about))), reply_to=message)


def nodes(*clients: int) -> dict[int, dict[str, bool | float | int | str]]:
    return {100 + client: {"partition-id": client} for client in clients}


DESCRIBE = Job("describe", "ab" * 8, "")


def train_job(client: int, value: float = 1.0) -> Job:
    return Job("train", "ab" * 8, "", client, 0, (0, 1), state={"adapter": {"a": torch.tensor([value])}})


def test_the_roll_call_waits_for_all_and_no_longer() -> None:
    post, now = clocked(DirectGrid(echo, nodes(0, 1, 2)))
    assert post.roll_call(DESCRIBE, 3, wait=60).keys() == {0, 1, 2}
    assert now[0] < 1
    post, now = clocked(DirectGrid(echo, nodes(0, 2)))
    with pytest.raises(Absent, match=r"2 of 3 clients were there within 60 s, lacking are client 1; start them"):
        post.roll_call(DESCRIBE, 3, wait=60)
    assert now[0] == pytest.approx(60, abs=1)
    assert post.roll_call(DESCRIBE, 3, wait=10, enough=0).keys() == set(), "those that have answered are not asked again"


def test_a_node_that_comes_late_is_found() -> None:
    wires = DirectGrid(echo, nodes(0))
    post, now = clocked(wires)
    seconds = post._sleep
    post._sleep = lambda s: (
        seconds(s),
        wires.nodes.update(nodes(1) if now[0] > 20 else {}),
        wires.activated.setdefault(101, ""),
    )  # type: ignore[assignment, func-returns-value]
    assert post.roll_call(DESCRIBE, 2, wait=60).keys() == {0, 1}
    assert 20 < now[0] < 30


def test_a_node_cannot_be_another_site_than_it_is_registered_as() -> None:
    wires = DirectGrid(echo, nodes(0, 1), names={100: "north", 101: "east"})
    post, _ = clocked(wires, names=("north", "south"))
    with pytest.raises(Absent, match="registered as 'east' and says it is 'south'"):
        post.roll_call(DESCRIBE, 2, wait=5)


def test_two_nodes_cannot_be_one_client() -> None:
    wires = DirectGrid(echo, {100: {"partition-id": 0}, 101: {"partition-id": 0}})
    with pytest.raises(Absent, match="lacking are client 1; one node said: it says it is client 0, as another does"):
        clocked(wires)[0].roll_call(DESCRIBE, 2, wait=5)


def ready(wires: DirectGrid, clients: int = 2) -> tuple[FlowerTransport, list[float]]:
    post, now = clocked(wires)
    post.roll_call(DESCRIBE, clients, wait=60)
    wires.sent.clear()
    now[0] = 0
    post._looked = -100
    return post, now


def test_who_is_slow_is_waited_for_until_the_round_is_over_and_no_longer() -> None:
    wires = DirectGrid(echo, nodes(0, 1))
    post, now = ready(wires)
    wires.lose = lambda message: message.metadata.dst_node_id == 101
    replies = post.exchange({0: train_job(0), 1: train_job(1)}, timeout=300)
    assert replies.keys() == {0}
    assert now[0] == pytest.approx(300, abs=1)
    assert len(wires.sent) == 2, "it is there, so it is not asked again"


def test_who_is_gone_is_given_up_after_a_while() -> None:
    wires = DirectGrid(echo, nodes(0, 1))
    post, now = ready(wires)
    del wires.nodes[101]
    replies = post.exchange({0: train_job(0), 1: train_job(1)}, timeout=300)
    assert replies[0].problem == ""
    assert replies[1].problem == "its node was gone for 30 s"
    assert now[0] == pytest.approx(30, abs=2)


def test_who_was_gone_is_looked_for_in_the_next_round_and_not_waited_for_again() -> None:
    wires = DirectGrid(echo, nodes(0, 1))
    post, now = ready(wires)
    jobs = {0: train_job(0), 1: train_job(1)}
    back = wires.nodes.pop(101)
    post.exchange(jobs, timeout=300)
    assert now[0] == pytest.approx(30, abs=2)
    now[0] = 0
    assert post.exchange(jobs, timeout=300)[1].problem == "its node is still gone"
    assert now[0] < 1
    assert post.exchange({1: train_job(1)}, timeout=300)[1].problem == "its node was gone for 30 s", "nobody else is there"
    wires.nodes[101] = back
    assert not any(reply.problem for reply in post.exchange(jobs, timeout=300).values())


def test_a_node_that_came_up_anew_is_sent_its_job_again() -> None:
    wires = DirectGrid(echo, nodes(0, 1))
    post, now = ready(wires)
    wires.lose = lambda message: message.metadata.dst_node_id == 101 and wires.activated[101] == ""
    sleep = post._sleep

    def restart(seconds: float) -> None:
        sleep(seconds)
        if now[0] > 40:
            wires.activated[101] = "later"

    post._sleep = restart
    replies = post.exchange({0: train_job(0), 1: train_job(1)}, timeout=300)
    assert replies.keys() == {0, 1}
    assert 40 < now[0] < 50
    assert len(wires.sent) == 3


def test_what_flower_says_in_a_nodes_place_is_no_answer_until_it_has_said_it_often() -> None:
    wires = DirectGrid(echo, nodes(0, 1))
    post, _ = ready(wires)
    wires.lose = lambda message: message.metadata.dst_node_id == 101
    push = wires.push_messages

    def failing(messages: Any) -> Any:
        ids = list(push(messages))
        if wires.sent[-1].metadata.dst_node_id == 101:
            wires.fail(wires.sent[-1], 8)
        return ids

    wires.push_messages = failing  # type: ignore[method-assign]
    replies = post.exchange({0: train_job(0), 1: train_job(1)}, timeout=300)
    assert replies[0].groups["adapter"]["a"] == 1
    assert replies[1].problem == f"Flower's error 8 in place of an answer, {ATTEMPTS} times"
    assert "a reason" not in replies[1].problem


def test_a_fleet_says_of_each_client_why_it_has_no_update() -> None:
    class Given:
        def exchange(self, jobs: Any, timeout: float) -> dict[int, Reply]:
            assert jobs[2].last == -1
            good = Reply(0, {"adapter": {"a": torch.ones(1)}}, 4, 2, {"loss": 1.0})
            return {0: good, 1: Reply(7, {}, 3, 1), 3: Reply(3, problem="out of disk")}

    fleet = RemoteFleet(Given(), "ab" * 8, "", 12.0)
    info = RoundInfo(0, 3, 5, (0, 1, 2, 3), 0)
    updates = fleet.train(info, {c: {} for c in info.sampled})
    assert [(u.client, u.examples, u.problem) for u in updates] == [
        (0, 4, ""), (1, 0, "answered as client 7"), (2, 0, "no answer within 12 s"), (3, 0, "out of disk")
    ]  # fmt: skip


def test_clients_are_told_the_last_round_that_counted() -> None:
    told: list[dict[int, int]] = []

    class Given:
        def exchange(self, jobs: Any, timeout: float) -> dict[int, Reply]:
            told.append({client: job.last for client, job in jobs.items()})
            return {}

    fleet = RemoteFleet(Given(), "ab" * 8, "", 1.0, {0: 4})
    for number, refused in ((5, [1]), (6, []), (7, [0, 1])):
        fleet.train(RoundInfo(number, 9, 3, (0, 1), 0), {0: {}, 1: {}})
        fleet.forget(number, refused)
    fleet.train(RoundInfo(8, 9, 3, (0, 2), 0), {0: {}, 2: {}})
    assert told == [{0: 4, 1: -1}, {0: 5, 1: -1}, {0: 6, 1: 6}, {0: 6, 2: -1}]


# Counts


def test_a_manifest_of_counts_has_those_counts() -> None:
    about = {0: {"samples": 5, "image": 3, "text": 4}, 1: {"samples": 2, "image": 2, "text": 0}}
    made = manifest_of(about, ("a", "b", "c"))
    assert made.counts().tolist() == [[5, 3, 4], [2, 2, 0], [0, 0, 0]]
    assert [sorted(h.visible) for h in made.of_client(0)].count(["image", "text"]) == 2, "3 + 4 − 5"


@pytest.mark.parametrize("counts", [(5, 2, 2), (5, 6, 0), (-1, 0, 0), (2.0, 2, 0), (True, 1, 1), (None, 1, 1)])
def test_counts_that_cannot_be_are_refused(counts: tuple[object, ...]) -> None:
    with pytest.raises(ConfigError, match="site 'a' says"):
        manifest_of({0: dict(zip(("samples", "image", "text"), counts, strict=True))}, ("a",))
