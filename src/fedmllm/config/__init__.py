"""The experiment file: its tables, reading and validating it, and the digest that identifies an experiment."""

from fedmllm.config.file import Setting, apply_overrides, apply_settings, parse_override, read, validate
from fedmllm.config.schema import (
    AdapterTable,
    ClientsTable,
    EvalTable,
    Experiment,
    LoraTable,
    ModelTable,
    Named,
    PartitionTable,
    Positive,
    Rate,
    Table,
    TaskTable,
    TrainTable,
)

__all__ = [
    "AdapterTable", "ClientsTable", "EvalTable", "Experiment", "LoraTable", "ModelTable", "Named",
    "PartitionTable", "Positive", "Rate", "Setting", "Table", "TaskTable", "TrainTable", "apply_overrides", "apply_settings",
    "parse_override", "read", "validate",
]  # fmt: skip
