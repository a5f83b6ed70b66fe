"""The ServerApp: runs the common round loop over Flower's Grid; everything else is the same as in `fedmllm run`.

Settings (`flwr run -c`): `experiment` is the experiment file, on the server's machine; `out` is the run directory, by default a
new one in runs/; `resume` continues the run in `out`; `overrides` are key=value settings, separated by semicolons. If the run
fails, `{"status", "why"}` is written to the file `outcome`, if one is named.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tomli_w
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedmllm import config as files
from fedmllm.config import Experiment
from fedmllm.data import manifest as manifests
from fedmllm.data.dataset import Dataset, load_split, scored_in_rounds
from fedmllm.data.manifest import Manifest
from fedmllm.errors import ConfigError, RunError, UserError
from fedmllm.experiment.parts import Parts, build, options_of, with_defaults
from fedmllm.federation import Fleet
from fedmllm.fleets.base import FleetBackend, FleetContext
from fedmllm.progress import ProgressCallback, RunLog
from fedmllm.remote.fleet import RemoteFleet
from fedmllm.remote.protocol import Job, ProtocolError, Reply, counts_of
from fedmllm.remote.site import structure
from fedmllm.remote.transport import FlowerTransport
from fedmllm.runs.directory import choose_directory
from fedmllm.runs.kinds import execute
from fedmllm.runs.progress import ProgressBars
from fedmllm.runs.session import Session
from fedmllm.storage.atomic import write_atomically
from fedmllm.storage.lock import locked
from fedmllm.storage.run_dir import RunDir


def experiment_for_sites(config: Experiment) -> str:
    """The experiment as TOML. If the sites have data of their own, without what only the server opens: its data, judge and
    suites."""
    raw = config.resolved()
    if config.fleet.options.get("sites"):
        del raw["task"], raw["judge"]
        for key in ("transfer", "suites"):
            raw["eval"].pop(key, None)
    return tomli_w.dumps(raw)


def manifest_of(about: Mapping[int, Mapping[str, Any]], names: tuple[str, ...]) -> Manifest:
    """The manifest that follows from the counts which the sites report; sample ids are invented, as no id leaves a site.

    The counts determine how many samples have both modalities. Raises ConfigError for impossible counts.
    """
    ids = [pa.array([], pa.string())]
    columns = [(np.empty(0, np.int32), np.empty(0, np.bool_), np.empty(0, np.bool_))]
    for client, report in sorted(about.items()):
        try:
            samples, image, text = counts_of(report)
        except ProtocolError as error:
            raise ConfigError(f"site {names[client]!r} reports {error}.") from None
        number = np.arange(samples)
        ids.append(pa.array([f"{names[client]}/{n}" for n in range(samples)], pa.string()))
        columns.append((np.full(samples, client, np.int32), number < image, number >= samples - text))
    owner, has_image, has_text = map(np.concatenate, zip(*columns, strict=True))
    return Manifest(pa.concat_arrays(ids), owner, has_image, has_text, len(names))


def load_experiment(file: Path, overrides: list[str]) -> Experiment:
    """The experiment of a file, with Flower as its fleet whatever the file says. Raises ConfigError."""
    settings = [files.parse_override(override) for override in overrides]
    raw, _ = files.apply_settings(files.read(file), settings, options_of)
    if raw.get("fleet", {}).get("name") != "flower":
        raw["fleet"] = {"name": "flower"}
    with files.blaming(str(file), settings):
        return with_defaults(files.validate(raw))


def _server_dataset(parts: Parts, about: Mapping[int, Mapping[str, Any]], earlier: Manifest | None) -> Dataset:
    """The server's test data, and a manifest of the sites' counts. `earlier` is the manifest of the run that is resumed."""
    config, names = parts.config, tuple(parts.config.fleet.options["sites"])
    if config.eval.holds_out:
        key, other = ("split", "test") if config.eval.split == "validation" else ("every_split", "same")
        raise ConfigError(
            f'eval.{key} = "validation" holds back training data, and the server has none if fleet.sites is given; set it to '
            f'"{other}".'
        )
    task, test, skipped = load_split(parts.source, "test")
    of_rounds = scored_in_rounds(config, test, [])
    manifest = manifest_of(about, names)
    if earlier is not None:
        for client in about:
            if manifest.counts()[client].tolist() != earlier.counts()[client].tolist():
                raise RunError(f"site {names[client]!r}: its data changed since this run began; start a new one.")
        manifest = earlier
    skipped += sum(report.get("skipped", 0) for report in about.values())
    return Dataset(task, [], test, skipped, manifest, of_rounds=of_rounds)


def run(grid: Grid, settings: Mapping[str, Any], progress: ProgressCallback) -> dict[str, Any]:
    """Do the run over `grid`, or what is left of it. Raises UserError for bad input, TooFewUpdates if a round fails."""
    config = load_experiment(Path(str(settings["experiment"])), [s for s in str(settings["overrides"]).split(";") if s.strip()])
    parts = build(config)
    config = parts.config
    if config.fleet.options["evaluate"] and (not config.fleet.options.get("sites") or config.clients.rank):
        raise ConfigError(
            "fleet.evaluate requires sites with data of their own (fleet.sites) and the same rank for all; set it to false."
        )
    progress, out = RunLog.of(progress), Path(str(settings["out"])) if settings["out"] else None
    directory = choose_directory(config, "federated", out, bool(settings["resume"]))
    if directory.complete:
        return directory.result()
    path = directory.path
    # The process of an earlier submission may still be writing, and two at once would corrupt the run.
    with locked(
        path.with_name(f".{path.name}.lock"), RuntimeError(f"another run is still writing to {path}"), wait_seconds=60.0
    ):
        return _run(grid, parts, directory, progress)


def _run(grid: Grid, parts: Parts, directory: RunDir, progress: ProgressCallback) -> dict[str, Any]:
    config = parts.config
    options = config.fleet.options
    names = tuple(options.get("sites") or ())
    text, clients = experiment_for_sites(config), config.partition.clients
    transport = FlowerTransport(grid, options["absent"], names)
    progress("waiting for clients", 0, 0, f"{clients}, for {options['wait']:g} s at most")
    resumed = directory.exists and directory.manifest.is_file()
    describe = Job("describe", secrets.token_hex(8), text)
    replies = transport.find_clients(describe, clients, options["wait"], config.train.min_updates if resumed else None)
    if names:
        earlier = manifests.read(directory.manifest) if resumed else None
        dataset = _server_dataset(parts, {client: reply.about for client, reply in replies.items()}, earlier)
    else:
        dataset = parts.prepare()
    session = Session(parts, dataset, progress)
    _check_models(replies, structure(session.initial), names)
    return execute("federated", session, directory, _backend(transport, text, options))


def _backend(transport: FlowerTransport, text: str, options: Mapping[str, Any]) -> FleetBackend:
    fleets: list[RemoteFleet] = []

    def open_fleet(context: FleetContext) -> Fleet:
        fleets.append(RemoteFleet(transport, context.run, text, options["timeout"], context.last))
        return fleets[-1]

    evaluate = (lambda messages, done: fleets[-1].evaluate(messages, done)) if options["evaluate"] else None
    return FleetBackend(open_fleet, local=False, secure=True, evaluate=evaluate)


def _check_models(replies: Mapping[int, Reply], expected: str, names: tuple[str, ...]) -> None:
    for client, reply in sorted(replies.items()):
        if reply.about.get("adapter") != expected:
            name = repr(names[client]) if names else str(client)
            raise ConfigError(
                f"client {name} adapts other tensors than the server; give it the same model, and the same versions of "
                "fedmllm, transformers and peft."
            )


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Signal a failure by an exception, as Flower expects, and write the reason where `fedmllm server` looks for it."""
    settings = context.run_config
    try:
        with ProgressBars() as progress:
            run(grid, settings, progress)
    except BaseException as error:
        if settings["outcome"]:
            why = " ".join(str(error).split()) or type(error).__name__
            outcome = {"status": 2 if isinstance(error, UserError) else 1, "why": why}
            write_atomically(Path(str(settings["outcome"])), json.dumps(outcome).encode())
        raise
