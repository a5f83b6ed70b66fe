"""Flower as a fleet, on a grid without Flower's processes: the messages, the results, and what is refused."""

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
from fedmllm.progress import no_progress
from fedmllm.remote import clientapp
from fedmllm.remote.protocol import Job, JobKind, ProtocolError, Reply, parts_of, to_bytes
from fedmllm.remote.records import HEADER, RecordError, pack, unpack
from fedmllm.remote.serverapp import experiment_for_sites, load_experiment, manifest_of, run
from fedmllm.remote.worker import Worker
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
    groups = st.text("xyz_", min_size=1, max_size=3).filter(lambda name: name != HEADER)
    return draw(st.dictionaries(groups, st.dictionaries(names, tensors, max_size=3), max_size=3))


@quick
@given(states())
def test_a_state_survives_records_bit_for_bit(state: dict[str, dict[str, torch.Tensor]]) -> None:
    job = Job("train", "ab" * 8, "x = 1", 3, 2, (1, 3), {3: 4}, 0.1 + 0.2, 1, state)
    records = unpack(to_bytes(job))
    assert set(records.array_records) == {group for group, tensors in state.items() if tensors}
    received = Job.of(*parts_of(pack(records)))
    assert same(received.state, state)
    assert received.state.keys() == state.keys(), "groups without tensors are kept"
    assert received.header() == job.header()
    assert received.lr == 0.1 + 0.2, "exactly"


def test_numbers_survive_exactly() -> None:
    groups = {"n": {"big": torch.tensor(2**62 + 1), "tiny": torch.tensor(1e-45), "nan": torch.tensor(math.nan)}}
    reply = Reply(2, groups, 2**53 + 1, 7, {"loss": 1 / 3}, about={"samples": 12})
    received = Reply.of(*parts_of(pack(unpack(to_bytes(reply)))))
    assert (received.client, received.examples, received.steps, received.metrics) == (2, 2**53 + 1, 7, {"loss": 1 / 3})
    assert int(received.groups["n"]["big"]) == 2**62 + 1
    assert float(received.groups["n"]["tiny"]) > 0
    assert received.groups["n"]["nan"].isnan()


def test_bfloat16_cannot_be_sent() -> None:
    with pytest.raises(RecordError, match="cannot be created"):
        unpack(to_bytes(Reply(0, {"adapter": {"a": torch.ones(2, dtype=torch.bfloat16)}})))


def records(head: object = "{}", **others: Any) -> RecordDict:
    return RecordDict({HEADER: ConfigRecord({"head": head}), **others})


@pytest.mark.parametrize(
    "malformed",
    [
        RecordDict(),
        RecordDict({"other": ConfigRecord({"head": "{}"})}),
        records(head=3),
        records(other=MetricRecord({"x": 1.0})),
        records(other=ConfigRecord({"x": "y"})),
        records(adapter=ArrayRecord({"a": Array("float32", (2,), "numpy.ndarray", b"nonsense")})),
        records(adapter=ArrayRecord({"a": Array("float32", (2,), "pickle", b"cos\nsystem\n")})),
    ],
)
def test_other_records_are_refused(malformed: RecordDict) -> None:
    with pytest.raises(RecordError):
        pack(malformed)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ("not json", "not JSON"),
        ("[]", "version"),
        ('{"version": 99}', "version 1"),
        ('{"version": 1}', "groups"),
        (Reply(1).header().replace('"examples": 0', '"examples": 0.5'), "not integers"),
        (Reply(1).header().replace('"examples": 0', '"examples": true'), "not integers"),
        (Reply(1).header().replace('"steps": 0', '"steps": "many"'), "not integers"),
        (Reply(1).header().replace('"groups": []', '"groups": 3'), "groups"),
        (Reply(1).header().replace('"metrics": {}', '"metrics": {"loss": "low"}'), "not a reply"),
        (Reply(1).header().replace('"about": {}', '"about": {}, "samples": []'), "not a reply"),
    ],
)
def test_malformed_replies_are_refused(header: str, reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        Reply.of(header, {})


# Whole runs


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDMLLM_CACHE", str(tmp_path / "cache"))
    clientapp.local_worker.cache_clear()
    yield
    clientapp.local_worker.cache_clear()


def settings(file: Path, out: str = "out", **changes: Any) -> dict[str, Any]:
    return {"experiment": str(file), "out": out, "resume": False, "overrides": "", "outcome": "", **changes}


def make_grid(clients: int = 4, **options: Any) -> DirectGrid:
    return DirectGrid(clientapp.app, {100 + client: {"partition-id": client} for client in range(clients)}, **options)


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
def test_a_run_over_flower_equals_the_run_in_one_process(write_experiment: Write, extra: str) -> None:
    """With cohorts of one, as each site trains: larger cohorts round differently, which AdamW can amplify."""
    single = command("run", write_experiment(extra), "--out", "single", "--set", "train.cohort=1")
    flower = run(make_grid(), settings(write_experiment(extra + FLEET)), no_progress)
    assert close(adapter("single"), adapter("out"))
    for key in ("metrics", "per_client", "rounds", "bytes_up", "bytes_down", "manifest_digest", "refused_updates"):
        assert flower[key] == single[key], key
    losses = [[record["loss"] for record in RunDir(Path(folder)).rounds()] for folder in ("single", "out")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_a_run_with_hidden_updates_gives_the_same_result(write_experiment: Write) -> None:
    """Up to the rounding of the fixed-point encoding. A round has four exchanges, and only masked bytes come back."""
    extra, grid = '[secure]\nname = "pairwise"\n', make_grid()
    single = command("run", write_experiment(""), "--out", "single", "--set", "train.cohort=1")
    secure = run(grid, settings(write_experiment(extra + FLEET)), no_progress)
    plain, hidden = adapter("single"), adapter("out")
    assert all(float((plain[name] - hidden[name]).abs().max()) < 1e-4 for name in plain)
    assert secure["rounds"] == single["rounds"]
    assert ("describe", "personal", *PHASES) == clientapp.QUERIES
    kinds = {message.metadata.message_type for message in grid.sent}
    assert kinds == {"query.describe", *(f"query.{phase}" for phase in PHASES)}
    for message in grid.received:
        header = json.loads(str(message.content.config_records[HEADER]["head"]))
        assert (header["examples"], header["steps"], header["metrics"], header["problem"]) == (0, 0, {}, "")
        dtypes = {array.numpy().dtype.name for arrays in message.content.array_records.values() for array in arrays.values()}
        assert dtypes <= {"uint8"}


def test_a_secure_round_tolerates_a_lost_node(write_experiment: Write) -> None:
    lost: list[int] = []

    def lose(message: Message) -> bool:
        if message.metadata.message_type == "query.masked" and not lost:
            lost.append(message.metadata.dst_node_id)
        return message.metadata.message_type == "query.masked" and message.metadata.dst_node_id in lost

    overrides = "train.clients_per_round=3; train.min_updates=1; train.rounds=2"
    grid = make_grid(lose=lose)
    file = write_experiment('[secure]\nname = "pairwise"\n' + FLEET.replace("60.0", "4.0"))
    run(grid, settings(file, overrides=overrides), no_progress)
    records = RunDir(Path("out")).rounds()
    assert {refusal["client"] for r in records for refusal in r["refused"]} == {lost[0] - 100}
    assert all(len(r["sampled"]) - len(r["refused"]) >= 2 for r in records)


def test_a_personalised_algorithm_requests_the_clients_own_adapters(write_experiment: Write) -> None:
    extra = '[algorithm]\nname = "fedsa-lora"\n'
    single = command("run", write_experiment(extra), "--out", "single")
    flower = run(make_grid(), settings(write_experiment(extra + FLEET)), no_progress)
    assert flower["metrics"] == single["metrics"]
    assert [row["metrics"] for row in flower["per_client"]] == [row["metrics"] for row in single["per_client"]]


def test_the_result_counts_the_bytes_of_the_messages(write_experiment: Write) -> None:
    grid = make_grid()
    result = run(grid, settings(write_experiment('[algorithm]\nname = "scaffold"\n' + FLEET)), no_progress)

    def count_bytes(messages: list[Message]) -> dict[str, int]:
        total: dict[str, int] = {}
        for message in messages:
            if message.metadata.message_type == "train":
                for group, arrays in message.content.array_records.items():
                    total[group] = total.get(group, 0) + sum(array.numpy().nbytes for array in arrays.values())
        return total

    assert result["bytes_down"] == count_bytes(grid.sent)
    assert result["bytes_up"] == count_bytes(grid.received)


def test_no_sample_and_no_text_is_sent(write_experiment: Write, dataset: Path) -> None:
    grid = make_grid()
    run(grid, settings(write_experiment(FLEET)), no_progress)
    secrets = {
        line[key]
        for line in map(json.loads, (dataset / "train.jsonl").read_text().splitlines())
        for key in ("id", "text")
        if key in line
    }
    assert len(secrets) > 20
    for message in grid.received:
        content = pack(message.content)
        assert not [secret for secret in secrets if secret.encode() in content]
        header = json.loads(str(message.content.config_records[HEADER]["head"]))
        # Everything that a site ever sends, key by key. Before adding a key, consider what it reveals.
        assert header.keys() == {"client", "examples", "steps", "problem", "metrics", "about", "groups", "version"}
        assert header["metrics"].keys() <= {"loss", "padding"}
        assert header["about"].keys() <= {"samples", "image", "text", "skipped", "fedmllm", "adapter"}
        assert set(message.content.array_records) <= {"adapter"}
        assert {a.dtype for arrays in message.content.array_records.values() for a in arrays.values()} <= {"float32"}


def test_an_error_at_a_site_names_its_place_and_quotes_no_data(
    write_experiment: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, file = make_grid(), write_experiment(FLEET)

    def broken(*_: object) -> None:
        raise RuntimeError("patient 17: a red thing")

    monkeypatch.setattr("fedmllm.remote.site.InProcessFleet.train", broken)
    with pytest.raises(TooFewUpdates, match=r"RuntimeError at the site \(test_flower\.py, line \d+\)") as failed:
        run(grid, settings(file), no_progress)
    assert "patient" not in str(failed.value)
    assert not [m for m in grid.received if b"patient" in pack(m.content)]


def test_an_interrupted_run_ends_with_the_same_adapter(write_experiment: Write) -> None:
    file = write_experiment('[algorithm]\nname = "scaffold"\n' + FLEET, rounds=4)
    run(make_grid(), settings(file, "whole"), no_progress)
    clientapp.local_worker.cache_clear()
    grid = make_grid()
    trained_in_vain: list[int] = []

    def is_lost(message: Message) -> bool:
        # From round 2 on no answer arrives, although all clients train in round 2 and save their state.
        return message.metadata.message_type == "train" and int(message.metadata.group_id) >= 2

    def losing_app(message: Message, context: Context) -> Message:
        reply = clientapp.app(message, context)
        if is_lost(message):
            trained_in_vain.append(int(message.metadata.group_id))
            return Message(RecordDict(), reply_to=message)
        return reply

    grid.app = losing_app
    with pytest.raises(TooFewUpdates, match="round 2"):
        run(grid, settings(file), no_progress)
    assert trained_in_vain, "their saved state of round 2 must not count"
    clientapp.local_worker.cache_clear()
    run(make_grid(), settings(file, resume=True), no_progress)
    assert close(adapter("out"), adapter("whole"))
    with pytest.raises(RunError, match="is not empty"):
        run(make_grid(), settings(file), no_progress)


def test_a_client_that_sends_nan_is_refused(write_experiment: Write) -> None:
    grid = make_grid()

    def nan_app(message: Message, context: Context) -> Message:
        reply = clientapp.app(message, context)
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == 1:
            arrays = reply.content.array_records["adapter"]
            name = min(arrays)
            arrays[name] = Array(np.full_like(arrays[name].numpy(), np.nan))
            reply.content["adapter"] = arrays
        return reply

    grid.app = nan_app
    run(grid, settings(write_experiment(FLEET), overrides="train.clients_per_round=4; train.rounds=2"), no_progress)
    for record in RunDir(Path("out")).rounds():
        assert [(r["client"], r["why"].partition(" in ")[0]) for r in record["refused"]] == [(1, "NaN or infinity")]


def test_a_client_discards_a_round_that_did_not_count(write_experiment: Write, tmp_path: Path) -> None:
    """After a round whose update was refused, its own adapter is that of the round before."""
    text = experiment_for_sites(load_experiment(write_experiment('[algorithm]\nname = "fedsa-lora"\n' + FLEET), []))
    worker = Worker(tmp_path / "clients")
    job = Job("describe", "ab" * 8, text, 0, sampled=(0,), lr=0.01)
    assert not worker.answer([job])[0].problem
    experiment = worker.experiment(text)
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


# Counts


def test_a_manifest_from_counts_has_these_counts() -> None:
    about = {0: {"samples": 5, "image": 3, "text": 4}, 1: {"samples": 2, "image": 2, "text": 0}}
    manifest = manifest_of(about, ("a", "b", "c"))
    assert manifest.counts().tolist() == [[5, 3, 4], [2, 2, 0], [0, 0, 0]]
    assert [sorted(h.visible) for h in manifest.of_client(0)].count(["image", "text"]) == 2, "3 + 4 − 5"


@pytest.mark.parametrize("counts", [(5, 2, 2), (5, 6, 0), (-1, 0, 0), (2.0, 2, 0), (True, 1, 1), (None, 1, 1)])
def test_impossible_counts_are_refused(counts: tuple[object, ...]) -> None:
    with pytest.raises(ConfigError, match="site 'a' reports"):
        manifest_of({0: dict(zip(("samples", "image", "text"), counts, strict=True))}, ("a",))
