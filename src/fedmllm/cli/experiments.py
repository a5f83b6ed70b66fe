"""The commands for one experiment: `run`, `baseline`, `check`, `partition`, `eval`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedmllm.cli.common import File, Out, Resume, Run, Set, TrustConfig, Verbose, load_experiment, showing
from fedmllm.cli.output import Json, OutputLost, print_json, print_result, print_suites, print_table, show, standing
from fedmllm.errors import RunError, UserError
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


def check(
    file: File,
    overrides: Set = None,
    memory: Annotated[
        list[float] | None,
        typer.Option("--memory", metavar="GB", help="Memory of a GPU to check; repeatable; by default 24, 80."),
    ] = None,
    as_json: Json = False,
    verbose: Verbose = None,
) -> None:
    """Validate the settings, the data and the model without training anything."""
    from fedmllm.data.summary import (
        add_problems,
        client_rows,
        count_line,
        modality_shares,
        shares_lines,
        summarise,
        summary_lines,
    )
    from fedmllm.experiment.parts import build
    from fedmllm.runs.estimate import Longest, memory_lines, memory_of_experiment
    from fedmllm.runs.hints import of_federation
    from fedmllm.runs.rounds import federation_plan
    from fedmllm.runs.session import Session

    with showing(verbose) as progress:
        parts, sizes_of_gpus = build(load_experiment(file, overrides, progress)), memory or [24.0, 80.0]

    @contextmanager
    def memory_all_the_same() -> Iterator[list[Session]]:
        """Where there is no data or no model, memory is estimated for the longest prompts that are allowed. The block puts the
        session into the list once there is one."""
        sessions: list[Session] = []
        try:
            yield sessions
        except UserError:
            if not as_json and not sessions:
                with suppress(OutputLost):
                    for line in memory_lines(parts.config, memory_of_experiment(parts.config, sizes_of_gpus)):
                        show(line)
            raise

    with memory_all_the_same(), showing(verbose) as progress:
        progress("preparing data", 0, 0, "")
        loaded_splits = parts.read_splits()
    splits = summarise([(part.split, part.loaded) for part in loaded_splits])
    summary: dict[str, Any] = {"name": parts.config.name, "config_digest": parts.config.digest()}
    if not as_json:
        with suppress(OutputLost):  # the exit status still says whether the experiment is valid
            for line in summary_lines(splits):
                show(line)
    try:
        with showing(verbose) as progress:
            progress("preparing data", 0, 0, "")
            dataset = parts.prepare(loaded_splits)
            # Before the model is loaded, so that what it takes for a million samples does not add to the model.
            shares = modality_shares(dataset.manifest, dataset.train, parts.scenario)
    except UserError:
        with suppress(OutputLost):
            if as_json:  # the summary shows what is wrong with data that cannot be used
                print_json(summary | {"splits": splits})
        raise
    with memory_all_the_same() as sessions, showing(verbose) as progress:
        sessions.append(session := Session(parts, dataset, progress))
        sample, tokens = session.check_prompts()
        session.model.check_cache()
        for hint in (hinted := of_federation(session, federation_plan(session))):
            progress("note", 0, 0, hint)
        progress("estimating memory", 0, 0, "")
        longest = None
        if sample is not None:
            questions = session.test_set.longest(parts.config.eval.batch_size)
            picture = max(map(session.model.pictures.tower_bytes, sample.pictures), default=0)
            longest = Longest(sample, *questions, tokens, picture)
        taken = memory_of_experiment(parts.config, sizes_of_gpus, longest, session.model)
    left_out = add_problems(splits, session.problems)
    down, up = session.first_messages()
    sizes_by_part = session.model.adapter.sizes
    parameters = sum(sizes_by_part.values())
    summary |= {
        "manifest_digest": dataset.manifest.digest(),
        "train_samples": len(dataset.train),
        "test_samples": len(dataset.test),
        "skipped_samples": session.skipped,
        "splits": splits,
        "notes": [*dataset.notes, *hinted],
        "clients": client_rows(dataset.manifest),
        "modalities": shares,
        "model": parts.config.model.name,
        "adapter_parameters": parameters,
        "adapter_bytes": 4 * parameters,
        "adapter_parameters_by_part": sizes_by_part,
        "bytes_down": down,
        "bytes_up": up,
        "caches_features": session.model.caches,
        "memory": taken,
        "round_samples": len(dataset.test if dataset.of_rounds is None else dataset.of_rounds),
        "privacy_spent": parts.mechanism.to_json(parts.mechanism.rounds) if parts.mechanism else None,
    }
    if as_json:
        print_json(summary)
        return
    for split, kinds in left_out.items():
        show(f"{split}: bad samples that the model cannot take {count_line(kinds)}")
    sizes = dataset.manifest.sizes()
    received, sent = (f"{sum(groups.values()) / 1e6:.2f} MB" for groups in (down, up))
    show(f"{file} is valid: {len(dataset.train)} training samples, {len(dataset.test)} test samples,")
    show(f"{len(sizes)} clients with {min(sizes)} to {max(sizes)} samples, {session.skipped} samples skipped,")
    by_part = ", ".join(f"{part} {count}" for part, count in sizes_by_part.items())
    in_parts = f" ({by_part})" if set(sizes_by_part) != {"text"} else ""
    show(f"an adapter of {parameters} parameters{in_parts}; client 0 receives {received} in the first round and sends {sent}.")
    if parts.config.eval.every:
        among = "test" if parts.config.eval.every_split == "same" else "held-out training"
        show(f"every {parts.config.eval.every} rounds, the model is scored on {summary['round_samples']} {among} samples.")
    for line in shares_lines(shares):
        show(line)
    for line in memory_lines(parts.config, taken):
        show(line)
    if parts.mechanism:
        show(f"privacy: {parts.mechanism.summary()}")


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
            for key in sorted(raw["task"].keys() & {"companion", "train_samples", "test_samples"}):
                del raw["task"][key]
                progress("note", 0, 0, f"task.{key} belonged to the run's own task and was dropped")
    raw, notes = config.apply_settings(raw, settings, options_of)
    for note in notes:
        progress("note", 0, 0, note)
    return raw
