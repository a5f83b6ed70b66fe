"""The two files of a federation beyond one machine: `site.toml` at each site, `federation.toml` at the server.

Paths in them are relative to the folder that they are in.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, ValidationError, field_validator

from fedmllm import config as configs
from fedmllm.config import Experiment, Positive, Table, TaskTable
from fedmllm.data.samples import MODALITIES, Modality
from fedmllm.errors import ConfigError
from fedmllm.experiment import with_defaults
from fedmllm.registry import explain
from fedmllm.remote.site import Own

Port = Annotated[int, Field(ge=1, le=65535)]
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
NAME_RULE = "a site's name has small letters, digits, dots, dashes and underscores, and begins with a letter or a digit"


def site_name(name: str) -> str:
    """Raises ValueError: names become files' and nodes' names."""
    if not _NAME.fullmatch(name):
        raise ValueError(NAME_RULE)
    return name


class SiteFile(Table):
    """`site.toml`."""

    name: str
    superlink: str
    """"host:port" of the server."""
    ca: str
    """The certificate of the authority that signed the server's."""
    key: str
    """The site's private key; its public half is registered at the server."""
    task: TaskTable
    modalities: Annotated[tuple[Modality, ...], Field(strict=False, min_length=1)] = MODALITIES
    """Which modalities of the data are used. What is not named here is not read into any prompt."""
    device: str = "auto"
    trust_remote_code: bool = False
    """Let an experiment run code that comes with its model."""
    state: str = "state"
    """A folder for what clients remember between rounds, for logs, and for Flower's own files."""

    @field_validator("name")
    @classmethod
    def _fit(cls, name: str) -> str:
        return site_name(name)

    @field_validator("superlink")
    @classmethod
    def _an_address(cls, address: str) -> str:
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise ValueError('must be "host:port"')
        return address

    @property
    def own(self) -> Own:
        return Own(self.name, self.task, frozenset(self.modalities), self.device, self.trust_remote_code)


class FederationFile(Table):
    """`federation.toml`. `sites` has for each site, client 0 first, the file of its public key."""

    experiment: str
    sites: dict[str, str] = Field(min_length=1)
    ca: str
    certificate: str
    key: str
    host: str = "0.0.0.0"
    port: Port = 9092
    out: str | None = None
    """The run directory; by default a new one in runs/, or this experiment's latest that is not complete."""
    state: str = "state"
    """A folder for Flower's database, logs and own files."""
    attempts: Positive = 3
    """How often a run that failed is begun again before the next finished round."""
    wait: Annotated[float, Field(gt=0)] = 600.0
    """Seconds that the server waits for sites before the first round."""
    timeout: Annotated[float, Field(gt=0)] = 3600.0
    """Seconds that a round may take."""
    rejoin: Annotated[float, Field(ge=0)] = 30.0
    """How many of them it waits for a site that is away."""

    @field_validator("sites")
    @classmethod
    def _fit(cls, sites: dict[str, str]) -> dict[str, str]:
        for name in sites:
            site_name(name)
        return sites


_File = TypeVar("_File", SiteFile, FederationFile)


def _read(path: Path, kind: type[_File], paths: tuple[str, ...]) -> _File:
    raw = configs.read(path)
    try:
        found = kind.model_validate(raw)
    except ValidationError as error:
        known = kind.model_fields
        raise ConfigError(f"{path}: {explain(error, '', lambda at: known if not at else {})}") from None
    folder = path.resolve().parent
    whole = {key: str(folder / getattr(found, key)) for key in paths}
    for key in paths:
        if key != "state" and not Path(whole[key]).is_file():
            raise ConfigError(f"{path}: {key}: there is no file {whole[key]}.")
    return found.model_copy(update=whole)


def _at(folder: Path, task: dict[str, Any]) -> dict[str, Any]:
    """The task's options with paths made whole: what is there under the folder."""
    made: dict[str, Any] = {key: str(folder / value) if _is_path(folder, value) else value for key, value in task.items()}
    if made.get("name") == "jsonl":  # one of its files is enough for who reads only that
        made = {"train": made.get("test"), "test": made.get("train")} | made
    companion = made.get("companion")
    if isinstance(companion, dict):
        made["companion"] = _at(folder, companion)
    return {key: value for key, value in made.items() if value is not None}


def _is_path(folder: Path, value: Any) -> bool:
    return isinstance(value, str) and value != "" and len(value) < 500 and "\0" not in value and (folder / value).exists()


def read_site(path: Path) -> SiteFile:
    """Raises ConfigError, naming the key, for what is wrong with it, and where a file that it names is missing."""
    found = _read(path, SiteFile, ("ca", "key", "state"))
    task = _at(path.resolve().parent, found.task.model_dump(exclude_none=True))
    return found.model_copy(update={"task": TaskTable.model_validate(task)})


def read_federation(path: Path) -> tuple[FederationFile, Experiment]:
    """The file, and its experiment with the sites put in. Raises ConfigError for what is wrong with either."""
    found = _read(path, FederationFile, ("experiment", "ca", "certificate", "key", "state"))
    folder = path.resolve().parent
    sites = {name: str(folder / key) for name, key in found.sites.items()}
    for name, key in sites.items():
        if not Path(key).is_file():
            raise ConfigError(f"{path}: sites.{name}: there is no file {key}.")
    where = Path(found.experiment)
    raw = configs.read(where)
    raw["fleet"] = {"name": "flower", "sites": list(sites)} | {k: getattr(found, k) for k in ("wait", "timeout", "rejoin")}
    if isinstance(raw.get("task"), dict):
        raw["task"] = _at(where.parent, raw["task"])
    experiment = with_defaults(configs.validate(raw, str(where)))
    return found.model_copy(update={"sites": sites, "out": found.out and str(folder / found.out)}), experiment


__all__ = ["NAME_RULE", "FederationFile", "SiteFile", "read_federation", "read_site", "site_name"]
