"""`site.toml` describes a site, `federation.toml` a server. Paths are relative to the file that contains them."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator

from fedmllm import config as files
from fedmllm.config import Experiment, Table, TaskTable
from fedmllm.data.files import is_file, is_folder
from fedmllm.data.manifest import Holding
from fedmllm.data.samples import MODALITIES, Modality, Sample
from fedmllm.errors import ConfigError
from fedmllm.experiment.parts import options_of, with_defaults
from fedmllm.registry import explain
from fedmllm.remote.limits import Limits
from fedmllm.storage.atomic import check_folder

PATHS = ("data_dir", "train", "test")
"""Options of tasks that are paths."""


@dataclass(frozen=True)
class SiteData:
    """A site's own data and settings: `modalities` are those that may be used. If `secure`, the site takes part only in runs
    whose server cannot see its updates; under hidden updates, `min_peers` clients at least are sampled in a round."""

    name: str
    task: TaskTable
    modalities: frozenset[Modality] = frozenset(MODALITIES)
    device: str = "auto"
    trust_remote_code: bool = False
    has_test_data: bool = False
    model: str = ""
    """The model on this machine, if it is not where the experiment says."""
    secure: bool = False
    min_peers: int = 3
    limits: Limits = field(default_factory=Limits)

    def holdings(self, samples: Sequence[Sample], client: int) -> list[Holding]:
        """The samples as those of a client, limited to the modalities that may be used."""
        held = [Holding(sample.id, client, sample.modalities & self.modalities) for sample in samples]
        return [holding for holding in held if holding.visible]


class SiteTable(Table):
    """A site: its name in the federation, its data, the modalities that may be used, and whom it trusts.

    `superlink` is the server's host:port, `ca` the certificate of the authority that signed the server's certificate, `key`
    this site's private key.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
    superlink: Annotated[str, Field(pattern=r"^.+:\d+$")]
    ca: str
    key: str
    modalities: Annotated[tuple[Modality, ...], Field(strict=False, min_length=1)] = MODALITIES
    task: TaskTable | None = None
    jsonl: str | None = None
    """A file of samples, instead of a whole `task` table."""
    jsonl_test: str | None = None
    """A file of samples to test on; requires `jsonl`."""
    device: str = "auto"
    model: str = ""
    trust_remote_code: bool = False
    secure: bool = False
    """Take part only in experiments whose `secure` hides updates from the server."""
    min_peers: Annotated[int, Field(ge=2)] = 3
    """Where updates are hidden: the smallest number of sampled clients in whose sum this site's update may be."""
    limits: Limits = Limits()
    state: str = "state"
    """The folder for client memory, features of pictures and Flower's files; no other user may read it."""


class FederationTable(Table):
    """A server: its address and certificate, the sites' public keys in the order of the clients, and the experiment."""

    experiment: str
    address: Annotated[str, Field(pattern=r"^.+:\d+$")] = "0.0.0.0:9092"
    ca: str
    certificate: str
    key: str
    sites: dict[str, str]
    state: str = "state"
    retries: Annotated[int, Field(ge=0)] = 5
    """How often in a row a failed run is submitted again without a new round."""

    @field_validator("sites")
    @classmethod
    def _at_least_one(cls, sites: dict[str, str]) -> dict[str, str]:
        if not sites:
            raise ValueError("name at least one site with its public key")
        return sites


def _read(table: type[Table], path: Path, kind: files.FileKind) -> Any:
    try:
        return table.model_validate(files.read(path, kind))
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, '', partial(files.keys_at, model=table))}") from None


def _existing(path: Path, name: str, where: Path) -> Path:
    file = where.parent / path
    if not is_file(file):
        raise ConfigError(f"{where}: {name} = {str(path)!r}: there is no such file.")
    return file.resolve()


def _secret(path: Path, where: Path) -> Path:
    if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(
            f"{where}: {path} is a private key that other users of this machine may read; run `chmod 600 {path}`."
        )
    return path


def private_folder(path: Path, where: Path) -> Path:
    """The folder, created with permissions 0700. Raises ConfigError if other users may open it, RunError if nothing can be
    written to it."""
    check_folder(path)
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.stat()
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"{where}: other users of this machine may open the folder {path}; run `chmod 700 {path}`.")
    if status.st_uid != os.geteuid():
        raise ConfigError(f"{where}: the folder {path} belongs to another user; choose another `state`, or change its owner.")
    return path


class SiteFile:
    """A site file whose paths exist. Raises ConfigError for the first thing that is wrong; reads no data."""

    def __init__(self, path: Path) -> None:
        table: SiteTable = _read(SiteTable, path, "site")
        if (table.task is None) == (table.jsonl is None):
            raise ConfigError(f"{path}: give either a [task] table or jsonl, the name of a file of samples.")
        if table.jsonl_test and not table.jsonl:
            raise ConfigError(f"{path}: jsonl_test requires jsonl; a [task] table names its own test data.")
        self.path, self.name, self.superlink = path.resolve(), table.name, table.superlink
        self.ca = _existing(Path(table.ca), "ca", path)
        self.key = _secret(_existing(Path(table.key), "key", path), path)
        self.state = (path.parent / table.state).resolve()
        task = table.task or TaskTable(name="jsonl", train=table.jsonl, test=table.jsonl_test or table.jsonl)  # type: ignore[call-arg]
        model = path.parent / table.model
        self.data = SiteData(
            name=table.name,
            task=_with_absolute_paths(task, path),
            modalities=frozenset(table.modalities),
            device=table.device,
            trust_remote_code=table.trust_remote_code,
            has_test_data=bool(table.task or table.jsonl_test),
            model=str(model) if table.model and is_folder(model) else table.model,
            secure=table.secure,
            min_peers=table.min_peers,
            limits=table.limits.beside(path.parent.resolve()),
        )


def _with_absolute_paths(task: TaskTable, path: Path) -> TaskTable:
    """The task with paths that do not depend on the location of the file at `path`."""

    def absolute(values: Mapping[str, Any]) -> dict[str, Any]:
        return {k: str((path.parent / v).resolve()) if k in PATHS and isinstance(v, str) else v for k, v in values.items()}

    raw = absolute(task.model_dump(mode="json", exclude_none=True))
    if isinstance(raw.get("companion"), dict):
        raw["companion"] = absolute(raw["companion"])
    return TaskTable.model_validate(raw)


class FederationFile:
    """A federation file whose paths exist, with its experiment. Raises ConfigError for the first thing that is wrong.

    The experiment's fleet is set to Flower, and its clients to the sites of this file in their order.
    """

    def __init__(self, path: Path, overrides: list[str]) -> None:
        from fedmllm.remote.keys import is_public_key

        table: FederationTable = _read(FederationTable, path, "federation")
        self.path, self.address, self.retries = path.resolve(), table.address, table.retries
        self.host, _, port = table.address.rpartition(":")
        self.port = int(port)
        self.ca = _existing(Path(table.ca), "ca", path)
        self.certificate = _existing(Path(table.certificate), "certificate", path)
        self.key = _secret(_existing(Path(table.key), "key", path), path)
        self.state = (path.parent / table.state).resolve()
        self.sites = {name: _existing(Path(key), f"sites.{name}", path) for name, key in table.sites.items()}
        for name, key in self.sites.items():
            if not is_public_key(key):
                raise ConfigError(f"{path}: sites.{name} = {table.sites[name]!r} is not a public key made by `fedmllm keys`.")
        self.experiment = self._experiment(path.parent / table.experiment, overrides)

    def _experiment(self, file: Path, overrides: list[str]) -> Experiment:
        settings = [files.parse_override(override) for override in overrides]
        raw, _ = files.apply_settings(files.read(file), settings, options_of)
        with files.blaming(str(file), settings):
            with suppress(AttributeError, KeyError, TypeError):  # a value of a wrong type, which is named below
                self._adopt(raw)
            return with_defaults(files.validate(raw))

    def _adopt(self, raw: dict[str, Any]) -> None:
        """Set fleet and clients, and make paths absolute, because the process of the run has another working folder."""
        fleet = raw.get("fleet", {})
        options = fleet if fleet.get("name") == "flower" else {}
        names = options.get("sites", list(self.sites))
        if sorted(names) != sorted(self.sites):
            raise ConfigError(
                f"fleet.sites is {names}, but {self.path.name} names {list(self.sites)}; remove fleet.sites, or name the same "
                "sites."
            )
        raw["fleet"] = {**options, "name": "flower", "sites": names}
        raw["partition"] = {"name": "iid", **raw.get("partition", {}), "clients": len(names)}
        train = raw.setdefault("train", {})
        train["clients_per_round"] = min(train.get("clients_per_round", len(names)), len(names))
        for table in (raw["task"], raw["task"].get("companion") or {}):
            for key in PATHS:
                if isinstance(table.get(key), str):
                    table[key] = str(Path(table[key]).absolute())
        if isinstance(folder := raw.get("track", {}).get("folder"), str):
            raw["track"] = {**raw["track"], "folder": str(Path(folder).absolute())}
