"""The command line. Results go to stdout, everything else to stderr.

Exit status: 0 done, 1 a run failed, 2 bad input (one sentence, no traceback), 130 interrupted (go on with --resume).
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ParamSpec

import typer

from fedmllm import __version__, cli_list, cli_pack, cli_remote, config
from fedmllm.config import BaselineKind, Experiment, RunKind
from fedmllm.errors import ConfigError, RunError, UserError
from fedmllm.printing import Json, print_json, print_table
from fedmllm.store import RunDir

if TYPE_CHECKING:
    from fedmllm.fleets.base import FleetKind

P = ParamSpec("P")
app = typer.Typer(
    help="Federated fine-tuning of multimodal language models whose clients hold different modalities.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

File = Annotated[Path, typer.Argument(metavar="EXPERIMENT.toml", help="The experiment file.", show_default=False)]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting; repeatable.")]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The run directory; by default a new one in runs/.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with this experiment's latest run that is not complete.")]
Patterns = Annotated[str | None, typer.Option("--patterns", help="Comma-separated: both, image, text.")]
Kind = Annotated[BaselineKind, typer.Argument(show_default=False)]


def _guarded(command: Callable[P, None]) -> Callable[P, None]:
    """Turn errors into exit statuses and messages for people."""

    @wraps(command)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except UserError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo("interrupted: the same command with --resume goes on after the last finished round", err=True)
            raise typer.Exit(130) from None
        except typer.Exit:
            raise
        except Exception as error:  # the boundary: whatever else went wrong is a failed run, told in one line
            where = traceback.extract_tb(error.__traceback__)[-1]
            reason = " ".join(str(error).split()) or type(error).__name__
            typer.echo(f"failed: {type(error).__name__}: {reason} ({Path(where.filename).name}, line {where.lineno})", err=True)
            if os.environ.get("FEDMLLM_DEBUG"):
                traceback.print_exc()
            raise typer.Exit(1) from None

    return guarded


def _load(file: Path, overrides: list[str] | None) -> Experiment:
    from fedmllm.experiment import options_of, with_defaults

    raw, notes = config.apply_overrides(config.read(file), overrides or [], options_of)
    for note in notes:
        typer.echo(f"note: {note}", err=True)
    return with_defaults(config.validate(raw, str(file)))


def _quiet() -> None:
    """transformers and its hub client have their own bars and advice; ours are enough."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _execute(kind: RunKind, file: Path, overrides: list[str] | None, out: Path | None, resume: bool, as_json: bool) -> None:
    from fedmllm.bench import Bench
    from fedmllm.experiment import prepare
    from fedmllm.fleets import fleets
    from fedmllm.progress import Progress
    from fedmllm.report.tables import comparison, metrics_table
    from fedmllm.runs import Runner, choose

    _quiet()
    experiment = _load(file, overrides)
    if kind == "federated" and (why := fleets.build(experiment.fleet.name, experiment.fleet.options).refuse):
        raise ConfigError(why)
    run = choose(experiment, kind, out, resume)
    if run.complete:
        result = run.result()
    else:
        data = prepare(experiment)
        with Progress() as report, _elsewhere(experiment, kind) as elsewhere:
            bench = Bench(experiment, data, report)
            result = Runner(experiment, data, bench, run, kind, report, elsewhere).execute()
    if as_json:
        print_json(result)
        return
    print_table(comparison([result]))
    print_table(metrics_table(result["metrics"], "by modality pattern"))
    typer.echo(f"run directory: {run.path}")


def _elsewhere(experiment: Experiment, kind: RunKind) -> AbstractContextManager[FleetKind | None]:
    """The fleet of a federated run that has to be started and ended, if it has one."""
    if kind != "federated" or experiment.fleet.name != "ray":
        return nullcontext()
    cli_remote.need("ray", "ray")
    from fedmllm.remote.actors import on_ray

    return on_ray(experiment)


@app.command()
@_guarded
def run(file: File, overrides: Set = None, out: Out = None, resume: Resume = False, as_json: Json = False) -> None:
    """Run a federated experiment."""
    _execute("federated", file, overrides, out, resume, as_json)


@app.command()
@_guarded
def baseline(
    kind: Kind, file: File, overrides: Set = None, out: Out = None, resume: Resume = False, as_json: Json = False
) -> None:
    """Run what a federation is compared with: the model untrained, each client alone, all data pooled."""
    _execute(kind, file, overrides, out, resume, as_json)


@app.command()
@_guarded
def check(file: File, overrides: Set = None, as_json: Json = False) -> None:
    """Validate the settings, the data and the model. Trains nothing."""
    from fedmllm.bench import Bench, client_rows
    from fedmllm.data.summary import described, summarise
    from fedmllm.experiment import first_messages, look, prepare
    from fedmllm.progress import Progress

    _quiet()
    experiment = _load(file, overrides)
    parts = look(experiment)
    splits = summarise([(part.split, part.found) for part in parts])
    if not as_json:
        typer.echo("\n".join(described(splits)))
    try:
        data = prepare(experiment, parts)
    except UserError:
        if as_json:  # all that is wrong with the data is worth knowing, though it cannot be used
            print_json({"name": experiment.name, "config_digest": experiment.digest(), "splits": splits})
        raise
    with Progress() as report:
        bench = Bench(experiment, data, report)
        bench.check()
    model = bench.model
    down, up = first_messages(experiment, model)
    count = sum(p.numel() for p in model.adapter.parameters.values())
    found = {
        "name": experiment.name,
        "config_digest": experiment.digest(),
        "manifest_digest": data.manifest.digest(),
        "train_samples": len(data.train),
        "test_samples": len(data.test),
        "skipped_samples": data.skipped,
        "splits": splits,
        "clients": client_rows(data.manifest),
        "model": experiment.model.name,
        "adapter_parameters": count,
        "adapter_bytes": 4 * count,
        "bytes_down": down,
        "bytes_up": up,
        "caches_features": model.caches,
    }
    if as_json:
        print_json(found)
        return
    sizes = data.manifest.sizes()
    typer.echo(f"{file} is good: {found['train_samples']} samples to train on and {found['test_samples']} to test on,")
    typer.echo(f"{len(sizes)} clients with {min(sizes)} to {max(sizes)} samples, {data.skipped} samples skipped,")
    mb = [f"{sum(way.values()) / 1e6:.2f} MB" for way in (down, up)]
    typer.echo(f"an adapter of {count} parameters; client 0 is sent {mb[0]} in the first round and sends {mb[1]}.")


@app.command()
@_guarded
def partition(
    file: File,
    overrides: Set = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Where the manifest goes.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE.html", help="Draw it, too.")] = None,
    as_json: Json = False,
) -> None:
    """Write the manifest: which client holds which sample and sees what of it."""
    from rich.table import Table

    from fedmllm.bench import client_rows
    from fedmllm.data.picture import draw_manifest
    from fedmllm.experiment import prepare
    from fedmllm.tensors import write_atomically

    experiment = _load(file, overrides)
    data = prepare(experiment)
    path = out or Path(f"{experiment.name}.manifest.parquet")
    data.manifest.write(path)
    if plot:
        write_atomically(plot, draw_manifest(data.manifest, data.train, experiment.name).encode())
    rows = client_rows(data.manifest)
    if as_json:
        print_json({"manifest": str(path), "manifest_digest": data.manifest.digest(), "clients": rows})
        return
    table = Table(title=f"{path}  {data.manifest.digest()[:12]}", title_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*map(str, row.values()))
    print_table(table)


@app.command("eval")
@_guarded
def evaluate(
    directory: Annotated[Path, typer.Argument(metavar="RUN_DIR", show_default=False)],
    patterns: Patterns = None,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Test a finished run's adapter again: under other modality patterns, or on another task with --set task.name=…"""
    from fedmllm.experiment import options_of
    from fedmllm.progress import Progress
    from fedmllm.reevaluation import reevaluate
    from fedmllm.report.tables import metrics_table

    _quiet()
    run = RunDir(directory)
    run.result()
    raw = config.read(run.config)
    settings = [config.parse_override(override) for override in overrides or []]
    for path, value in settings:
        if path[0] not in ("task", "eval", "prompt"):
            raise RunError(f"--set {'.'.join(path)}: only [task], [eval] and [prompt] matter to a run that is trained.")
        if path == ["task", "name"] and value != raw["task"]["name"] and raw["task"].pop("companion", None):
            typer.echo("note: task.companion belonged to the run's own task and was dropped", err=True)
    raw, notes = config.apply_settings(raw, settings, options_of)
    for note in notes:
        typer.echo(f"note: {note}", err=True)
    if patterns:
        raw.setdefault("eval", {})["patterns"] = [p.strip() for p in patterns.split(",")]
    with Progress() as report:
        metrics = reevaluate(run, config.validate(raw, str(run.config)), report)
    if as_json:
        print_json({"run": str(directory), "task": raw["task"]["name"], "metrics": metrics})
    else:
        print_table(metrics_table(metrics, str(directory)))


@app.command()
@_guarded
def compare(
    directories: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", show_default=False)],
    baseline: Annotated[
        str | None, typer.Option("--baseline", metavar="NAME", help="Test against this cell of the grid, or this RUN_DIR.")
    ] = None,
    by_pattern: Annotated[
        bool, typer.Option("--by-pattern", help="Of a sweep: every training scenario under every test pattern.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Put finished runs side by side; a sweep's folder or archive as a table, published figures beside it."""
    from fedmllm.archive import opened

    with opened(directories) as folders:
        _compare(folders, baseline, by_pattern, as_json)


def _compare(directories: list[Path], baseline: str | None, by_pattern: bool, as_json: bool) -> None:
    from fedmllm.report import significance
    from fedmllm.report.grids import grid_table, pattern_table, read_grid
    from fedmllm.report.tables import comparison

    if len(directories) == 1 and (directories[0] / "sweep.json").is_file():
        grid = read_grid(directories[0])
        if baseline:
            grid["significance"] = significance.against(directories[0], grid, baseline)
        if as_json:
            print_json(grid)
            return
        print_table(pattern_table(grid) if by_pattern else grid_table(grid))
        if baseline:
            print_table(significance.significance_table(grid["significance"], grid["axes"][0]))
        return
    if by_pattern:
        raise RunError("--by-pattern is of a sweep: give one folder that a sweep made, or its archive.")
    results = [RunDir(directory).result() for directory in directories]
    tests = significance.runs_against(directories, Path(baseline)) if baseline else []
    if as_json:
        tested = {one["run"]: one for one in tests}
        rows = [{"run": str(d), **r} for d, r in zip(directories, results, strict=True)]
        print_json([row | ({"against": baseline, **tested[row["run"]]} if row["run"] in tested else {}) for row in rows])
        return
    print_table(comparison(results))
    if baseline:
        print_table(significance.runs_table(tests, Path(baseline)))


@app.command()
@_guarded
def report(
    directories: Annotated[
        list[Path],
        typer.Argument(metavar="SWEEP_DIR...", help="Folders that sweeps made, or their archives.", show_default=False),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE.md", help="The page; pictures go into figures/ beside it.")],
    baseline: Annotated[
        str | None,
        typer.Option("--baseline", metavar="NAME", help="The cell to test against; by default zero-shot or the first."),
    ] = None,
) -> None:
    """Write sweeps up as a page: tables, pictures, significance, cost, and what did not work."""
    from fedmllm.archive import opened
    from fedmllm.report.writeup import page
    from fedmllm.tensors import write_atomically

    if out.suffix != ".md":
        raise RunError(f"--out {out}: the page is Markdown; give a name that ends in .md.")
    with opened(directories) as folders:
        made = page(folders, baseline)
    (out.parent / "figures").mkdir(parents=True, exist_ok=True)
    for name, picture in made.pictures.items():
        write_atomically(out.parent / name, picture.encode())
    write_atomically(out, "\n".join(made.lines).encode())
    typer.echo(f"{out} and {len(made.pictures)} pictures")


class Spread(StrEnum):
    here = "processes"
    ray = "ray"


@app.command()
@_guarded
def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP.toml", help="The sweep file.", show_default=False)],
    overrides: Set = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where the runs go; by default runs/NAME.")] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, help="Runs at a time; by default 1, over Ray as many as have room.")
    ] = None,
    fleet: Annotated[Spread, typer.Option("--fleet", help="Where the runs go.")] = Spread.here,
    address: Annotated[
        str | None, typer.Option("--address", help='With --fleet ray: the cluster\'s, or "auto"; else one on this machine.')
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the cells and run nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Run a grid of experiments, skipping what is complete and resuming what is not."""
    from fedmllm.report.grids import cells_table
    from fedmllm.sweep import Sweeper, plan

    _quiet()
    found, planned = plan(file, overrides or [])
    folder = out or Path("runs") / found.name
    sweeper = Sweeper(found, planned, folder, lambda done, total, text: typer.echo(f"{done}/{total}  {text}", err=True))
    if address and fleet != Spread.ray:
        raise ConfigError("--address goes with --fleet ray.")
    if dry_run:
        rows = sweeper.rows()
    elif fleet == Spread.ray:
        rows = cli_remote.sweep_over_ray(sweeper, jobs, address)
    else:
        rows = sweeper.run(jobs or 1)
    if as_json:
        print_json({"sweep": found.name, "out": str(folder), "cells": rows})
    elif dry_run:
        print_table(cells_table(rows))
    else:
        typer.echo(f"sweep directory: {folder}; put it side by side with `fedmllm compare {folder}`")
    failed = {row["id"]: row["error"] for row in rows if row["state"] == "failed"}
    for name, error in failed.items():
        typer.echo(f"failed: {folder / name}: {error}", err=True)
    if failed:
        raise typer.Exit(1)


app.command("list")(_guarded(cli_list.list_parts))
for _command in (cli_pack.pack, cli_remote.keys, cli_remote.client, cli_remote.server):
    app.command()(_guarded(_command))


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit(0)


if __name__ == "__main__":
    app()
