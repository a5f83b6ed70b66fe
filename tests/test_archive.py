"""Archives of sweeps: reproducible bytes, the same reports as from the folder, continuation by `sweep`, and errors."""

from __future__ import annotations

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
from fedmllm.progress import no_progress
from fedmllm.storage.archive import opened, pack
from made_runs import index_of, make_run, make_sweep, write_archive

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
        rows = Sweeper(*sweep.plan_sweep(file), out, no_progress).run(1, maker)
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
    "a path out": (lambda packed, file: write_archive(file, {"made/sweep.json": index_of(), "made/../../x": b""}), "leads out"),
    "an absolute path": (
        lambda packed, file: write_archive(file, {"made/sweep.json": index_of(), "/tmp/x": b""}),
        "is not a sweep's archive",
    ),
    "a link": (lambda packed, file: write_archive(file, {"made/sweep.json": index_of()}, link="made/x"), "'made/x' is a link"),
    "two folders": (
        lambda packed, file: write_archive(file, {"a/sweep.json": index_of(), "b/sweep.json": index_of()}),
        "one folder with",
    ),
    "no folder": (lambda packed, file: write_archive(file, {"sweep.json": index_of()}), "one folder with sweep.json"),
    "no index": (lambda packed, file: write_archive(file, {"made/x": b""}), "one folder with sweep.json"),
    "a folder in a run's": (
        lambda packed, file: write_archive(file, {"made/sweep.json": index_of(), "made/a/b/c": b""}),
        "deeper than",
    ),
    "a very deep folder": (
        lambda packed, file: write_archive(file, {"made/sweep.json": index_of(), f"made/{'d/' * 1500}": b""}),
        "deeper than",
    ),
    "a device": (
        lambda packed, file: write_archive(file, {"made/sweep.json": index_of()}, special=tarfile.CHRTYPE),
        "is a link",
    ),
    "a pipe": (
        lambda packed, file: write_archive(file, {"made/sweep.json": index_of()}, special=tarfile.FIFOTYPE),
        "is a link",
    ),
    "more after its end": (
        lambda packed, file: file.write_bytes(packed.read_bytes() + lzma.compress(bytes(2**22))),
        "belong to none of its files",
    ),
    "a huge header": (lambda packed, file: _huge_header(file), "belong to none of its files"),
    "ids that lead out": (
        lambda packed, file: write_archive(file, {"m/sweep.json": index_of("../../x")}),
        "'../../x' cannot be the name",
    ),
    "a damaged index": (
        lambda packed, file: write_archive(file, {"m/sweep.json": b"{}"}),
        "m.tar.xz/sweep.json cannot be read",
    ),
    "no complete run": (
        lambda packed, file: write_archive(file, {"m/sweep.json": index_of("x")}),
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
    broken = {"empty": index_of("x"), "damaged": b"[", "out": index_of("../run"), "name": index_of("x", name="a/b")}
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
