"""The ServerApp: the one round loop over Flower's Grid, into an ordinary run directory."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedmllm import config as configs
from fedmllm.bench import Bench
from fedmllm.config import Experiment
from fedmllm.data import manifest as manifests
from fedmllm.data.manifest import Holding, Manifest
from fedmllm.errors import ConfigError, RunError, UserError
from fedmllm.experiment import Data, Report, check_parts, default_stem, load_split, prepare, silent, with_defaults
from fedmllm.fleets.base import FleetKind, Site
from fedmllm.progress import Progress
from fedmllm.remote.fleet import RemoteFleet
from fedmllm.remote.grid import GridPost
from fedmllm.remote.processes import alone_in
from fedmllm.remote.protocol import Job
from fedmllm.remote.site import structure
from fedmllm.runs import Runner
from fedmllm.store import RunDir, new_run
from fedmllm.tensors import write_atomically


def site_manifest(abouts: Mapping[int, Mapping[str, Any]], sites: list[str]) -> Manifest:
    """A manifest made of what the sites say of themselves: rows for their counts, under ids that are none of theirs.

    Raises RunError where what a site says cannot be.
    """
    rows = []
    for client, site in enumerate(sites):
        try:
            samples, image, text = (int(abouts[client][key]) for key in ("samples", "image", "text"))
        except (KeyError, TypeError, ValueError):
            raise RunError(f"site {site!r} did not say how many samples it has.") from None
        if not (0 <= image <= samples and 0 <= text <= samples <= image + text):
            raise RunError(f"site {site!r} says that {image} and {text} of its {samples} samples have an image and a text.")
        for number in range(samples):
            visible = {m for m, there in (("image", number < image), ("text", number >= samples - text)) if there}
            rows.append(Holding(f"{site}/{number}", client, frozenset(visible)))  # type: ignore[arg-type]
    return Manifest.of(rows, len(sites))


class _Federation:
    """One run over a grid."""

    def __init__(self, grid: Grid, config: Experiment, run: RunDir, report: Report, pause: float) -> None:
        if config.fleet.name != "flower":
            raise ConfigError('fleet.name: the experiment of a Flower run must say "flower".')
        self._config, self._run, self._report = config, run, report
        options = config.fleet.options
        self._sites: list[str] = list(options.get("sites") or [])
        self._wait, self._timeout = float(options["wait"]), float(options["timeout"])
        name = run.meta()["run_id"] if run.exists else secrets.token_hex(8)
        ask = Job("describe", name, config.toml())
        clients = config.partition.clients
        self._post = GridPost(grid, ask, clients, self._sites, float(options["rejoin"]), pause)

    def execute(self) -> dict[str, Any]:
        if self._run.complete:
            return self._run.result()
        check_parts(self._config)
        if self._sites and self._config.eval.split == "validation":
            raise ConfigError('eval.split: "validation" is held out of the training data, which the sites keep; use "test".')
        data = None if self._sites else prepare(self._config)
        abouts = self._gather()
        if data is None:
            task, test, skipped = load_split(self._config.task, "test")
            skipped += sum(int(about.get("skipped", 0)) for about in abouts.values())
            data = Data(task, [], test, skipped, self._manifest(abouts))
        bench = Bench(self._config, data, self._report)
        mine = structure(bench.initial)
        for client, about in abouts.items():
            if about.get("adapter") != mine:
                raise RunError(f"{self._called(client)} has another model or adapter; give it the same model files.")
        elsewhere = FleetKind(self._fleet, here=False)
        return Runner(self._config, data, bench, self._run, "federated", self._report, elsewhere).execute()

    def _called(self, client: int) -> str:
        return f"site {self._sites[client]!r}" if self._sites else f"client {client}"

    def _gather(self) -> Mapping[int, Mapping[str, Any]]:
        """Raises RunError where clients are missing: all are needed to begin, and `train.min_updates` to go on."""
        clients = self._config.partition.clients
        self._report("waiting for clients", 0, 0, f"{clients}, for at most {self._wait:g} s")
        abouts = self._post.gather(range(clients), self._wait)
        missing = sorted(set(range(clients)) - abouts.keys())
        if len(abouts) < (self._config.train.min_updates if self._run.exists else clients):
            found = "; ".join(self._post.problems)
            names = ", ".join(self._called(client) for client in missing[:5]) + (" …" if len(missing) > 5 else "")
            raise RunError(
                f"{len(missing)} of {clients} clients were not there within fleet.wait = {self._wait:g} s: {names}"
                + (f" ({found})" if found else "; start them, then run again")
                + "."
            )
        return abouts

    def _manifest(self, abouts: Mapping[int, Mapping[str, Any]]) -> Manifest:
        """What the sites said when the run began, though one of them be away now."""
        return manifests.read(self._run.manifest) if self._run.exists else site_manifest(abouts, self._sites)

    def _fleet(self, site: Site) -> RemoteFleet:
        return RemoteFleet(self._post, site.run, site.config, self._timeout, site.last)


def run_over(grid: Grid, config: Experiment, run: RunDir, report: Report = silent, pause: float = 1.0) -> dict[str, Any]:
    """Do a federated run over a grid, or go on with it, and return its result. `pause` is the seconds between two looks at
    which nodes are there. Raises UserError for what its user can mend, TooFewUpdates where a round cannot go on."""
    return _Federation(grid, config, run, report, pause).execute()


def _load(settings: Mapping[str, Any]) -> Experiment:
    path = str(settings.get("experiment") or "")
    if not path:
        raise ConfigError(
            "experiment: give the experiment file's path, for example flwr run … -c 'experiment=\"/abs/e.toml\"'."
        )
    return with_defaults(configs.validate(configs.read(Path(path)), path))


def main(grid: Grid, context: Context) -> None:
    """Run configuration: `experiment`, the file's path here; `out`, the run directory, by default a new one in runs/; with
    `resume` it goes on with what `out` holds; `status` is a file for how it ended, by default none."""
    settings, ended = context.run_config, dict[str, Any]()
    try:
        config = _load(settings)
        stem = default_stem(config, "federated")
        run = RunDir(Path(str(settings["out"]))) if settings.get("out") else new_run(Path("runs"), stem)
        if run.exists and not settings.get("resume"):
            raise RunError(f"{run.path} is not empty; give another out, or resume=true to go on with the run in it.")
        with alone_in(run.path), Progress() as report:
            run_over(grid, config, run, report)
        ended = {"ended": "completed", "out": str(run.path)}
    except UserError as error:
        ended = {"ended": "refused", "why": str(error)}
        raise
    except BaseException as error:
        ended = {"ended": "failed", "why": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        raise
    finally:
        if settings.get("status"):
            write_atomically(Path(str(settings["status"])), json.dumps(ended).encode())


app = ServerApp()
app.main()(main)

__all__ = ["app", "main", "run_over", "site_manifest"]
