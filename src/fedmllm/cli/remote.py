"""The commands for several machines: `keys`, `client`, `server`, and `sweep --fleet ray`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedmllm.api import need
from fedmllm.cli.common import Out, Resume, Set, Verbose
from fedmllm.cli.output import Json, print_json, print_result, say, show, standing
from fedmllm.errors import ConfigError
from fedmllm.storage.atomic import check_folder

if TYPE_CHECKING:
    from fedmllm.experiment.sweep import Sweeper


def sweep_over_ray(sweeper: Sweeper, jobs: int | None, address: str | None) -> list[dict[str, Any]]:
    """Execute the missing runs of a grid on a Ray cluster; the index."""
    need("ray", "ray")
    from fedmllm.remote.cluster import cluster
    from fedmllm.remote.ray_sweep import RayTasks

    with cluster(address):
        tasks = RayTasks(jobs)
        return sweeper.run(tasks.jobs, tasks)


def keys(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder for the new files.", show_default=False)],
    hosts: Annotated[
        list[str] | None, typer.Option("--host", help="A name or address by which sites reach the server; repeatable.")
    ] = None,
    sites: Annotated[list[str] | None, typer.Option("--site", help="A site to make a key for; repeatable.")] = None,
    days: Annotated[int, typer.Option("--days", min=1, help="How long the server's certificate is valid.")] = 825,
    as_json: Json = False,
) -> None:
    """Create the authority and the certificate of a server (--host), and the keys of sites (--site)."""
    need("cryptography", "flower")
    from fedmllm.remote.keys import make

    if not hosts and not sites:
        raise ConfigError("nothing to create: give --host for a server's certificate, --site for a site's key.")
    check_folder(folder)
    files = [str(path) for path in make(folder, hosts or [], sites or [], days)]
    with standing(f"the keys are in {folder}"):
        if as_json:
            print_json({"made": files})
        else:
            for line in files:
                show(line)


def client(
    file: Annotated[Path, typer.Argument(metavar="SITE.toml", help="The site file.", show_default=False)],
    check: Annotated[bool, typer.Option("--check", help="Check the file, the data and the key, then exit.")] = False,
    as_json: Json = False,
) -> None:
    """Take part in a federation with this site's data, until Ctrl-C or SIGTERM."""
    need("flwr", "flower")
    from fedmllm.remote import client as site_process
    from fedmllm.remote.files import SiteFile

    site = SiteFile(file)
    counts = site_process.check(site)
    if as_json:
        print_json(counts)
    else:
        modalities = f"{counts['image']} with image, {counts['text']} with text"
        say(f"site {site.name}: {counts['samples']} samples, {modalities}, {counts['skipped']} skipped")
    if not check:
        site_process.serve(site, lambda line: say(f"{site.name}: {line}"))


def server(
    file: Annotated[Path, typer.Argument(metavar="FEDERATION.toml", help="The federation file.", show_default=False)],
    overrides: Set = None,
    out: Out = None,
    resume: Resume = False,
    as_json: Json = False,
    verbose: Verbose = None,
) -> None:
    """Run an experiment over the sites of a federation."""
    need("flwr", "flower")
    from fedmllm.experiment.parts import build
    from fedmllm.remote.files import FederationFile
    from fedmllm.remote.server import Server
    from fedmllm.runs.directory import choose_directory

    federation = FederationFile(file, overrides or [])
    config = build(federation.experiment).config
    run = choose_directory(config, "federated", out, resume)
    report = (lambda line: None) if verbose is False else say
    result = run.result() if run.complete else Server(federation, run.path, run.exists, report).run()
    print_result(result, run.path, as_json)
