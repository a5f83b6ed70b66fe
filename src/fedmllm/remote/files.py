"""`site.toml`, what one site is, and `federation.toml`, what a server serves. Paths are relative to the file they stand in."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator

from fedmllm import config as files
from fedmllm.config import Experiment, Table, TaskTable
from fedmllm.data.samples import MODALITIES, Modality
from fedmllm.errors import ConfigError
from fedmllm.experiment.parts import options_of, with_defaults
from fedmllm.registry import explain
from fedmllm.remote.site import Own

PATHS = ("data_dir", "train", "test")
"""Options of tasks that are paths."""


class SiteTable(Table):
    """A site: its name in the federation, the data it holds, what of it is used, and whom it trusts.

    `superlink` is the server's host:port, `ca` the certificate of the authority that signed the server's, `key` this site's
    private key.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
    superlink: Annotated[str, Field(pattern=r"^.+:\d+$")]
    ca: str
    key: str
    modalities: Annotated[tuple[Modality, ...], Field(strict=False, min_length=1)] = MODALITIES
    task: TaskTable | None = None
    jsonl: str | None = None
    """A file of samples, in place of a whole `task` table."""
    jsonl_test: str | None = None
    """Another, to test on; it goes with `jsonl`."""
    device: str = "auto"
    model: str = ""
    trust_remote_code: bool = False
    secure: bool = False
    """Take part only in experiments whose `secure` hides updates from the server."""
    state: str = "state"
    """Where clients' memory, features of pictures and Flower's files go."""


class FederationTable(Table):
    """A server: where it listens, its certificate, the sites' public keys in the order of the clients, and the experiment."""

    experiment: str
    address: Annotated[str, Field(pattern=r"^.+:\d+$")] = "0.0.0.0:9092"
    ca: str
    certificate: str
    key: str
    sites: dict[str, str]
    state: str = "state"
    retries: Annotated[int, Field(ge=0)] = 5
    """How often a run is submitted again after rounds that came to nothing; a round that counts starts the count anew."""

    @field_validator("sites")
    @classmethod
    def _some(cls, sites: dict[str, str]) -> dict[str, str]:
        if not sites:
            raise ValueError("name at least one site with its public key")
        return sites


def _read(table: type[Table], path: Path) -> Any:
    try:
        return table.model_validate(files.read(path))
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, '', lambda _: table.model_fields)}") from None


def _existing(path: Path, name: str, where: Path) -> Path:
    found = where.parent / path
    if not found.is_file():
        raise ConfigError(f"{where}: {name} = {str(path)!r}: there is no such file.")
    return found.resolve()


def _secret(path: Path, where: Path) -> Path:
    if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"{where}: {path} is a private key that others on this machine may read; `chmod 600 {path}`.")
    return path


def _host_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)


class SiteFile:
    """A site file whose paths are there. Raises ConfigError for what is wrong with it; reads no data."""

    def __init__(self, path: Path) -> None:
        table: SiteTable = _read(SiteTable, path)
        if (table.task is None) == (table.jsonl is None):
            raise ConfigError(f"{path}: give either a [task] table or jsonl, the name of a file of samples.")
        if table.jsonl_test and not table.jsonl:
            raise ConfigError(f"{path}: jsonl_test goes with jsonl; a [task] table names its own test data.")
        self.path, self.name, self.superlink = path.resolve(), table.name, table.superlink
        self.ca = _existing(Path(table.ca), "ca", path)
        self.key = _secret(_existing(Path(table.key), "key", path), path)
        self.state = (path.parent / table.state).resolve()
        task = table.task or TaskTable(name="jsonl", train=table.jsonl, test=table.jsonl_test or table.jsonl)  # type: ignore[call-arg]
        tests = bool(table.task or table.jsonl_test)
        local = table.model if not table.model or not (path.parent / table.model).is_dir() else path.parent / table.model
        has = frozenset(table.modalities)
        self.own = Own(
            table.name, _at_home(task, path), has, table.device, table.trust_remote_code, tests, str(local), table.secure
        )


def _at_home(task: TaskTable, path: Path) -> TaskTable:
    """The task with its paths made absolute."""

    def absolute(values: Mapping[str, Any]) -> dict[str, Any]:
        return {k: str((path.parent / v).resolve()) if k in PATHS and isinstance(v, str) else v for k, v in values.items()}

    raw = absolute(task.model_dump(mode="json", exclude_none=True))
    if isinstance(raw.get("companion"), dict):
        raw["companion"] = absolute(raw["companion"])
    return TaskTable.model_validate(raw)


class FederationFile:
    """A federation file whose paths are there, with its experiment. Raises ConfigError for what is wrong with it.

    The experiment's fleet becomes Flower, its clients the sites of this file in their order.
    """

    def __init__(self, path: Path, overrides: list[str]) -> None:
        from fedmllm.remote.keys import is_public_key

        table: FederationTable = _read(FederationTable, path)
        self.path, self.address, self.retries = path.resolve(), table.address, table.retries
        self.host, self.port = _host_port(table.address)
        self.ca = _existing(Path(table.ca), "ca", path)
        self.certificate = _existing(Path(table.certificate), "certificate", path)
        self.key = _secret(_existing(Path(table.key), "key", path), path)
        self.state = (path.parent / table.state).resolve()
        self.sites = {name: _existing(Path(key), f"sites.{name}", path) for name, key in table.sites.items()}
        for name, key in self.sites.items():
            if not is_public_key(key):
                raise ConfigError(f"{path}: sites.{name} = {table.sites[name]!r} is no public key of `fedmllm keys`.")
        self.experiment = self._experiment(path.parent / table.experiment, overrides)

    def _experiment(self, file: Path, overrides: list[str]) -> Experiment:
        raw, _ = files.apply_overrides(files.read(file), overrides, options_of)
        fleet = raw.get("fleet", {})
        options = fleet if fleet.get("name") == "flower" else {}
        named = options.get("sites", list(self.sites))
        if sorted(named) != sorted(self.sites):
            raise ConfigError(f"{file}: fleet.sites is {named}, and {self.path.name} has {list(self.sites)}; leave one out.")
        raw["fleet"] = {**options, "name": "flower", "sites": named}
        raw["partition"] = {"name": "iid", **raw.get("partition", {}), "clients": len(named)}
        train = raw.setdefault("train", {})
        train["clients_per_round"] = min(train.get("clients_per_round", len(named)), len(named))
        for table in (raw["task"], raw["task"].get("companion") or {}):
            for key in PATHS:
                if isinstance(table.get(key), str):
                    table[key] = str(Path(table[key]).absolute())  # the run's process has another working folder
        return with_defaults(files.validate(raw, str(file)))


__all__ = ["FederationFile", "FederationTable", "SiteFile", "SiteTable"]
