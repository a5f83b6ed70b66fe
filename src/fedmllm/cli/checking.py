"""The command `check`: an experiment's settings, data and model, without training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedmllm.cli.common import File, Set, Verbose, load_experiment, showing
from fedmllm.cli.output import Json, OutputLost, print_json, show
from fedmllm.errors import UserError

if TYPE_CHECKING:
    from fedmllm.data.samples import Split
    from fedmllm.experiment.parts import Parts
    from fedmllm.progress import ProgressCallback
    from fedmllm.runs.session import Session


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
    from fedmllm.data.summary import add_problems, modality_shares, summarise, summary_lines
    from fedmllm.experiment.parts import build
    from fedmllm.runs.session import Session

    with showing(verbose) as progress:
        parts, gpus = build(load_experiment(file, overrides, progress)), memory or [24.0, 80.0]
    with _memory_all_the_same(parts, gpus, as_json), showing(verbose) as progress:
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
    with _memory_all_the_same(parts, gpus, as_json) as sessions, showing(verbose) as progress:
        sessions.append(session := Session(parts, dataset, progress))
        summary |= _examine(session, gpus, progress)
    left_out = add_problems(splits, session.problems)
    summary |= {"splits": splits, "modalities": shares}
    if as_json:
        print_json(summary)
    else:
        _report(file, parts, summary, left_out)


@contextmanager
def _memory_all_the_same(parts: Parts, gpus: Sequence[float], as_json: bool) -> Iterator[list[Session]]:
    """Where there is no data or no model, memory is estimated for the longest prompts that are allowed. The block puts the
    session into the list once there is one."""
    from fedmllm.runs.estimate import memory_lines, memory_of_experiment

    sessions: list[Session] = []
    try:
        yield sessions
    except UserError:
        if not as_json and not sessions:
            with suppress(OutputLost):
                for line in memory_lines(parts.config, memory_of_experiment(parts.config, gpus)):
                    show(line)
        raise


def _examine(session: Session, gpus: Sequence[float], progress: ProgressCallback) -> dict[str, Any]:
    """What `check --json` prints of the data and the model together. Raises ConfigError or DataError."""
    from fedmllm.data.summary import client_rows
    from fedmllm.runs.estimate import Longest, memory_of_experiment
    from fedmllm.runs.hints import of_federation
    from fedmllm.runs.rounds import federation_plan

    config, dataset, model, mechanism = session.config, session.dataset, session.model, session.parts.mechanism
    sample, tokens = session.check_prompts()
    model.check_cache()
    for hint in (hints := of_federation(session, federation_plan(session))):
        progress("note", 0, 0, hint)
    progress("estimating memory", 0, 0, "")
    longest = None
    if sample is not None:
        picture = max(map(model.pictures.tower_bytes, sample.pictures), default=0)
        longest = Longest(sample, *session.test_set.longest(config.eval.batch_size), tokens, picture)
    down, up = session.first_messages()
    parameters = sum(model.adapter.sizes.values())
    return {
        "manifest_digest": dataset.manifest.digest(),
        "train_samples": len(dataset.train),
        "test_samples": len(dataset.test),
        "skipped_samples": session.skipped,
        "notes": [*dataset.notes, *hints],
        "clients": client_rows(dataset.manifest),
        "model": config.model.name,
        "adapter_parameters": parameters,
        "adapter_bytes": 4 * parameters,
        "adapter_parameters_by_part": model.adapter.sizes,
        "bytes_down": down,
        "bytes_up": up,
        "caches_features": model.caches,
        "memory": memory_of_experiment(config, gpus, longest, model),
        "round_samples": len(dataset.test if dataset.of_rounds is None else dataset.of_rounds),
        "privacy_spent": mechanism.to_json(mechanism.rounds) if mechanism else None,
    }


def _report(file: Path, parts: Parts, summary: Mapping[str, Any], left_out: Mapping[Split, Mapping[str, int]]) -> None:
    """The summary in words, after the lines about the data."""
    from fedmllm.data.summary import count_line, shares_lines
    from fedmllm.runs.estimate import memory_lines

    for split, kinds in left_out.items():
        show(f"{split}: bad samples that the model cannot take {count_line(kinds)}")
    sizes = [row["samples"] for row in summary["clients"]]
    received, sent = (f"{sum(summary[key].values()) / 1e6:.2f} MB" for key in ("bytes_down", "bytes_up"))
    show(f"{file} is valid: {summary['train_samples']} training samples, {summary['test_samples']} test samples,")
    show(f"{len(sizes)} clients with {min(sizes)} to {max(sizes)} samples, {summary['skipped_samples']} samples skipped,")
    by_part = summary["adapter_parameters_by_part"]
    in_parts = f" ({', '.join(f'{part} {count}' for part, count in by_part.items())})" if set(by_part) != {"text"} else ""
    parameters = f"{summary['adapter_parameters']} parameters{in_parts}"
    show(f"an adapter of {parameters}; client 0 receives {received} in the first round and sends {sent}.")
    evaluation = parts.config.eval
    if evaluation.every:
        among = "test" if evaluation.every_split == "same" else "held-out training"
        show(f"every {evaluation.every} rounds, the model is scored on {summary['round_samples']} {among} samples.")
    for line in (*shares_lines(summary["modalities"]), *memory_lines(parts.config, summary["memory"])):
        show(line)
    if parts.mechanism:
        show(f"privacy: {parts.mechanism.summary()}")
