"""Federated algorithms, one file each, server half and client half together. They work on tensors and know no model."""

from fedmllm.algorithms.base import (
    AdapterInfo,
    Algorithm,
    ClientInfo,
    LocalResult,
    LocalRule,
    OwnTraining,
    RoundInfo,
    Update,
    algorithms,
    complete,
    compressions,
    failed,
    own_adapter,
    regularizations,
)

__all__ = [
    "AdapterInfo", "Algorithm", "ClientInfo", "LocalResult", "LocalRule", "OwnTraining", "RoundInfo", "Update", "algorithms",
    "complete", "compressions", "failed", "own_adapter", "regularizations",
]  # fmt: skip
