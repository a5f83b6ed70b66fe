"""The commands for several runs: `compare`, `report`, `sweep`, `pack`."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmllm.cli.common import Set, Verbose, showing
from fedmllm.cli.completion import run_folders
from fedmllm.cli.output import Json, print_json, print_table, say, show, standing
from fedmllm.errors import ConfigError, RunError
from fedmllm.progress import DETAIL
from fedmllm.storage import archive
from fedmllm.storage.archive import INDEX
from fedmllm.storage.atomic import check_folder
from fedmllm.storage.run_dir import RunDir

if TYPE_CHECKING:
    from fedmllm.experiment.sweep import PlannedRun


def compare(
    directories: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", show_default=False, autocompletion=run_folders)],
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
    from fedmllm.report import comparisons
    from fedmllm.report.grid_tables import grid_table, pattern_table
    from fedmllm.report.grids import read_grid

    grid = read_grid(folder)
    compared = comparisons.against(folder, grid, baseline) if baseline else None
    if as_json:
        print_json(grid.to_json() | ({"significance": compared.to_json()} if compared else {}))
        return
    print_table(pattern_table(grid) if by_pattern else grid_table(grid))
    if compared:
        print_table(comparisons.places_table(compared))
        print_table(comparisons.comparisons_table(compared))
        for sentence in comparisons.conclusions(compared):
            show(sentence)


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
    from fedmllm.report.comparisons import runs_against, runs_table
    from fedmllm.report.grids import reading
    from fedmllm.report.tables import comparison

    runs = directories if len(directories) == 1 else _complete_runs(directories, names)
    results = [RunDir(directory).result() for directory in runs]
    differences = runs_against(runs, Path(baseline)) if baseline else {}
    if not as_json:
        with reading(" or ".join(map(str, runs))):
            table = comparison(results, runs)
        print_table(table)
        if baseline:
            print_table(runs_table(differences, Path(baseline)))
        return
    compared = {d: {"against": baseline, "difference": value} for d, value in differences.items()}
    print_json([{"run": str(d), **result} | compared.get(d, {}) for d, result in zip(runs, results, strict=True)])


def report(
    directories: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR...",
            help="Sweeps' folders or archives; for a page in HTML, also runs.",
            show_default=False,
            autocompletion=run_folders,
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="FILE.html: one file with everything; FILE.md: pictures in figures/.")
    ],
    baseline: Annotated[
        str | None,
        typer.Option("--baseline", metavar="NAME", help="The cell to test against; by default zero-shot or the first."),
    ] = None,
    hypotheses: Annotated[
        Path | None,
        typer.Option("--hypotheses", metavar="FILE.toml", help="Begin the page with the answers to this file of hypotheses."),
    ] = None,
    brief: Annotated[
        bool, typer.Option("--brief", help="In Markdown, one table of scores and differences for each sweep, and nothing else.")
    ] = False,
    title: Annotated[str | None, typer.Option("--title", metavar="TEXT", help="The page's heading.")] = None,
    samples: Annotated[
        bool, typer.Option("--samples", help="In HTML, show test samples from the data that the runs' settings name.")
    ] = False,
    verbose: Verbose = None,
) -> None:
    """Write runs and sweeps up as a page: tables, pictures, significance, cost, and what did not work."""
    from fedmllm.storage.atomic import write_atomically

    check_folder(out.parent)
    if out.suffix not in (".md", ".html"):
        raise RunError(f"--out {out}: the page is Markdown or HTML; give a name that ends in .md or .html.")
    if samples and out.suffix == ".md":
        raise ConfigError("--samples is for a page in HTML; give --out a name that ends in .html.")
    if brief and out.suffix == ".html":
        raise ConfigError("--brief is for a page in Markdown; give --out a name that ends in .md.")
    with showing(verbose, models=False) as progress, archive.opened(directories) as folders:
        progress("writing the page", 0, 0, "")
        pictures: dict[str, str] = {}
        if out.suffix == ".html":
            from fedmllm.report.html_report import html_report

            contents = html_report(folders, baseline, samples, hypotheses, title)
        else:
            from fedmllm.report.writeup import page

            written = page(folders, baseline, hypotheses, brief, title)
            contents, pictures = "\n".join(written.lines), written.pictures
    if pictures:
        (out.parent / "figures").mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        write_atomically(out.parent / name, picture.encode())
    write_atomically(out, contents.encode())
    with standing(f"the page is in {out}"):
        show(f"{out} and {len(pictures)} pictures" if out.suffix == ".md" else f"{out}: {len(contents.encode()):,} bytes")


class SweepFleet(StrEnum):
    processes = "processes"
    ray = "ray"


def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP.toml", help="The sweep file.", show_default=False)],
    overrides: Set = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="CELL", help="Run only these cells of an axis; repeatable.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The sweep's folder; by default runs/NAME.")] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, help="Runs at a time; by default 1, over Ray as many as fit.")
    ] = None,
    fleet: Annotated[SweepFleet, typer.Option("--fleet", help="Where the runs are executed.")] = SweepFleet.processes,
    address: Annotated[
        str | None, typer.Option("--address", help='With --fleet ray: a cluster\'s address, or "auto"; else Ray starts here.')
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the cells and run nothing.")] = False,
    pilot: Annotated[
        Path | None,
        typer.Option("--pilot", metavar="SWEEP_DIR", help="Run nothing; say from these runs how many replicates it takes."),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option("--baseline", metavar="NAME", help="With --pilot: the cell to compare with.")
    ] = None,
    effect: Annotated[float, typer.Option("--effect", metavar="POINTS", help="With --pilot: the difference to find.")] = 1.0,
    power: Annotated[float, typer.Option("--power", help="With --pilot: the probability of finding it.")] = 0.8,
    as_json: Json = False,
    verbose: Verbose = None,
) -> None:
    """Run a grid of experiments, skipping complete runs and resuming interrupted ones."""
    from fedmllm.cli.remote import sweep_over_ray
    from fedmllm.experiment.sweep import Sweeper, plan_sweep
    from fedmllm.report.grid_tables import cells_table

    # So that SIGTERM to this process alone ends the runs as well, as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with showing(verbose) as progress:
        plan, runs = plan_sweep(file, overrides or [])
        folder = out or Path("runs") / plan.name
        check_folder(folder)
        sweeper = Sweeper(plan, runs, folder, progress, only or ())
        if address and fleet != SweepFleet.ray:
            raise ConfigError("--address needs --fleet ray.")
        progress(DETAIL, 0, 0, f"{len(sweeper.chosen)} cells, whose runs are in {folder}")
        if dry_run or pilot is not None:
            rows = sweeper.rows(sweeper.chosen)
        elif fleet == SweepFleet.ray:
            rows = sweep_over_ray(sweeper, jobs, address)
        else:
            rows = sweeper.run(jobs or 1)
    if pilot is not None:
        _plan_replicates(runs, pilot, baseline, effect / 100, power, as_json)
        return
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


def _plan_replicates(
    runs: Sequence[PlannedRun], pilot: Path, baseline: str | None, effect: float, power: float, as_json: bool
) -> None:
    from fedmllm.report.planning import plan_replicates, plan_table

    if baseline is None:
        raise ConfigError("--pilot needs --baseline NAME, the cell that the others are compared with.")
    first = {tuple(planned.axes.values()): planned for planned in reversed(runs)}  # of every cell
    kinds = [planned.kind for planned in {p.id: p for p in first.values()}.values()]
    with archive.opened([pilot]) as (folder,):
        plans = plan_replicates(folder, baseline, effect, power, kinds)
    if as_json:
        print_json([plan.to_json() for plan in plans])
    else:
        print_table(plan_table(plans, baseline, effect, power))


def pack(
    directory: Annotated[Path, typer.Argument(metavar="SWEEP_DIR", help="A folder that a sweep wrote.", show_default=False)],
    to: Annotated[Path, typer.Option("--to", metavar="FILE.tar.xz", help="The archive.")],
    as_json: Json = False,
    verbose: Verbose = None,
) -> None:
    """Pack a sweep's complete runs, without adapters and checkpoints, into one small file for report and compare."""
    check_folder(to.parent)
    with showing(verbose, models=False) as progress:
        progress("packing", 0, 0, "")
        runs, size = archive.pack(directory, to)
    with standing(f"the archive is in {to}"):
        if as_json:
            print_json({"file": str(to), "runs": runs, "bytes": size})
        else:
            show(f"{to}: {runs} complete runs in {size:,} bytes")
