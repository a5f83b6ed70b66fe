"""The experiment file: its tables, reading and validating it, and the digest that identifies an experiment."""

from fedmllm.config.base import FolderName, Named, Positive, Seed, Table
from fedmllm.config.clients import ClientsTable
from fedmllm.config.file import (
    FileKind,
    Setting,
    apply_settings,
    blaming,
    flattened,
    keys_at,
    parse_override,
    read,
    validate,
)
from fedmllm.config.model import AdapterTable, LoraTable, ModelTable
from fedmllm.config.schema import (
    EvalTable,
    Experiment,
    PartitionTable,
    ScenarioTable,
    TaskTable,
)
from fedmllm.config.track import TrackTable
from fedmllm.config.train import TrainTable

__all__ = [
    "AdapterTable", "ClientsTable", "EvalTable", "Experiment", "FileKind", "FolderName", "LoraTable", "ModelTable", "Named",
    "PartitionTable", "Positive", "ScenarioTable", "Seed", "Setting", "Table", "TaskTable",
    "TrackTable", "TrainTable",
    "apply_settings", "blaming", "flattened", "keys_at", "parse_override", "read", "validate",
]  # fmt: skip
