"""What is put before the model, and that it grows with the clients that take part and not with all there are."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from commands import call, run
from fedmllm.algorithms import algorithms
from fedmllm.config import TrainTable, read, validate
from fedmllm.data.dealing import draw
from fedmllm.data.manifest import Holding, Manifest
from fedmllm.data.partitions import partitions
from fedmllm.data.samples import Modality, Sample
from fedmllm.data.scenarios import scenarios
from fedmllm.data.summary import client_rows
from fedmllm.experiment.parts import build, with_defaults
from fedmllm.federation import FederationPlan, federate, participants, sample_clients
from fedmllm.models.encoded import Encoded
from fedmllm.models.mllm import MLLM
from fedmllm.runs.client_data import ClientData
from fedmllm.runs.kinds import execute
from fedmllm.runs.session import Session
from fedmllm.storage.run_dir import RunDir
from helpers import FakeFleet, lora_adapter, quick, sample

Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


MANY = ["--set", "partition.clients=12", "--set", "scenario.name=aligned", "--set", "partition.name=iid"]


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[Holding]:
    """All that a session encoded for clients, in order."""
    found: list[Holding] = []
    encode = Session.encode

    def watched(self: Session, holdings: Sequence[Holding]) -> list[Encoded]:
        found.extend(holdings)
        return encode(self, holdings)

    monkeypatch.setattr(Session, "encode", watched)
    return found


# Who is encoded


@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold", "fedsa-lora"])
def test_a_run_encodes_the_clients_that_take_part_and_no_others(
    write_experiment: Write, encoded: list[Holding], algorithm: str
) -> None:
    result = run("run", write_experiment(rounds=2), *MANY, "--set", f"algorithm.name={algorithm}", "--out", "a")
    sampled = {client for record in RunDir(Path("a")).rounds() for client in record["sampled"]}
    assert {h.client for h in encoded} == sampled
    assert 2 <= len(sampled) <= 4
    assert len({h.sample_id for h in encoded}) == len(encoded), "and each of their samples once"
    assert [row["client"] for row in result["per_client"]] == list(range(12))
    assert [row["rounds"] > 0 for row in result["per_client"]] == [client in sampled for client in range(12)]


def test_clients_alone_are_encoded_where_they_are_tested(write_experiment: Write, encoded: list[Holding]) -> None:
    result = run("baseline", "local", write_experiment(rounds=1), *MANY, "--set", "eval.clients=3")
    tested = {row["client"] for row in result["per_client"] if "metrics" in row}
    assert len(tested) == 3
    assert {h.client for h in encoded} == tested


@pytest.mark.parametrize(("kind", "samples"), [("zero-shot", 0), ("centralised", 30)])
def test_the_other_kinds_encode_nothing_or_everything(
    write_experiment: Write, encoded: list[Holding], kind: str, samples: int
) -> None:
    run("baseline", kind, write_experiment(rounds=1), *MANY)
    assert len(encoded) == samples


def test_one_session_serves_several_runs_and_encodes_a_client_once(write_experiment: Write, encoded: list[Holding]) -> None:
    file = write_experiment(rounds=2)
    parts = build(validate(read(file)))
    data = parts.prepare()
    shared = Session(parts, data)
    kinds: list[Any] = ["zero-shot", "federated", "local", "centralised"]
    for kind in kinds:
        together = execute(kind, shared, RunDir(Path(f"{kind}-together")))
        alone = execute(kind, Session(parts, data), RunDir(Path(f"{kind}-alone")))
        for key in ("metrics", "per_client", "adapter_sha256"):
            assert together[key] == alone[key], (kind, key)
    # By the shared session: every client and the pool; by the others: local's, the pool, and federated's.
    (federated,) = [{c for r in RunDir(Path("federated-alone")).rounds() for c in r["sampled"]}]
    assert len(encoded) == 30 + 30 + 30 + 30 + sum(data.manifest.sizes()[client] for client in federated)


def test_clients_are_a_mapping_that_knows_who_there_is_without_encoding() -> None:
    asked: list[int] = []

    def encode(holdings: Sequence[Holding]) -> list[Encoded]:
        asked.extend({h.client for h in holdings})
        return []

    clients = ClientData(Manifest.of((Holding(f"s{i}", i, frozenset()) for i in range(4)), 5), encode)
    assert list(clients) == [0, 1, 2, 3, 4]
    assert len(clients) == 5
    assert 4 in clients
    assert 5 not in clients
    assert "0" not in clients
    assert asked == []
    assert clients[2] is clients[2]
    assert asked == [2]
    with pytest.raises(KeyError):
        clients[-1]


# Whose prompts are too long


def lengthened(dataset: Path, sample_id: str) -> Path:
    """The data set with one sample of very many words."""
    folder = Path("long").resolve()
    shutil.copytree(dataset, folder)
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    for line in lines:
        if line["id"] == sample_id:
            line["question"] = "is it red? " * 500
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "train.jsonl"


@pytest.mark.parametrize("takes_part", [True, False])
def test_a_prompt_that_is_too_long_is_refused_before_anything_is_written(
    write_experiment: Write, dataset: Path, takes_part: bool
) -> None:
    file = write_experiment(rounds=1)
    raw = read(file)
    raw |= {"partition": {"name": "iid", "clients": 12}, "scenario": {"name": "aligned"}}
    config = with_defaults(validate(raw))
    manifest = build(config).prepare().manifest
    sampled = participants(FederationPlan.of(config.train, range(12), config.seed))
    client = next(c for c in range(12) if (c in sampled) == takes_part)
    data = lengthened(dataset, manifest.of_client(client)[0].sample_id)
    arguments = [file, *MANY, "--set", f"task.train={data}"]
    checked, done = call("check", *arguments), call("run", *arguments, "--out", "a")
    assert checked.exit_code == 2
    assert "more than train.max_length = 1200" in checked.stderr
    assert done.exit_code == (2 if takes_part else 0)
    assert ("more than train.max_length = 1200" in done.stderr) == takes_part
    assert Path("a").exists() != takes_part


# Whose pictures are put through the vision tower


@pytest.mark.parametrize(("clients", "all_of_them"), [(12, False), (3, True)])
def test_pictures_of_the_others_are_made_where_they_are_few(
    write_experiment: Write, monkeypatch: pytest.MonkeyPatch, clients: int, all_of_them: bool
) -> None:
    """With half of the samples or more, the set of pictures does not depend on the seed that chose the clients, whose own
    pictures are met as their samples are encoded."""
    met: list[object] = []
    meet = MLLM.register_pictures
    monkeypatch.setattr(MLLM, "register_pictures", lambda self, images: meet(self, met.extend(found := list(images)) or found))
    run("run", write_experiment(rounds=1), *MANY, "--set", f"partition.clients={clients}")
    assert len(met) == (8 if all_of_them else 0), "of three clients with eight pictures each, one does not take part"


# What is known of the clients


@quick
@given(
    rows=st.lists(st.tuples(st.integers(0, 6), st.sets(st.sampled_from(["image", "text"]))), max_size=30),
)
def test_client_rows_are_as_their_twin_counts_them(rows: list[tuple[int, set[Modality]]]) -> None:
    manifest = Manifest.of((Holding(f"s{i}", client, frozenset(seen)) for i, (client, seen) in enumerate(rows)), 8)
    expected = []
    for client in range(8):
        held = manifest.of_client(client)
        image, text = (sum(m in h.visible for h in held) for m in ("image", "text"))
        gap = 1 - (image + text) / (2 * len(held)) if held else 1.0
        expected.append({"client": client, "samples": len(held), "image": image, "text": text, "gap": round(gap, 6)})
    assert client_rows(manifest) == expected


def test_participants_are_all_who_are_ever_sampled() -> None:
    plan = FederationPlan.of(TrainTable(rounds=5, clients_per_round=3), range(50), seed=2)
    assert participants(plan) == sorted({client for number in range(5) for client in sample_clients(plan, number)})
    assert participants(FederationPlan.of(TrainTable(rounds=2, clients_per_round=9), [4, 7], seed=0)) == [4, 7]


# Many clients


def drawn(samples: Sequence[Sample], clients: int, partition: str = "dirichlet") -> Manifest:
    return draw(samples, partitions.build(partition, {}), scenarios.build("hybrid", {"presence": 0.9}), clients, 1, seed=0)


def lines_run(work: Callable[[], object]) -> int:
    """Lines of Python that `work` runs, each turn of a comprehension among them."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("partition", partitions.names())
def test_the_work_of_setting_up_does_not_grow_with_clients_times_samples(partition: str) -> None:
    samples = [sample(f"{i:04d}", "image" if i % 3 else "both", label=str(i % 5), source=str(i % 7)) for i in range(4000)]

    def set_up(clients: int) -> None:
        manifest = drawn(samples, clients, partition)
        manifest.digest()
        client_rows(manifest)
        for client in range(0, clients, max(1, clients // 10)):
            manifest.of_client(client)

    few, many = lines_run(lambda: set_up(10)), lines_run(lambda: set_up(2000))
    assert many < 5 * few, "clients × samples would be eight million more"


def test_a_round_of_twenty_thousand_clients() -> None:
    """Nothing but the ten sampled clients of each of three rounds is looked at."""
    samples = [sample(f"{i:05d}", label=str(i % 50)) for i in range(40_000)]
    encoded: list[Holding] = []

    def encode(holdings: Sequence[Holding]) -> list[Encoded]:
        encoded.extend(holdings)
        return []

    clients = ClientData(drawn(samples, 20_000), encode)
    plan = FederationPlan.of(TrainTable(rounds=3, clients_per_round=10), range(20_000), seed=1)
    for client in participants(plan):
        clients[client]
    fleets = [FakeFleet(algorithms.build("scaffold", {})) for _ in range(2)]
    plans = [replace(plan, clients=range(20)), plan]
    few, many = (
        lines_run(lambda fleet=f, plan=p: list(federate(fleet.algorithm, fleet, plan, lora_adapter())))
        for f, p in zip(fleets, plans, strict=True)
    )
    assert many < 1.3 * few
    fleet = fleets[1]
    assert len(fleet.memory) == len({c for info, _ in fleet.seen for c in info.sampled}) == len(participants(plan))
    assert {h.client for h in encoded} == set(participants(plan))
    assert len(encoded) == sum(len(clients.manifest.of_client(client)) for client in participants(plan))
