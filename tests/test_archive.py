"""Archives of sweeps: reproducible bytes, the same reports as from the folder, continuation by `sweep`, and errors."""

from __future__ import annotations

import io
import json
import lzma
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from commands import call, run
from fedmllm.experiment import sweep
from fedmllm.experiment.sweep import Sweeper
from fedmllm.storage import archive
from fedmllm.storage.archive import opened, pack
from made_runs import make_run, make_sweep

AXES = {"setting": ["α = 5", "β = 0.3", "p < 1"], "method": ["zero-shot", "FedAvg", "Broken"]}
SHARES = {"zero-shot": 0.5, "FedAvg": 0.9, "Broken": 0.3}
BASE = Path(__file__).parents[1] / "experiments" / "quickstart.toml"


def hits(cell: Mapping[str, str], seed: int, pattern: str) -> float:
    return SHARES[cell["method"]] + (0.05 * seed if cell["method"] != "zero-shot" else 0)


def grid(folder: Path, missing: str = "") -> Path:
    """A made-up sweep with a file of every kind that a run writes."""
    make_sweep(folder, AXES, hits, kinds={"zero-shot": "zero-shot"}, missing=missing)
    for result in list(folder.glob("*/result.json")):
        run_folder = result.parent
        (folder / f"{run_folder.name}.toml").write_text('name = "made"\n')
        (run_folder / "meta.json").write_text("{}\n")
        (run_folder / "adapter").mkdir()
        (run_folder / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
        (run_folder / "manifest.parquet").write_bytes(b"samples")
        if run_folder.name.startswith("federated"):
            rounds = [
                {"round": i, "loss": 1.0, "bytes_up": {"adapter": 5}, "bytes_down": {"adapter": 5}}
                | {"metrics": {"both": {"accuracy": 0.4 + 0.1 * i}}}
                for i in range(2)
            ]
            (run_folder / "rounds.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rounds))
    return folder


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary folders; other processes use a different one."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    return tmp_path / "scratch"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sweep `runs/a folder` and its archive `grid.tar.xz`, of which each test gets a copy."""
    root = tmp_path_factory.mktemp("original")
    pack(grid(root / "runs" / "a folder"), root / "grid.tar.xz")
    return root


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original / "runs" / "a folder", tmp_path / "runs" / "a folder")


@pytest.fixture
def packed(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(original / "grid.tar.xz", tmp_path))


def members(file: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(file) as tar:
        return tar.getmembers()


def write(file: Path, contents: Mapping[str, bytes], link: str = "", special: bytes = b"") -> Path:
    """An archive that `pack` did not write."""
    with tarfile.open(file, "w:xz") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        if link:
            member = tarfile.TarInfo(link)
            member.type, member.linkname = tarfile.SYMTYPE, "sweep.json"
            tar.addfile(member)
        if special:
            member = tarfile.TarInfo("made/x")
            member.type = special
            tar.addfile(member)
    return file


# Contents


def test_it_contains_the_kept_files_and_nothing_about_the_machine(packed: Path, folder: Path) -> None:
    contents = members(packed)
    names = [m.name for m in contents]
    ids = sorted(p.parent.name for p in folder.glob("*/result.json"))
    trained = [i for i in ids if i.startswith("federated")]
    assert len(ids) == 1 + 2 * 3 * 2
    assert names == [
        "made/sweep.json", *(f"made/{i}.toml" for i in ids), *(f"made/{i}/result.json" for i in ids),
        *(f"made/{i}/meta.json" for i in ids), *(f"made/{i}/config.toml" for i in ids),
        *(f"made/{i}/rounds.jsonl" for i in trained), *(f"made/{i}/predictions.jsonl" for i in ids),
    ]  # fmt: skip
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in contents} == {(0, 0, 0, "", "", 0o644)}
    with opened([packed]) as [there]:
        for name in names:
            inner = Path(name).relative_to("made")
            assert (there / inner).read_bytes() == (folder / inner).read_bytes()


def test_the_same_folder_gives_the_same_bytes(packed: Path, folder: Path, tmp_path: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        os.utime(path, (1, 1))
        path.chmod(0o700)
    again = run("pack", folder, "--to", tmp_path / "deep" / "again.tar.xz")
    assert (tmp_path / "deep" / "again.tar.xz").read_bytes() == packed.read_bytes()
    assert again == {"file": str(tmp_path / "deep" / "again.tar.xz"), "runs": 13, "bytes": packed.stat().st_size}
    done = call("pack", folder, "--to", packed)
    assert done.stdout == f"{packed}: 13 complete runs in {packed.stat().st_size:,} bytes\n"
    assert [p.name for p in packed.parent.iterdir() if p.name.startswith(".")] == []


def test_incomplete_runs_are_left_out(tmp_path: Path) -> None:
    folder = grid(tmp_path / "grid", missing="Broken")
    result = next(folder.glob("federated-*/result.json"))
    result.unlink()
    assert pack(folder, tmp_path / "grid.tar.xz")[0] == 1 + 3 * 2 - 1
    assert not [m.name for m in members(tmp_path / "grid.tar.xz") if result.parent.name in Path(m.name).parts]


# Commands that read it


def test_the_report_equals_that_of_the_folder(packed: Path, folder: Path, scratch: Path, tmp_path: Path) -> None:
    for source, out in ((folder, "folder"), (packed, "archive")):
        done = call("report", source, "--out", tmp_path / out / "page.md")
        assert done.exit_code == 0, done.output
    pages = [{p.name: p.read_bytes() for p in (tmp_path / out).rglob("*.*")} for out in ("folder", "archive")]
    assert pages[0] == pages[1]
    assert set(pages[0]) == {"page.md", "made.svg"}
    assert b"### Rounds and bytes to" in pages[0]["page.md"]
    assert list(scratch.iterdir()) == [], "unpacked folders are removed at the end"


@pytest.mark.parametrize("options", [(), ("--baseline", "FedAvg"), ("--by-pattern",)], ids=" ".join)
def test_compare_shows_the_same(packed: Path, folder: Path, options: Sequence[str]) -> None:
    assert run("compare", packed, *options) == run("compare", folder, *options)
    shown = call("compare", packed, *options)
    assert shown.exit_code == 0
    assert shown.stdout == call("compare", folder, *options).stdout


def test_messages_name_the_archive(packed: Path, folder: Path, tmp_path: Path) -> None:
    (folder / "zero-shot" / "predictions.jsonl").unlink()
    pack(folder, tmp_path / "less.tar.xz")
    for arguments, sentence in [
        ((packed, "--baseline", "FedAvgg"), f"--baseline FedAvgg: {packed} has no cell of that name"),
        ((tmp_path / "less.tar.xz", "--baseline", "zero-shot"), f"error: {tmp_path}/less.tar.xz/zero-shot/predictions.jsonl"),
        ((packed, folder), f"note: {packed} is a sweep's folder, compare it alone; skipped"),
    ]:
        done = call("compare", *arguments)
        assert done.exit_code == 2
        assert sentence in done.stderr
        assert "/fedmllm-" not in done.stderr


class Maker:
    """Runs no process: every command writes a made-up run."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def run(self, command: Sequence[str], file: Path) -> tuple[int, str]:
        self.made.append(file.stem)
        make_run(file.with_suffix(""), {"both": 0.5})
        return 0, ""

    def stop(self) -> None:
        raise AssertionError


def test_a_sweep_continues_from_an_unpacked_archive(tmp_path: Path) -> None:
    methods = ", ".join(f'{{ name = "{name}", set = {{ "algorithm.name" = "{name}" }} }}' for name in ("fedavg", "fedyogi"))
    cells = f'{{ name = "zero-shot", kind = "zero-shot" }}, {methods}'
    file = tmp_path / "grid.toml"
    file.write_text(f'name = "grid"\nbase = "{BASE}"\nseeds = [0, 1]\n[[axes]]\nname = "method"\ncells = [{cells}]\n')

    def run_in(out: Path) -> list[str]:
        maker = Maker()
        rows = Sweeper(*sweep.plan_sweep(file), out, lambda done, total, text: None).run(1, maker)
        assert {row["state"] for row in rows} == {"complete"}
        return maker.made

    assert len(run_in(tmp_path / "first")) == 5
    lost = next((tmp_path / "first").glob("federated-*/result.json"))
    lost.unlink()
    assert pack(tmp_path / "first", tmp_path / "grid.tar.xz")[0] == 4
    with tarfile.open(tmp_path / "grid.tar.xz") as tar:
        tar.extractall(tmp_path / "runs", filter="data")
    rows = run("sweep", file, "--out", tmp_path / "runs" / "grid", "--dry-run")["cells"]
    assert {row["id"] for row in rows if row["state"] != "complete"} == {lost.parent.name}
    assert run_in(tmp_path / "runs" / "grid") == [lost.parent.name]
    assert run_in(tmp_path / "runs" / "grid") == []


# Errors


def index(*ids: str, name: str = "made") -> bytes:
    cells = [{"axes": {"m": i}, "seed": 0, "kind": "local", "id": i, "state": "complete"} for i in ids]
    return json.dumps({"schema": 1, "name": name, "axes": ["m"], "cells": cells}).encode()


def _huge_header(file: Path) -> None:
    with tarfile.open(file, "w:xz", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("made/sweep.json")
        member.pax_headers = {"comment": "a" * 2**22}
        tar.addfile(member)


def _cut(packed: Path, file: Path) -> None:
    file.write_bytes(packed.read_bytes()[:-200])


def _end(packed: Path, file: Path) -> None:
    file.write_bytes(packed.read_bytes()[:-16])


def _flipped(packed: Path, file: Path) -> None:
    """Flip a bit of the checksum: it is the last 8 bytes before the index, whose length is in the footer."""
    content = bytearray(packed.read_bytes())
    length = 4 * (int.from_bytes(content[-8:-4], "little") + 1)
    content[-12 - length - 8] ^= 1
    file.write_bytes(content)


BAD_ARCHIVES: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "not there": (lambda packed, file: None, "cannot be read"),
    "no archive": (lambda packed, file: file.write_text("hello"), "cannot be read"),
    "empty": (lambda packed, file: file.write_bytes(b""), "cannot be read"),
    "xz of something else": (lambda packed, file: file.write_bytes(lzma.compress(b"hello" * 999)), "cannot be read"),
    "truncated": (_cut, "cannot be read"),
    "without its end": (_end, "cannot be read"),
    "damaged": (_flipped, "cannot be read"),
    "a path out": (lambda packed, file: write(file, {"made/sweep.json": index(), "made/../../x": b""}), "leads out"),
    "an absolute path": (
        lambda packed, file: write(file, {"made/sweep.json": index(), "/tmp/x": b""}),
        "is not a sweep's archive",
    ),
    "a link": (lambda packed, file: write(file, {"made/sweep.json": index()}, link="made/x"), "'made/x' is a link"),
    "two folders": (lambda packed, file: write(file, {"a/sweep.json": index(), "b/sweep.json": index()}), "one folder with"),
    "no folder": (lambda packed, file: write(file, {"sweep.json": index()}), "one folder with sweep.json"),
    "no index": (lambda packed, file: write(file, {"made/x": b""}), "one folder with sweep.json"),
    "a folder in a run's": (lambda packed, file: write(file, {"made/sweep.json": index(), "made/a/b/c": b""}), "deeper than"),
    "a very deep folder": (
        lambda packed, file: write(file, {"made/sweep.json": index(), f"made/{'d/' * 1500}": b""}),
        "deeper than",
    ),
    "a device": (lambda packed, file: write(file, {"made/sweep.json": index()}, special=tarfile.CHRTYPE), "is a link"),
    "a pipe": (lambda packed, file: write(file, {"made/sweep.json": index()}, special=tarfile.FIFOTYPE), "is a link"),
    "more after its end": (
        lambda packed, file: file.write_bytes(packed.read_bytes() + lzma.compress(bytes(2**22))),
        "belong to none of its files",
    ),
    "a huge header": (lambda packed, file: _huge_header(file), "belong to none of its files"),
    "ids that lead out": (lambda packed, file: write(file, {"m/sweep.json": index("../../x")}), "'../../x' cannot be the name"),
    "a damaged index": (lambda packed, file: write(file, {"m/sweep.json": b"{}"}), "m.tar.xz/sweep.json cannot be read"),
    "no complete run": (
        lambda packed, file: write(file, {"m/sweep.json": index("x")}),
        "m.tar.xz has no axis, or no complete run",
    ),
}


@pytest.mark.parametrize("case", BAD_ARCHIVES)
def test_a_bad_archive_is_one_sentence_and_status_2(case: str, packed: Path, scratch: Path, tmp_path: Path) -> None:
    make, sentence = BAD_ARCHIVES[case]
    file = tmp_path / "m.tar.xz"
    make(packed, file)
    commands: list[tuple[object, ...]] = [("report", file, "--out", tmp_path / "out" / "page.md")]
    if case != "no complete run":  # compare shows the empty grid, as it does for a folder
        commands.append(("compare", file))
    for command in commands:
        done = call(*command)
        assert done.exit_code == 2
        assert sentence in done.stderr
        assert done.stderr.startswith(f"error: {file}")
        assert done.stderr.count("\n") == 1
        assert "/fedmllm-" not in done.stderr
        assert done.stdout == ""
    assert not (tmp_path / "out").exists()
    assert list(scratch.iterdir()) == []


def bomb(file: Path, members: int, size: int) -> Path:
    """An archive of a sweep whose folder also has this many files of zeros."""
    return write(file, {"made/sweep.json": index(), **{f"made/x/{i}": bytes(size) for i in range(members)}})


@pytest.mark.parametrize(("members", "size"), [(3, 2**20), (1, 2**21 + 1), (300, 0)])
def test_a_bomb_is_refused_before_it_is_unpacked(
    members: int, size: int, scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedmllm.storage.archive.MAX_BYTES", 2**21)
    monkeypatch.setattr("fedmllm.storage.archive.MAX_MEMBERS", 200)
    sizes: list[int] = []
    clean = tempfile.TemporaryDirectory.cleanup

    def measure(folder: tempfile.TemporaryDirectory[str]) -> None:
        sizes.append(sum(path.stat().st_size for path in Path(folder.name).rglob("*") if path.is_file()))
        clean(folder)

    monkeypatch.setattr(tempfile.TemporaryDirectory, "__exit__", lambda folder, *_: measure(folder))
    file = bomb(tmp_path / "m.tar.xz", members, size)
    assert file.stat().st_size < 20_000
    done = call("compare", file)
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: {file} unpacks to more than 200 members or 2,097,152 bytes")
    assert done.stderr.count("\n") == 1
    assert sizes[0] <= 2**21, "it stops while it unpacks"
    assert list(scratch.iterdir()) == []


def test_the_limits_leave_room_for_the_largest_grids(tmp_path: Path) -> None:
    assert (archive.MAX_MEMBERS, archive.MAX_BYTES) == (100_000, 2**30)
    with opened([bomb(tmp_path / "m.tar.xz", 300, 100)]) as [folder]:
        assert len(list((folder / "x").iterdir())) == 300


ROW = {"axes": {"m": "a"}, "seed": 0, "kind": "local", "id": "x"}
GOOD = {"schema": 1, "name": "made", "axes": ["m"], "cells": [ROW]}
BAD_INDEXES: dict[str, tuple[object, str]] = {
    "a list": ([], "dictionary"),
    "a number": (5, "dictionary"),
    "null": (None, "dictionary"),
    "a string": ("made", "dictionary"),
    "no name": ({k: v for k, v in GOOD.items() if k != "name"}, "name: Field required"),
    "no cells": ({k: v for k, v in GOOD.items() if k != "cells"}, "cells: Field required"),
    "a name that is none": (GOOD | {"name": 5}, "name: Input should be a valid string"),
    "a name that leads out": (GOOD | {"name": "../../x"}, "'../../x' cannot be the name of a folder"),
    "an absolute name": (GOOD | {"name": "/etc/x"}, "'/etc/x' cannot be the name of a folder"),
    "a name on Windows": (GOOD | {"name": "..\\x"}, "cannot be the name of a folder"),
    "a hidden name": (GOOD | {"name": ".ssh"}, "cannot be the name of a folder"),
    "an empty name": (GOOD | {"name": ""}, "cannot be the name of a folder"),
    "a name of control characters": (GOOD | {"name": "a\x1b[2J"}, "cannot be the name of a folder"),
    "a long name": (GOOD | {"name": "a" * 5000}, "cannot be the name of a folder"),
    "an id that leads out": (GOOD | {"cells": [ROW | {"id": "../x"}]}, "'../x' cannot be the name of a folder"),
    "the folder itself as id": (GOOD | {"cells": [ROW | {"id": "."}]}, "'.' cannot be the name of a folder"),
    "an id that is none": (GOOD | {"cells": [ROW | {"id": ["x"]}]}, "cells.0.id: Input should be a valid string"),
    "axes that are none": (GOOD | {"axes": "m"}, "axes: Input should be a valid list"),
    "a cell that is none": (GOOD | {"cells": ["x"]}, "cells.0: Input should be"),
    "a cell of other axes": (GOOD | {"cells": [ROW | {"axes": {"n": "a"}}]}, "other axes than the sweep"),
    "a value that is no text": (GOOD | {"cells": [ROW | {"axes": {"m": 5}}]}, "cells.0.axes.m: Input should be a valid string"),
    "an unknown kind": (GOOD | {"cells": [ROW | {"kind": "best"}]}, "cells.0.kind"),
    "a seed that is none": (GOOD | {"cells": [ROW | {"seed": "0"}]}, "cells.0.seed"),
    "a margin below zero": (GOOD | {"margin": -1.0}, "margin"),
    "deeply nested": ("[" * 100_000, "recursion"),
}


@pytest.mark.parametrize("case", BAD_INDEXES)
def test_an_index_of_another_shape_is_one_sentence(case: str, tmp_path: Path) -> None:
    content, sentence = BAD_INDEXES[case]
    folder = tmp_path / "grid"
    folder.mkdir()
    (folder / "sweep.json").write_text(str(content) if case == "deeply nested" else json.dumps(content))
    make_run(folder / "x", {"both": 0.5}, kind="local")
    packed = write(tmp_path / "m.tar.xz", {"made/sweep.json": (folder / "sweep.json").read_bytes()})
    for command in [
        ("compare", folder), ("compare", packed), ("report", folder, "--out", tmp_path / "out" / "page.md"),
        ("report", packed, "--out", tmp_path / "out" / "page.md"), ("pack", folder, "--to", tmp_path / "out" / "x.tar.xz"),
    ]:  # fmt: skip
        done = call(*command)
        assert done.exit_code == 2
        assert done.stderr.startswith(f"error: {packed if packed in command else folder}/sweep.json cannot be read")
        assert sentence in done.stderr
        assert done.stderr.count("\n") == 1
        assert len(done.stderr) < 600
    assert not (tmp_path / "out").exists()


BAD_RUNS: dict[str, tuple[str, str]] = {
    "a list": ("result.json", "[]"),
    "no metrics": ("result.json", '{"schema": 1}'),
    "metrics of another type": ("result.json", '{"primary_metric": "accuracy", "metrics": 5}'),
    "a metric that is no name": ("result.json", '{"primary_metric": {}, "metrics": {}}'),
    "settings of nothing": ("config.toml", ""),
    "settings that are no TOML": ("config.toml", "[[["),
}


@pytest.mark.parametrize("case", BAD_RUNS)
def test_a_run_of_another_shape_is_one_sentence(case: str, tmp_path: Path) -> None:
    name, content = BAD_RUNS[case]
    cell = {"setting": ["A"], "method": ["FedAvg"]}
    folder = make_sweep(tmp_path / "grid", cell, lambda cell, seed, pattern: 0.5, seeds=[0])
    (folder / "federated-0" / name).write_text(content)
    for command in [("compare", folder), ("report", folder, "--out", tmp_path / "page.md")]:
        done = call(*command)
        assert done.exit_code == 2
        assert done.stderr.startswith(f"error: {folder}/federated-0")
        assert done.stderr.count("\n") == 1


def test_pack_takes_no_file_from_outside_the_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("mine")
    kept = folder / "zero-shot" / "config.toml"
    inside = kept.rename(folder / "zero-shot" / "settings.toml")
    kept.symlink_to("settings.toml")
    assert call("pack", folder, "--to", tmp_path / "x.tar.xz").exit_code == 0
    kept.unlink()
    kept.symlink_to(tmp_path / "secret")
    done = call("pack", folder, "--to", tmp_path / "y.tar.xz")
    assert done.exit_code == 2
    assert done.stderr == f"error: {kept} is a link that leads out of {folder}; put the file itself there.\n"
    assert not (tmp_path / "y.tar.xz").exists()
    assert inside.is_file()


def test_a_folder_may_be_named_like_an_archive(packed: Path, folder: Path, tmp_path: Path) -> None:
    named = folder.rename(tmp_path / "folder.tar.xz")
    assert run("compare", named) == run("compare", packed)


@pytest.mark.parametrize(
    ("case", "to", "sentence"),
    [
        ("run", "x.tar.xz", "is not a sweep's folder"),
        ("nowhere", "x.tar.xz", "is not a sweep's folder"),
        ("archive", "x.tar.xz", "is not a sweep's folder"),
        ("empty", "x.tar.xz", "has no complete run"),
        ("damaged", "x.tar.xz", "sweep.json cannot be read"),
        ("out", "x.tar.xz", "'../run' cannot be the name of a folder"),
        ("name", "x.tar.xz", "'a/b' cannot be the name of a folder"),
        ("good", "x.tar.gz", "give a file name that ends in .tar.xz"),
        ("good", "x.xz", "give a file name that ends in .tar.xz"),
        ("good", "taken.tar.xz", "give a file name that ends in .tar.xz"),
    ],
)
def test_bad_arguments_of_pack(case: str, to: str, sentence: str, packed: Path, folder: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "run", {"both": 0.5})
    (tmp_path / "other").mkdir()
    (tmp_path / "out" / "taken.tar.xz").mkdir(parents=True)
    where = {"run": tmp_path / "run", "nowhere": tmp_path / "nowhere", "archive": packed, "good": folder}
    broken = {"empty": index("x"), "damaged": b"[", "out": index("../run"), "name": index("x", name="a/b")}
    if case in broken:
        (tmp_path / "other" / "sweep.json").write_bytes(broken[case])
    done = call("pack", where.get(case, tmp_path / "other"), "--to", tmp_path / "out" / to)
    assert done.exit_code == 2
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["taken.tar.xz"]


def test_a_failed_write_leaves_the_old_file(folder: Path, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = packed.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("fedmllm.storage.atomic.os.fsync", fail)
    assert call("pack", folder, "--to", packed).exit_code == 1
    assert packed.read_bytes() == before
    assert [p.name for p in packed.parent.iterdir() if p.name.startswith(".")] == []


def test_other_errors_pass_through_and_the_folder_is_removed(packed: Path, scratch: Path) -> None:
    with pytest.raises(ZeroDivisionError), opened([packed]) as [folder]:
        assert len(folder.parts) / 0
    assert list(scratch.iterdir()) == []
