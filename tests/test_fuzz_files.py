"""Every reader of a file or a message takes it, or refuses it in one short sentence: no other error, no hang, no changed file.

`make fuzz` tries more cases, with another seed each time.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from PIL import Image

import made_files as made
from fedmllm import api, config
from fedmllm.data import manifest as manifests
from fedmllm.data.loading import read_split, usable_samples
from fedmllm.data.manifest import Holding, Manifest
from fedmllm.data.tasks.jsonl import jsonl
from fedmllm.errors import UserError, printable
from fedmllm.experiment.parts import build, options_of
from fedmllm.experiment.sweep import plan_sweep
from fedmllm.fleets.memory import ClientMemory
from fedmllm.models.adapter import read_adapter
from fedmllm.remote import keys
from fedmllm.remote.files import FederationFile, SiteFile
from fedmllm.remote.protocol import Job, ProtocolError, Reply, counts_of, parts_of, to_bytes
from fedmllm.remote.records import pack, unpack
from fedmllm.remote.wire import NoAnswer, receive
from fedmllm.report import hypothesis_file
from fedmllm.report.grids import read_grid
from fedmllm.storage import archive
from fedmllm.storage.run_dir import RunDir, unfinished
from helpers import tensors
from made_checkpoints import made_run
from made_runs import make_sweep

LONGEST = 1_200
"""Characters of a message: a few lines on a terminal, whatever it quotes."""
REFUSALS = (UserError, ProtocolError, NoAnswer)


def check_sentence(message: str) -> None:
    assert message.isprintable(), "one line, with nothing in it that steers a terminal"
    assert 10 < len(message) <= LONGEST


def files_in(folder: Path) -> dict[str, tuple[int, int]]:
    """(size, time of the last change) of each file in the folder; folders have zeros."""
    found = {}
    for parent, folders, names in os.walk(folder):
        found |= {f"{parent}/{name}": (0, 0) for name in folders}
        for name in names:
            status = os.lstat(f"{parent}/{name}")
            found[f"{parent}/{name}"] = (status.st_size, status.st_mtime_ns)
    return found


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """The block takes what it reads or refuses it in one sentence, and leaves the folder as it was."""
    before = files_in(folder)
    try:
        yield
    except REFUSALS as error:
        check_sentence(str(error))
    assert files_in(folder) == before


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with valid files of every kind, which is the working folder and has the folder of temporary files."""
    folder = tmp_path_factory.mktemp("world")
    Image.new("RGB", (4, 4)).save(folder / "red.png")
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_bytes(made.as_lines(made.SAMPLES))
    (folder / "experiment.toml").write_bytes(made.as_toml({"task": made.TASKS[0]}))
    (folder / "good.toml").write_bytes(made.as_toml(made.SWEEP))
    (folder / "hypotheses.toml").write_bytes(made.as_toml(HYPOTHESES[0]))
    (folder / "server.toml").write_bytes(made.as_toml(made.FEDERATION))
    keys.make(folder / "keys", ["127.0.0.1"], ["north", "south"])
    run = made_run(folder / "run")
    run.finish({**made.RESULT, "rounds": 4})
    (folder / "tmp").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(tempfile, "tempdir", str(folder / "tmp"))
        yield folder


@dataclass(frozen=True)
class Kind:
    """A file of the world: what it holds in each case, and what reads it."""

    file: str
    cases: SearchStrategy[bytes]
    read: Callable[[Path], object]


def _experiment(path: Path) -> object:
    return build(api.read_experiment(path, [])[0])


PAIR = {"axis": "method", "higher": ["FedAvg"], "lower": ["zero-shot"]}
LOWEST = {"axis": "method", "cell": "FedAvgM", "others": ["FedAvg", "FedAdam"]}
CLAIM = {"name": "a", "claim": "b", "source": "c", "margin": {"made": 1.5}, "where": {"place": ["aligned", "β = 0.3"]}}
HYPOTHESES: list[dict[str, Any]] = [
    {
        "hypotheses": [
            CLAIM | {"above": PAIR},
            CLAIM | {"name": "d", "lowest": {"axis": "method", "cell": "a", "others": ["b"]}},
        ]
    },
    {"hypotheses": [CLAIM | {"trend": PAIR | {"over": "rate", "values": [{"β = 0.3": 0.3, "β = 0.5": 0.5}]}}]},
    {"hypotheses": [CLAIM | {"order": {"axis": "scenario", "ascending": [["cross", "hybrid"], ["aligned"]]}}]},
]


def _hypotheses(path: Path) -> object:
    """With the weights of each claim, at places that are named after the cells."""
    return [
        claim.contrast.contrasts({c: dict.fromkeys(claim.selected, c) for cells in claim.selected.values() for c in cells})
        for claim in hypothesis_file.read(path)
    ]


def _site(path: Path) -> object:
    return SiteFile(path).data


def _samples(path: Path) -> object:
    task = jsonl(train=str(path), test=str(path))
    return usable_samples(read_split(task, "train"), task, "train", "error")


def _archive(path: Path) -> object:
    with archive.opened([path]) as [folder]:
        return read_grid(folder)


def _reply(path: Path) -> object:
    content = path.read_bytes()
    pack(unpack(content))
    reply = Reply.of(*parts_of(content))
    check_sentence(f"its problem: {reply.problem}")
    return counts_of(reply.about)


def _frame(path: Path) -> object:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(path.read_bytes()[:50_000])
        theirs.shutdown(socket.SHUT_WR)
        return receive(ours)


def _part(path: Path) -> object:
    run = RunDir(path.parents[1])
    part = run.load_part(path.stem)
    assert part is not None or run.notes
    for note in run.notes:
        check_sentence(printable(note))
    return part


def _checkpoint(path: Path) -> object:
    run = RunDir(path.parent.parent if path.parent.name == "checkpoint" else path.parent)
    loaded = run.load_checkpoint()
    for note in run.notes:
        check_sentence(printable(note))
    return loaded, run.rounds()


def _meta(path: Path) -> object:
    notes: list[str] = []
    unfinished(path.parents[1], path.parent.name, "d", notes)
    return RunDir(path.parent).meta()


def _bytes(name: str, prepare: Callable[[Path], Any]) -> bytes:
    """What `prepare` writes to a file of this name."""
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        return (Path(folder) / name).read_bytes()


def _packed(folder: Path) -> None:
    axes = {"place": ["A"], "method": ["zero-shot", "FedAvg"]}
    make_sweep(folder / "made", axes, lambda cell, seed, pattern: 0.5, seeds=[0], kinds={"zero-shot": "zero-shot"})
    archive.pack(folder / "made", folder / "x.tar.xz")


REPLY = Reply(1, {"adapter": tensors(w=[1.0, 2.0]), "control": {}}, 4, 2, {"loss": 1.0, "padding": 0.0}, "",
              {"samples": 4, "image": 3, "text": 2, "skipped": 0, "versions": {"torch": "2"}})  # fmt: skip
JOB = Job("train", "ab" * 8, "seed = 1", 1, 2, (0, 1), {0: 2, 1: 4}, 0.01, 0, {"adapter": tensors(w=torch.ones(2, 2))}, {1: 3})


ROWS = {"sample_id": ["a", "b", "c"], "client": [0, 0, 1], "has_image": [True, False, True], "has_text": [True, True, False]}
HELD = [frozenset(("image", "text")), frozenset(("text",)), frozenset(("image",))]
DIGEST = Manifest.of(map(Holding, ROWS["sample_id"], ROWS["client"], HELD), 2).digest()
WHOLE = _bytes("run/manifest.parquet", lambda folder: made_run(folder / "run"))
MANIFEST = (ROWS, {"clients": "2", "digest": DIGEST}, WHOLE)


def state(name: str) -> SearchStrategy[bytes]:
    return made.of_safetensors(_bytes(f"run/{name}", lambda folder: made_run(folder / "run")))


KINDS: dict[str, Kind] = {
    "an experiment": Kind("other.toml", made.cases(made.experiments(), made.as_toml), _experiment),
    "a sweep": Kind("sweep.toml", made.cases(made.sweeps(), made.as_toml), plan_sweep),
    "hypotheses": Kind("hypotheses.toml", made.cases(st.sampled_from(HYPOTHESES), made.as_toml), _hypotheses),
    "the base of a sweep": Kind("experiment.toml", made.cases(made.experiments(), made.as_toml),
                                lambda path: plan_sweep(path.with_name("good.toml"))),
    "a site": Kind("site.toml", made.cases(st.sampled_from(made.SITES), made.as_toml), _site),
    "a federation": Kind("federation.toml", made.cases(st.just(made.FEDERATION), made.as_toml),
                         lambda path: FederationFile(path, []).experiment),
    "a federation's experiment": Kind("experiment.toml", made.cases(made.experiments(), made.as_toml),
                                      lambda path: FederationFile(path.with_name("server.toml"), ["train.rounds=2"])),
    "samples": Kind("train.jsonl", made.cases(st.just(made.SAMPLES), made.as_lines), _samples),
    "a manifest": Kind("run/manifest.parquet", made.of_parquet(*MANIFEST),
                       lambda path: manifests.read(path).counts()),
    "an archive": Kind("x.tar.xz", made.of_compressed(_bytes("x.tar.xz", _packed)), _archive),
    "a reply": Kind("message", made.messages(REPLY), _reply),
    "a job": Kind("message", made.messages(JOB), lambda path: Job.of(*parts_of(path.read_bytes()))),
    "a frame": Kind("message", made.damaged(len(to_bytes(REPLY)).to_bytes(8, "little") + to_bytes(REPLY)), _frame),
    "a checkpoint": Kind("run/checkpoint/server.safetensors", state("checkpoint/server.safetensors"), _checkpoint),
    "records": Kind("run/rounds.jsonl", made.cases(st.just(made.ROUNDS), made.as_lines), _checkpoint),
    "a client's memory": Kind("run/checkpoint/clients/client-0/round-0.safetensors",
                              state("checkpoint/clients/client-0/round-0.safetensors"),
                              lambda path: ClientMemory(path.parents[1]).load(0, 1)),
    "a part": Kind("run/checkpoint/client-0.json", made.cases(st.just({"predictions": made.PREDICTIONS, "rounds": made.ROUNDS}),
                                                              made.as_json), _part),
    "an adapter": Kind("run/adapter/adapter_model.safetensors", state("adapter/adapter_model.safetensors"),
                       lambda path: read_adapter(path.parent)),
    "meta": Kind("run/meta.json", made.cases(st.just(made.META), made.as_json), _meta),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_a_file_is_read_or_refused(kind: str, world: Path, data: st.DataObject) -> None:
    path = world / KINDS[kind].file
    with restored(path, data.draw(KINDS[kind].cases)), unchanged(world):
        KINDS[kind].read(path)


@contextmanager
def restored(path: Path, content: bytes) -> Iterator[None]:
    """In the block, the file has this content; afterwards the one that it had, if any."""
    before = path.read_bytes() if path.exists() else None
    path.write_bytes(content)
    try:
        yield
    finally:
        path.unlink() if before is None else path.write_bytes(before)


@given(text=made.settings_texts(), raw=made.experiments())
def test_a_setting_is_taken_or_refused(text: str, raw: dict[str, Any], world: Path) -> None:
    with unchanged(world):
        changed, notes = config.apply_settings(raw, [config.parse_override(text)], options_of)
        for note in notes:
            check_sentence(note)
        build(config.validate(changed))


@given(raw=made.experiments())
def test_what_is_valid_is_taken(raw: dict[str, Any]) -> None:
    """Otherwise the cases would test the first check alone."""
    build(config.validate(raw))
