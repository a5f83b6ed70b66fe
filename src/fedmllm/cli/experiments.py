"""The commands for one experiment: `run`, `baseline`, `partition`, `eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedmllm.cli.common import File, Out, Resume, Run, Set, TrustConfig, Verbose, load_experiment, showing
from fedmllm.cli.output import Json, print_json, print_result, print_suites, print_table, show, standing
from fedmllm.errors import RunError
from fedmllm.kinds import BaselineKind, RunKind

if TYPE_CHECKING:
    from fedmllm.config import Setting
    from fedmllm.progress import ProgressCallback


def _execute(
    kind: RunKind,
    file: Path,
    overrides: list[str] | None,
    out: Path | None,
    resume: bool,
    as_json: bool,
    verbose: bool | None,
) -> None:
    from fedmllm import api

    with showing(verbose) as progress:
        experiment = load_experiment(file, overrides, progress)
        result = api.run(experiment, kind, out, resume=resume, progress=progress)
    print_result(dict(result.json), result.path, as_json)


def run(
    file: File,
    overrides: Set = None,
    out: Out = None,
    resume: Resume = False,
    as_json: Json = False,
    verbose: Verbose = None,
) -> None:
    """Run a federated experiment."""
    _execute("federated", file, overrides, out, resume, as_json, verbose)


def baseline(
    kind: Annotated[BaselineKind, typer.Argument(show_default=False)],
    file: File,
    overrides: Set = None,
    out: Out = None,
    resume: Resume = False,
    as_json: Json = False,
    verbose: Verbose = None,
) -> None:
    """Run a baseline: the untrained model, each client alone, or all data pooled."""
    _execute(kind, file, overrides, out, resume, as_json, verbose)


def partition(
    file: File,
    overrides: Set = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Where the manifest is written.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE.html", help="Draw it as well.")] = None,
    as_json: Json = False,
    verbose: Verbose = None,
) -> None:
    """Write the manifest: which client holds which sample and which modalities it sees."""
    from fedmllm.data.manifest_page import draw_manifest
    from fedmllm.data.summary import client_rows, modality_shares, shares_lines
    from fedmllm.experiment.parts import build
    from fedmllm.storage.atomic import check_folder, write_atomically

    with showing(verbose, models=False) as progress:
        parts = build(load_experiment(file, overrides, progress))
        path = out or Path(f"{parts.config.name}.manifest.parquet")
        check_folder(path.parent)
        check_folder((plot or path).parent)
        progress("preparing data", 0, 0, "")
        dataset = parts.prepare()
        manifest = dataset.manifest
        manifest.write(path)
        rows, shares = client_rows(manifest), modality_shares(manifest, dataset.train, parts.scenario)
        if plot:
            write_atomically(plot, draw_manifest(manifest, dataset.train, parts.config.name, shares_lines(shares)).encode())
    with standing(f"the manifest is in {path}"):
        if as_json:
            print_json({"manifest": str(path), "manifest_digest": manifest.digest(), "clients": rows, "modalities": shares})
            return
        from rich.table import Table

        table = Table(title=f"{path}  {manifest.digest()[:12]}", title_justify="left")
        for column in rows[0]:
            table.add_column(column, justify="right")
        for row in rows:
            table.add_row(*map(str, row.values()))
        print_table(table)
        for line in shares_lines(shares):
            show(line)


def evaluate(
    directory: Run,
    patterns: Annotated[str | None, typer.Option("--patterns", help="Comma-separated: both, image, text.")] = None,
    suites: Annotated[
        list[str] | None, typer.Option("--suite", metavar="NAME", help="Examine the model as well; `fedmllm list suites`.")
    ] = None,
    overrides: Set = None,
    trust_config: TrustConfig = False,
    as_json: Json = False,
    verbose: Verbose = None,
) -> None:
    """Test a finished run's adapter again: under other modality patterns, by suites, or on another task with --set
    task.name=…; what suites find is added to the run's result if nothing else is changed."""
    from fedmllm import config
    from fedmllm.experiment.parts import with_defaults
    from fedmllm.report.tables import metrics_table
    from fedmllm.runs.reevaluate import reevaluate
    from fedmllm.storage.run_dir import RunDir

    run = RunDir(directory)
    result = run.result()
    settings = [config.parse_override(override) for override in overrides or []]
    if patterns:
        settings.append((["eval", "patterns"], [pattern.strip() for pattern in patterns.split(",")]))
    unchanged = not settings
    if suites:
        settings.append((["eval", "suites"], list(suites)))
    with showing(verbose) as progress:
        raw = _evaluation_settings(config.read(run.config), settings, progress)
        with config.blaming(str(run.config), settings):
            experiment = with_defaults(config.validate(raw))
        metrics, findings = reevaluate(run, experiment, progress, trusted=trust_config)
    if findings and unchanged:
        run.finish(result | {"suites": (result.get("suites") or {}) | findings})
    if as_json:
        suites_found = {"suites": findings} if findings else {}
        print_json({"run": str(directory), "task": raw["task"]["name"], "metrics": metrics, **suites_found})
    else:
        print_table(metrics_table(metrics, str(directory)))
        print_suites(findings)


def _evaluation_settings(raw: dict[str, Any], settings: list[Setting], progress: ProgressCallback) -> dict[str, Any]:
    """The run's experiment with the settings applied. Raises RunError for one that only matters to training."""
    from fedmllm import config
    from fedmllm.experiment.parts import options_of

    raw.get("eval", {}).pop("suites", None)  # which were answered by the run itself
    for path, value in config.flattened(settings):
        if path[0] not in ("task", "eval", "prompt"):
            raise RunError(f"--set {'.'.join(path)}: the run is trained; only [task], [eval] and [prompt] can be set.")
        if path == ["task", "name"] and value != raw["task"]["name"]:
            for key in sorted(raw["task"].keys() & {"train_samples", "test_samples"}):
                del raw["task"][key]
                progress("note", 0, 0, f"task.{key} belonged to the run's own task and was dropped")
    raw, notes = config.apply_settings(raw, settings, options_of)
    for note in notes:
        progress("note", 0, 0, note)
    return raw
