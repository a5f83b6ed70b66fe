"""Flower without a network: what travels, who is who, and the same numbers as in one process."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

pytest.importorskip("flwr", reason='needs pip install "fedmllm[flower]"')

from flwr.app import ConfigRecord, Message, RecordDict
from safetensors.torch import load_file

from commands import call, run
from fedmllm import config as configs
from fedmllm.bench import Bench
from fedmllm.config import Experiment, TaskTable
from fedmllm.data.manifest import Holding, Manifest
from fedmllm.errors import RunError
from fedmllm.experiment import Data, load_split, with_defaults
from fedmllm.federation import TooFewUpdates
from fedmllm.remote import client_app
from fedmllm.remote.messages import HEAD, job_of, reply_of, to_record
from fedmllm.remote.protocol import Job, ProtocolError, Reply
from fedmllm.remote.server_app import run_over, site_manifest
from fedmllm.remote.site import Own, Worker
from fedmllm.remote.socket import listening, serve
from fedmllm.runs import Runner
from fedmllm.store import RunDir
from fedmllm.tensors import distance
from flower_grid import LocalGrid, Spoil, gone, identity, unpacked
from helpers import same

__all__ = ["identity"]
FLEET = '[fleet]\nname = "flower"\nwait = 0.2\nrejoin = 0.1\n'
PAUSE = 0.02


def nodes(count: int) -> dict[int, dict[str, Any]]:
    return {100 + number: {"partition-id": number, "num-partitions": count} for number in range(count)}


def loaded(path: Path, **options: Any) -> Experiment:
    raw = configs.read(path)
    raw["fleet"] |= options
    return with_defaults(configs.validate(raw))


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.fixture(autouse=True)
def _own_memory(identity: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(client_app, "cache_folder", lambda: tmp_path / "memory")
    client_app._resident.cache_clear()
    yield
    client_app._resident.cache_clear()


# Codecs


def test_a_job_and_a_reply_are_the_same_after_a_journey() -> None:
    state = {
        "adapter": {"w": torch.randn(2, 3), "b": torch.tensor(0.5)},
        "q": {"i": torch.tensor([-128, 127], dtype=torch.int8)},
    }
    state["empty"] = {}
    job = Job("train", "ab" * 8, "x = 1", 2, 3, (0, 2), {2: 4}, 0.1, 1, state)
    back = job_of(to_record(job))
    assert same(back.state, state)
    assert back.state.keys() == state.keys(), "a group without tensors travels by its name"
    assert replace(back, state={}) == replace(job, state={})
    reply = Reply(2, state, 5, 2, {"loss": 0.1 + 0.2}, "", {"samples": 3})
    again = reply_of(to_record(reply))
    assert same(again.groups, state)
    assert replace(again, groups={}) == replace(reply, groups={})


def test_large_integers_arrive_exactly() -> None:
    state = {"g": {"i": torch.tensor([2**53 + 1, -(2**62) - 1])}}
    assert same(reply_of(to_record(Reply(0, state))).groups, state)


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (RecordDict(), "no head"),
        (RecordDict({HEAD: ConfigRecord({"head": 3})}), "no head"),
        (RecordDict({HEAD: ConfigRecord({"head": "{"})}), "no JSON"),
        (RecordDict({HEAD: ConfigRecord({"head": "[]"})}), "version"),
        (RecordDict({HEAD: ConfigRecord({"head": '{"version": 1, "groups": [], "examples": "5"}'})}), "no integers"),
        (RecordDict({HEAD: ConfigRecord({"head": '{"version": 1, "groups": [], "code": 1}'})}), "not a reply"),
    ],
)
def test_what_is_no_reply_is_refused(record: RecordDict, why: str) -> None:
    with pytest.raises(ProtocolError, match=why):
        reply_of(record)


def test_an_array_whose_bytes_are_no_array_is_refused() -> None:
    record = to_record(Reply(0, {"g": {"w": torch.ones(3)}}))
    record.array_records["g"]["w"].data = b"not an array"
    with pytest.raises(ProtocolError, match="'w' of 'g' cannot be read"):
        reply_of(record)


# The same numbers


@pytest.mark.parametrize("more", ["", '[algorithm]\nname = "scaffold"\n', '[compression]\nname = "int8"\n'])
def test_over_flower_is_the_same_as_in_one_process(write_experiment: Callable[..., Path], tmp_path: Path, more: str) -> None:
    alone = run("run", write_experiment(more), "--out", tmp_path / "alone")
    grid = LocalGrid(nodes(4))
    result = run_over(grid, loaded(write_experiment(more + FLEET)), RunDir(tmp_path / "flower"), pause=PAUSE)
    assert distance(adapter_of(tmp_path / "alone"), adapter_of(tmp_path / "flower")) < 1e-6
    for key in ("bytes_up", "bytes_down", "per_client", "metrics", "manifest_digest", "refused_updates"):
        assert result[key] == alone[key], key


def test_the_bytes_of_the_result_are_those_of_the_arrays_that_travelled(
    write_experiment: Callable[..., Path], tmp_path: Path
) -> None:
    grid = LocalGrid(nodes(4))
    more = '[compression]\nname = "int8"\n'
    result = run_over(grid, loaded(write_experiment(more + FLEET)), RunDir(tmp_path / "flower"), pause=PAUSE)
    counted = {"up": 0, "down": 0}
    for way, _, wire in grid.sent:
        records = unpacked(wire).array_records.values()
        counted[way] += sum(array.numpy().nbytes for record in records for array in record.values())
    assert counted == {"up": sum(result["bytes_up"].values()), "down": sum(result["bytes_down"].values())}


# Who is who


def describing(config: Experiment, grid: LocalGrid, folder: Path) -> str:
    with pytest.raises(RunError) as refused:
        run_over(grid, config, RunDir(folder), pause=PAUSE)
    return str(refused.value)


def test_a_run_does_not_begin_without_all_its_clients(write_experiment: Callable[..., Path], tmp_path: Path) -> None:
    why = describing(loaded(write_experiment(FLEET)), LocalGrid(nodes(3)), tmp_path / "run")
    assert why == "1 of 4 clients were not there within fleet.wait = 0.2 s: client 3; start them, then run again."
    assert not (tmp_path / "run").exists()


def test_nodes_that_are_no_clients_are_named(write_experiment: Callable[..., Path], tmp_path: Path) -> None:
    grid = LocalGrid({1: {"partition-id": 0}, 2: {"partition-id": 0}, 3: {"partition-id": 9}, 4: {}})
    why = describing(loaded(write_experiment(FLEET)), grid, tmp_path / "run")
    assert "3 of 4 clients were not there" in why
    assert "two nodes say that they are client 0" in why
    assert "neither worker nor partition-id" in why
    assert "IndexError at the site" in why


# What goes wrong


def spoiling(when: Callable[[int], bool], how: Callable[[Message], Message | None], node: int = 101) -> Spoil:
    """`how` is applied to the answers of `node` to jobs of training, counted from 0, for which `when` says so."""
    seen = -1

    def spoil(who: int, reply: Message) -> Message | None:
        nonlocal seen
        if who != node or reply.metadata.message_type != "train":
            return reply
        seen += 1
        return how(reply) if when(seen) else reply

    return spoil


def with_nan(reply: Message) -> Message:
    whole = reply_of(reply.content)
    name = min(whole.groups["adapter"])
    spoilt = {**whole.groups["adapter"], name: torch.full_like(whole.groups["adapter"][name], float("nan"))}
    reply.content = to_record(replace(whole, groups={"adapter": spoilt}))
    return reply


def as_another(reply: Message) -> Message:
    reply.content = to_record(replace(reply_of(reply.content), client=0))
    return reply


def unreadable(reply: Message) -> Message:
    reply.content = RecordDict()
    return reply


@pytest.mark.parametrize(
    ("how", "why"),
    [
        (with_nan, "NaN or infinity"),
        (as_another, "answered as client 0"),
        (unreadable, "sent what cannot be read"),
        (lambda reply: None, "no answer within"),
        (gone, "went away (Node unavailable)"),
    ],
)
def test_a_round_goes_on_without_a_client_that_fails(
    write_experiment: Callable[..., Path], tmp_path: Path, how: Callable[[Message], Message | None], why: str
) -> None:
    path = write_experiment(FLEET)
    config = loaded(path)
    config = config.model_copy(update={"train": config.train.model_copy(update={"clients_per_round": 4})})
    grid = LocalGrid(nodes(4), spoil=spoiling(lambda number: True, how))
    directory = RunDir(tmp_path / "run")
    result = run_over(grid, config, directory, pause=PAUSE)
    assert result["refused_updates"] == 3
    for record in directory.rounds():
        assert [r["client"] for r in record["refused"]] == [1]
        assert why in record["refused"][0]["why"]


def test_a_node_that_went_away_is_asked_once_more(write_experiment: Callable[..., Path], tmp_path: Path) -> None:
    config = loaded(write_experiment(FLEET + '[algorithm]\nname = "scaffold"\n'))
    config = config.model_copy(update={"train": config.train.model_copy(update={"clients_per_round": 4})})
    results = [
        run_over(LocalGrid(nodes(4), spoil=spoil), config, RunDir(tmp_path / name), pause=PAUSE)
        for name, spoil in {"a": spoiling(lambda n: False, gone), "b": spoiling(lambda n: n == 1, gone)}.items()
    ]
    assert results[1]["refused_updates"] == 0
    assert distance(adapter_of(tmp_path / "a"), adapter_of(tmp_path / "b")) < 1e-6


def test_too_few_answers_end_a_run_that_goes_on_as_if_nothing_had_been(
    write_experiment: Callable[..., Path], tmp_path: Path
) -> None:
    config = loaded(write_experiment(FLEET + '[algorithm]\nname = "scaffold"\n'))
    train = config.train.model_copy(update={"clients_per_round": 4, "min_updates": 4})
    config = config.model_copy(update={"train": train})
    run_over(LocalGrid(nodes(4)), config, RunDir(tmp_path / "whole"), pause=PAUSE)
    grid = LocalGrid(nodes(4), spoil=spoiling(lambda n: n == 1, lambda reply: None))
    with pytest.raises(TooFewUpdates, match=r"round 1: 3 usable updates, train\.min_updates = 4 \(client 1: no answer"):
        run_over(grid, config, RunDir(tmp_path / "cut"), pause=PAUSE)
    client_app._resident.cache_clear()
    result = run_over(LocalGrid(nodes(4)), config, RunDir(tmp_path / "cut"), pause=PAUSE)
    assert result["rounds"] == 3
    assert distance(adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "cut")) < 1e-6


def test_fedmllm_run_does_not_start_it(write_experiment: Callable[..., Path]) -> None:
    done = call("run", write_experiment(FLEET))
    assert done.exit_code == 2
    assert "fedmllm server" in done.output


# Sites with data of their own

SEES = {"north": {"image"}, "south": {"text"}, "west": {"image", "text"}}


@contextmanager
def sites(dataset: Path, folder: Path) -> Iterator[dict[int, dict[str, Any]]]:
    """Three workers behind sockets, each with a third of the lines; the node configurations that lead to them."""
    lines = (dataset / "train.jsonl").read_text().splitlines()
    folder.mkdir(mode=0o700)
    found, open_ones = {}, []
    for number, (name, sees) in enumerate(SEES.items()):
        data = dataset / f"{name}.jsonl"
        data.write_text("\n".join(lines[number::3]) + "\n")
        task = TaskTable(name="jsonl", train=str(data), test=str(data))  # type: ignore[call-arg]
        worker = Worker(folder / name, Own(name, task, frozenset(sees), "cpu"))  # type: ignore[arg-type]
        context = listening(folder / f"{number}.sock")
        listener = context.__enter__()
        Thread(target=serve, args=(listener, worker), daemon=True).start()
        open_ones.append((context, listener))
        found[100 + number] = {"worker": str(folder / f"{number}.sock")}
    yield found
    for context, listener in open_ones:
        listener.shutdown(socket.SHUT_RDWR)
        context.__exit__(None, None, None)


def site_experiment(path: Path, dataset: Path) -> Experiment:
    raw = configs.read(path)
    raw["partition"] = {"name": "iid", "clients": 3}
    raw["train"]["clients_per_round"] = 3
    raw["task"] = {"name": "jsonl", "train": "not here", "test": str(dataset / "test.jsonl")}
    raw["fleet"]["sites"] = list(SEES)
    return with_defaults(configs.validate(raw))


def in_process_twin(config: Experiment, dataset: Path, folder: Path) -> None:
    """The same federation in one process: the sites' samples, with what each sees of them."""
    table = TaskTable(name="jsonl", train=str(dataset / "train.jsonl"), test=str(dataset / "test.jsonl"))  # type: ignore[call-arg]
    task, samples, _ = load_split(table, "train")
    order = [json.loads(line)["id"] for line in (dataset / "train.jsonl").read_text().splitlines()]
    sees = list(SEES.values())
    held = (Holding(s.id, order.index(s.id) % 3, s.modalities & sees[order.index(s.id) % 3]) for s in samples)
    manifest = Manifest.of((h for h in held if h.visible), 3)
    config = config.model_copy(update={"fleet": configs.Named(name="in-process"), "task": table})
    data = Data(task, samples, load_split(table, "test")[1], 0, manifest)
    Runner(config, data, Bench(config, data), RunDir(folder), "federated").execute()


def test_sites_with_different_modalities_make_what_one_process_makes(
    write_experiment: Callable[..., Path], dataset: Path, tmp_path: Path
) -> None:
    config = site_experiment(write_experiment(FLEET), dataset)
    with sites(dataset, tmp_path / "s") as found:
        grid = LocalGrid(found, names=dict(zip(found, SEES, strict=True)))
        result = run_over(grid, config, RunDir(tmp_path / "flower"), pause=PAUSE)
    in_process_twin(config, dataset, tmp_path / "alone")
    assert distance(adapter_of(tmp_path / "alone"), adapter_of(tmp_path / "flower")) < 1e-6
    assert [(row["site"], row["image"] > 0, row["text"] > 0) for row in result["per_client"]] == [
        ("north", True, False), ("south", False, True), ("west", True, True)
    ]  # fmt: skip


def test_nothing_of_the_data_is_in_any_message(write_experiment: Callable[..., Path], dataset: Path, tmp_path: Path) -> None:
    """Every byte that a site sends is looked through for its texts, questions, answers, ids and picture names."""
    config = site_experiment(write_experiment(FLEET), dataset)
    with sites(dataset, tmp_path / "s") as found:
        grid = LocalGrid(found)
        run_over(grid, config, RunDir(tmp_path / "flower"), pause=PAUSE)
        (dataset / "south.jsonl").write_text('{"id": "secret-id", "answer": "secret"}\n')
        south = grid.nodes[101]
        other = config.model_copy(update={"seed": 5})  # so that the site reads its data again, which is bad now
        asked = LocalGrid({101: south})
        with pytest.raises(RunError):
            run_over(asked, other, RunDir(tmp_path / "bad"), pause=PAUSE)
    sent = [wire for way, _, wire in grid.sent + asked.sent if way == "up"]
    assert len(sent) > 3 * 4
    secrets = {"secret"}
    for line in (dataset / "train.jsonl").read_text().splitlines():
        sample = json.loads(line)
        secrets |= {sample["id"], sample["answer"], sample.get("text"), sample.get("question"), sample.get("image")}
    for secret in secrets - {None}:
        assert not any(str(secret).encode() in wire for wire in sent), secret


def test_a_site_under_anothers_name_is_refused(write_experiment: Callable[..., Path], dataset: Path, tmp_path: Path) -> None:
    config = site_experiment(write_experiment(FLEET), dataset)
    with sites(dataset, tmp_path / "s") as found:
        names = dict(zip(found, ["north", "west", "south"], strict=True))
        why = describing(config, LocalGrid(found, names=names), tmp_path / "run")
    assert "the node that was registered as 'south' says that it is 'west'" in why


def test_a_worker_that_is_not_there_is_a_problem_of_its_site(
    write_experiment: Callable[..., Path], dataset: Path, tmp_path: Path
) -> None:
    config = site_experiment(write_experiment(FLEET), dataset)
    with sites(dataset, tmp_path / "s") as found:
        found[101] = {"worker": str(tmp_path / "none.sock")}
        why = describing(config, LocalGrid(found), tmp_path / "run")
    assert "site 'south'" in why
    assert "the site's worker did not answer: no worker at" in why


def test_only_its_owner_may_connect_to_a_worker(tmp_path: Path) -> None:
    with listening(tmp_path / "w.sock"):
        assert (tmp_path / "w.sock").stat().st_mode & 0o777 == 0o600
    assert not (tmp_path / "w.sock").exists()


def test_counts_that_cannot_be_are_refused() -> None:
    assert site_manifest({0: {"samples": 3, "image": 2, "text": 2}}, ["a"]).counts().tolist() == [[3, 2, 2]]
    for wrong in ({"samples": 3, "image": 1, "text": 1}, {"samples": 3, "image": 4, "text": 0}, {"samples": -1}, {}):
        with pytest.raises(RunError, match="site 'a'"):
            site_manifest({0: wrong}, ["a"])
