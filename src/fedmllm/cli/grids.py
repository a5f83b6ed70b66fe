"""The commands for several runs: `compare`, `report`, `sweep`, `pack`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fedmllm.cli.common import Set, silence_libraries
from fedmllm.cli.output import Json, print_json, print_table, say, show, standing
from fedmllm.errors import ConfigError, RunError
from fedmllm.storage import archive
from fedmllm.storage.archive import INDEX
from fedmllm.storage.atomic import check_folder
from fedmllm.storage.run_dir import RunDir


def compare(
    directories: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", show_default=False)],
    baseline: Annotated[
        str | None, typer.Option("--baseline", metavar="NAME", help="Test against this cell of the grid, or this RUN_DIR.")
    ] = None,
    by_pattern: Annotated[
        bool, typer.Option("--by-pattern", help="For a sweep: every training scenario under every test pattern.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare finished runs side by side; a sweep's folder or archive as a grid, with published figures beside it."""
    for number, directory in enumerate(directories):
        for earlier in directories[:number]:
            if directory.resolve() == earlier.resolve():
                raise RunError(f"{earlier} and {directory} are the same directory; give it once.")
    with archive.opened(directories) as folders:
        if len(folders) == 1 and (folders[0] / INDEX).is_file():
            _compare_grid(folders[0], baseline, by_pattern, as_json)
        elif by_pattern:
            raise RunError("--by-pattern is for a sweep: give one folder that a sweep wrote, or its archive.")
        else:
            _compare_runs(folders, directories, baseline, as_json)


def _compare_grid(folder: Path, baseline: str | None, by_pattern: bool, as_json: bool) -> None:
    from fedmllm.report import significance
    from fedmllm.report.grid_tables import grid_table, pattern_table
    from fedmllm.report.grids import read_grid

    grid = read_grid(folder)
    tests = significance.against(folder, grid, baseline) if baseline else None
    if as_json:
        print_json(grid.to_json() | ({"significance": tests.to_json()} if tests else {}))
        return
    print_table(pattern_table(grid) if by_pattern else grid_table(grid))
    if tests:
        print_table(significance.significance_table(tests, grid.axes[0]))


def _complete_runs(directories: list[Path], names: list[Path]) -> list[Path]:
    """The complete runs among several directories; the others are skipped with a note. Raises RunError if none is left.

    `names` are the paths to show: an archive has the name of its file, not of the folder that it is unpacked into.
    """
    complete = []
    for directory, name in zip(directories, names, strict=True):
        if RunDir(directory).complete:
            complete.append(directory)
            continue
        reason = "is a sweep's folder, compare it alone" if (directory / INDEX).is_file() else "is not a complete run"
        say(f"note: {name} {reason}; skipped")
    if not complete:
        raise RunError("none of the directories is a complete run; give some that are.")
    return complete


def _compare_runs(directories: list[Path], names: list[Path], baseline: str | None, as_json: bool) -> None:
    from fedmllm.report import significance
    from fedmllm.report.tables import comparison

    runs = directories if len(directories) == 1 else _complete_runs(directories, names)
    results = [RunDir(directory).result() for directory in runs]
    tests = significance.runs_against(runs, Path(baseline)) if baseline else []
    if not as_json:
        print_table(comparison(results))
        if baseline:
            print_table(significance.runs_table(tests, Path(baseline)))
        return
    tested = {test.axes["run"]: {"against": baseline, **test.figures()} for test in tests}
    print_json([{"run": str(d), **result} | tested.get(str(d), {}) for d, result in zip(runs, results, strict=True)])


def report(
    directories: Annotated[
        list[Path],
        typer.Argument(metavar="SWEEP_DIR...", help="Folders that sweeps wrote, or their archives.", show_default=False),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE.md", help="The page; its pictures are written to figures/.")],
    baseline: Annotated[
        str | None,
        typer.Option("--baseline", metavar="NAME", help="The cell to test against; by default zero-shot or the first."),
    ] = None,
) -> None:
    """Write sweeps up as a page: tables, pictures, significance, cost, and what did not work."""
    from fedmllm.report.writeup import page
    from fedmllm.storage.atomic import write_atomically

    check_folder(out.parent)
    if out.suffix != ".md":
        raise RunError(f"--out {out}: the page is Markdown; give a name that ends in .md.")
    with archive.opened(directories) as folders:
        written = page(folders, baseline)
    (out.parent / "figures").mkdir(parents=True, exist_ok=True)
    for name, picture in written.pictures.items():
        write_atomically(out.parent / name, picture.encode())
    write_atomically(out, "\n".join(written.lines).encode())
    with standing(f"the page is in {out}"):
        show(f"{out} and {len(written.pictures)} pictures")


class SweepFleet(StrEnum):
    processes = "processes"
    ray = "ray"


def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP.toml", help="The sweep file.", show_default=False)],
    overrides: Set = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The sweep's folder; by default runs/NAME.")] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, help="Runs at a time; by default 1, over Ray as many as fit.")
    ] = None,
    fleet: Annotated[SweepFleet, typer.Option("--fleet", help="Where the runs are executed.")] = SweepFleet.processes,
    address: Annotated[
        str | None, typer.Option("--address", help='With --fleet ray: a cluster\'s address, or "auto"; else Ray starts here.')
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the cells and run nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Run a grid of experiments, skipping complete runs and resuming interrupted ones."""
    from fedmllm.cli.remote import sweep_over_ray
    from fedmllm.experiment.sweep import Sweeper, plan_sweep
    from fedmllm.report.grid_tables import cells_table

    silence_libraries()
    plan, runs = plan_sweep(file, overrides or [])
    folder = out or Path("runs") / plan.name
    check_folder(folder)
    sweeper = Sweeper(plan, runs, folder, lambda done, total, text: say(f"{done}/{total}  {text}"))
    if address and fleet != SweepFleet.ray:
        raise ConfigError("--address needs --fleet ray.")
    if dry_run:
        rows = sweeper.rows()
    elif fleet == SweepFleet.ray:
        rows = sweep_over_ray(sweeper, jobs, address)
    else:
        rows = sweeper.run(jobs or 1)
    failed = {row["id"]: row["error"] for row in rows if row["state"] == "failed"}
    for run, error in failed.items():
        say(f"failed: {folder / run}: {error}")
    try:
        with standing(f"the runs are in {folder}"):
            if as_json:
                print_json({"sweep": plan.name, "out": str(folder), "cells": rows})
            elif dry_run:
                print_table(cells_table(rows))
            else:
                show(f"sweep directory: {folder}; compare its runs with `fedmllm compare {folder}`")
    finally:
        if failed:
            raise typer.Exit(1)


def pack(
    directory: Annotated[Path, typer.Argument(metavar="SWEEP_DIR", help="A folder that a sweep wrote.", show_default=False)],
    to: Annotated[Path, typer.Option("--to", metavar="FILE.tar.xz", help="The archive.")],
    as_json: Json = False,
) -> None:
    """Pack a sweep's complete runs, without adapters and checkpoints, into one small file for report and compare."""
    check_folder(to.parent)
    runs, size = archive.pack(directory, to)
    with standing(f"the archive is in {to}"):
        if as_json:
            print_json({"file": str(to), "runs": runs, "bytes": size})
        else:
            show(f"{to}: {runs} complete runs in {size:,} bytes")
