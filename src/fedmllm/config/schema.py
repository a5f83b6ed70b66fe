"""The experiment file: TOML into frozen models, `key=value` overrides, and the digest that names an experiment.

The skeleton (which tables there are, the settings of the engine) is checked here; the options of a named part, such as
`alpha` of the Dirichlet partition, are checked by that part's registry when it is built.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fedmllm.kinds import Pattern

Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0)]


class Table(BaseModel):
    """A table whose keys are all known here."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Named(BaseModel):
    """A table {name, …}: what is not a field of the table is an option of the part called `name`."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)
    name: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class TaskTable(Named):
    train_samples: Positive | None = None
    """Keep a seeded draw of this many training samples."""
    test_samples: Positive | None = None
    on_bad_sample: Literal["error", "skip"] = "error"
    companion: TaskTable | None = None
    """A second task whose samples join the first: the text-only source beside a picture task."""


class PartitionTable(Named):
    clients: Positive = 10
    min_samples: Positive = 1


class ClientsTable(Table):
    rank: Annotated[tuple[Positive, ...], Field(strict=False)] = ()
    """LoRA ranks: client k has the entry k modulo their number. Empty: all have `model.lora.rank`, which none may exceed."""


class LoraTable(Table):
    rank: Positive = 8
    alpha: Rate = 8.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target: str | None = None
    """A regular expression over module names; by default the model family's: q, k, v, o of the text model's attention."""


class AdapterTable(Table):
    kind: Literal["lora", "rslora", "dora", "ia3", "prompt-tuning"] = "lora"
    """What is trained. The first three take their settings from `model.lora`."""
    virtual_tokens: Positive = 8
    """Learned vectors in front of every prompt, for "prompt-tuning"."""


class ModelTable(Table):
    name: str = "pocket"
    """"pocket", a Hugging Face id, or a local folder."""
    adapter: AdapterTable = AdapterTable()
    lora: LoraTable = LoraTable()
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = "auto"
    cache_features: bool = True
    quantize: Literal["none", "4bit"] = "none"
    """"4bit" keeps the frozen weights as nf4 (bitsandbytes, on a GPU)."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""


class TrainTable(Table):
    rounds: Positive = 10
    clients_per_round: Positive = 2
    min_updates: Positive = 1
    """A round fails when fewer usable updates than this come back."""
    epochs: Positive = 1
    batch_size: Positive = 4
    accumulate: Positive = 1
    """Batches whose gradients add up to one optimizer step."""
    cohort: Positive | Literal["auto"] = "auto"
    """Clients that train in one pass; their results are the same as one by one. "auto": as many as fit and as pay."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: Rate = 1e-3
    schedule: Literal["cosine", "constant"] = "cosine"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    max_length: Positive = 1200
    """A longer prompt is a bad sample."""


class EvalTable(Table):
    every: Annotated[int, Field(ge=0)] = 0
    """Evaluate after every so many rounds as well as at the end; 0: at the end only."""
    patterns: Annotated[tuple[Pattern, ...], Field(strict=False, min_length=1)] = ("both",)
    split: Literal["test", "validation"] = "test"
    """"validation" holds a share of the training data out and leaves the test set alone: for choosing settings."""
    validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    batch_size: Positive = 64
    bootstrap: Positive = 1000
    max_new_tokens: Positive = 16
    clients: Positive | None = None
    """Where each client has a model of its own, evaluate a seeded draw of this many; by default all."""
    transfer: Annotated[tuple[TaskTable, ...], Field(strict=False, min_length=1)] | None = None
    """Other tasks whose test sets the final model meets as well; nothing is trained on them."""

    @field_validator("transfer")
    @classmethod
    def _each_task_once(cls, tables: tuple[TaskTable, ...] | None) -> tuple[TaskTable, ...] | None:
        names = [table.name for table in tables or ()]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"names {min(twice)!r} twice; give each task once")
        return tables


class Experiment(Table):
    """A whole experiment file. `Experiment.model_json_schema()` documents it for editors."""

    name: str = "experiment"
    seed: Annotated[int, Field(ge=0)] = 0
    task: TaskTable
    partition: PartitionTable = PartitionTable(name="iid")
    scenario: Named = Named(name="aligned")
    clients: ClientsTable = ClientsTable()
    prompt: Named = Named(name="modality-agnostic")
    model: ModelTable = ModelTable()
    algorithm: Named = Named(name="fedavg")
    regularization: Named = Named(name="none")
    compression: Named = Named(name="none")
    secure: Named = Named(name="none")
    train: TrainTable = TrainTable()
    eval: EvalTable = EvalTable()
    judge: Named = Named(name="none")
    fleet: Named = Named(name="in-process")

    @model_validator(mode="before")
    @classmethod
    def _default_parts(cls, tables: Any) -> Any:
        """A table that sets options without a name means the default part."""
        if not isinstance(tables, dict):
            return tables
        defaults = {key: field.default.name for key, field in cls.model_fields.items() if isinstance(field.default, Named)}
        unnamed = {key for key, table in tables.items() if key in defaults and isinstance(table, dict) and "name" not in table}
        return tables | {key: {"name": defaults[key], **tables[key]} for key in unnamed}

    @field_validator("name")
    @classmethod
    def _usable_as_folder(cls, name: str) -> str:
        if not name or any(c in name for c in "/\\\0") or name.startswith("."):
            raise ValueError("must be usable as a folder's name")
        return name

    @model_validator(mode="after")
    def _sampled_clients_exist(self) -> Experiment:
        if self.train.clients_per_round > self.partition.clients:
            raise ValueError(
                f"train.clients_per_round = {self.train.clients_per_round} is more than "
                f"partition.clients = {self.partition.clients}"
            )
        if self.train.min_updates > self.train.clients_per_round:
            raise ValueError(
                f"train.min_updates = {self.train.min_updates} is more than "
                f"train.clients_per_round = {self.train.clients_per_round}"
            )
        if self.model.lora.target is not None and self.model.adapter.kind in ("ia3", "prompt-tuning"):
            raise ValueError(f"model.lora.target is set and model.adapter.kind = {self.model.adapter.kind!r} does not use it")
        highest = max(self.clients.rank, default=0)
        if highest > self.model.lora.rank:
            raise ValueError(f"clients.rank = {highest} is more than model.lora.rank = {self.model.lora.rank}, the server's")
        return self

    def rank_of(self, client: int) -> int:
        """The client's LoRA rank."""
        ranks = self.clients.rank
        return ranks[client % len(ranks)] if ranks else self.model.lora.rank

    def resolved(self) -> dict[str, Any]:
        """All settings, defaults filled in, as plain values; keys that are None are left out."""
        return {key: _without_none(value) for key, value in self.model_dump(mode="json").items() if value is not None}

    def toml(self) -> str:
        return tomli_w.dumps(self.resolved())

    def digest(self) -> str:
        """SHA-256 of the resolved settings: two files that mean the same experiment have the same digest."""
        return hashlib.sha256(json.dumps(self.resolved(), sort_keys=True).encode()).hexdigest()


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(entry) for key, entry in value.items() if entry is not None}
    return [_without_none(entry) for entry in value] if isinstance(value, list) else value
