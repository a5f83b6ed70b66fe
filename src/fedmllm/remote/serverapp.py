"""The ServerApp: Flower's Grid under the one round loop, and everything else as in `fedmllm run`.

Settings (`flwr run -c`): `experiment` is the file, on the server's machine; `out` the run directory, empty for a new one in
runs/; `resume` goes on with the run that is there; `overrides` are key=value, parted by semicolons; a run that ends badly
writes `{"status", "why"}` to the file `outcome`, if one is named.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedmllm import config as files
from fedmllm.config import Experiment
from fedmllm.data import manifest as manifests
from fedmllm.data.dataset import Dataset, load_split
from fedmllm.data.manifest import Holding, Manifest
from fedmllm.data.samples import MODALITIES
from fedmllm.errors import ConfigError, RunError, UserError
from fedmllm.experiment.parts import Parts, build, options_of, with_defaults
from fedmllm.federation import Fleet
from fedmllm.fleets.base import FleetBackend, FleetContext
from fedmllm.remote.fleet import RemoteFleet
from fedmllm.remote.protocol import Job, Reply
from fedmllm.remote.site import structure
from fedmllm.remote.transport import FlowerTransport
from fedmllm.runs.directory import choose_directory
from fedmllm.runs.kinds import execute
from fedmllm.runs.progress import ProgressBars, ProgressCallback
from fedmllm.runs.session import Session
from fedmllm.storage.atomic import write_atomically
from fedmllm.storage.lock import locked
from fedmllm.storage.run_dir import RunDir
from fedmllm.tensors import State


def told_to_sites(config: Experiment) -> str:
    """The experiment as TOML; without the server's own data, which is none of the affair of sites that bring theirs."""
    raw = config.resolved()
    if config.fleet.options.get("sites"):
        raw.pop("task")
    return tomli_w.dumps(raw)


def manifest_of(about: Mapping[int, Mapping[str, Any]], names: tuple[str, ...]) -> Manifest:
    """Who holds how much of what, from the counts that sites tell: rows of made-up ids, as no id leaves a site.

    `samples` = image + text − both, so the counts say how many have both. Raises ConfigError for counts that cannot be.
    """
    rows = []
    for client, told in sorted(about.items()):
        counts = [told.get(key) for key in ("samples", "image", "text")]
        samples, image, text = (count if type(count) is int and count >= 0 else -1 for count in counts)
        if not (0 <= max(image, text) <= samples <= image + text) or min(image, text) < 0:
            raise ConfigError(f"site {names[client]!r} says it holds {samples} samples, {image} with image, {text} with text.")
        for number in range(samples):
            shown = zip(MODALITIES, (number < image, number >= samples - text), strict=True)
            rows.append(Holding(f"{names[client]}/{number}", client, frozenset(m for m, seen in shown if seen)))
    return Manifest.of(rows, len(names))


def load_experiment(file: Path, overrides: list[str]) -> Experiment:
    """The experiment of a file, its fleet being Flower whatever the file says. Raises ConfigError."""
    raw, _ = files.apply_overrides(files.read(file), overrides, options_of)
    if raw.get("fleet", {}).get("name") != "flower":
        raw["fleet"] = {"name": "flower"}
    return with_defaults(files.validate(raw, str(file)))


def _server_data(parts: Parts, about: Mapping[int, Mapping[str, Any]], known: Manifest | None) -> Dataset:
    """What the server tests on, and a manifest of counts. `known` is that of the run which goes on."""
    config, names = parts.config, tuple(parts.config.fleet.options["sites"])
    if config.eval.split == "validation":
        raise ConfigError(
            'eval.split = "validation" holds back training data, of which the server of fleet.sites has none; set it to "test".'
        )
    task, test, skipped = load_split(parts.source, "test")
    told = manifest_of(about, names)
    if known is not None:
        for client in about:
            if told.counts()[client].tolist() != known.counts()[client].tolist():
                raise RunError(f"site {names[client]!r}: its data changed since this run began; start a new one.")
        told = known
    return Dataset(task, [], test, skipped + sum(int(a.get("skipped", 0)) for a in about.values()), told)


def run(grid: Grid, settings: Mapping[str, Any], report: ProgressCallback) -> dict[str, Any]:
    """Do the run over `grid`, or what is left of it. Raises UserError where it cannot be, TooFewUpdates where it fails."""
    config = load_experiment(Path(str(settings["experiment"])), [s for s in str(settings["overrides"]).split(";") if s.strip()])
    parts = build(config)
    config = parts.config
    if config.fleet.options["evaluate"] and (not config.fleet.options.get("sites") or config.clients.rank):
        raise ConfigError("fleet.evaluate asks sites of one rank, with data of their own (fleet.sites); set it to false.")
    directory = choose_directory(
        config, "federated", Path(str(settings["out"])) if settings["out"] else None, bool(settings["resume"])
    )
    if directory.complete:
        return directory.result()
    path = directory.path
    # One that was given up may still write: two at once would spoil it.
    with locked(path.with_name(f".{path.name}.lock"), RuntimeError(f"another run still writes to {path}"), wait_seconds=60.0):
        return _run(grid, parts, directory, report)


def _run(grid: Grid, parts: Parts, directory: RunDir, report: ProgressCallback) -> dict[str, Any]:
    config = parts.config
    options = config.fleet.options
    names = tuple(options.get("sites") or ())
    text, clients = told_to_sites(config), config.partition.clients
    post = FlowerTransport(grid, options["absent"], names)
    report("waiting for clients", 0, 0, f"{clients}, for {options['wait']:g} s at most")
    goes_on = directory.exists and directory.manifest.is_file()
    asked = Job("describe", secrets.token_hex(8), text)
    there = post.roll_call(asked, clients, options["wait"], config.train.min_updates if goes_on else None)
    if names:
        known = manifests.read(directory.manifest) if goes_on else None
        dataset = _server_data(parts, {client: reply.about for client, reply in there.items()}, known)
    else:
        dataset = parts.prepare()
    session = Session(parts, dataset, report)
    _check_models(there, structure(session.initial), names)

    made: list[RemoteFleet] = []

    def make(site: FleetContext) -> Fleet:
        made.append(RemoteFleet(post, site.run, text, options["timeout"], site.last))
        return made[-1]

    def evaluate(messages: Mapping[int, State], done: int) -> Mapping[int, Mapping[str, Any]]:
        return made[-1].evaluate(messages, done)

    backend = FleetBackend(make, local=False, secure=True, evaluate=evaluate if options["evaluate"] else None)
    return execute("federated", session, directory, backend)


def _check_models(there: Mapping[int, Reply], mine: str, names: tuple[str, ...]) -> None:
    for client, reply in sorted(there.items()):
        if reply.about.get("adapter") != mine:
            who = repr(names[client]) if names else str(client)
            raise ConfigError(
                f"client {who} adapts other tensors than the server; give it the same model, and the same versions of fedmllm, "
                "transformers and peft."
            )


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Fails as Flower expects it, by an exception, and leaves word of it where `fedmllm server` looks."""
    settings = context.run_config
    try:
        with ProgressBars() as report:
            run(grid, settings, report)
    except BaseException as error:
        if settings["outcome"]:
            told = {"status": 2 if isinstance(error, UserError) else 1, "why": one_line(error)}
            write_atomically(Path(str(settings["outcome"])), json.dumps(told).encode())
        raise


def one_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


__all__ = ["app", "load_experiment", "manifest_of", "one_line", "run", "told_to_sites"]
