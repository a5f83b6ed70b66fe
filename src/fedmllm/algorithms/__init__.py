"""Federated algorithms, one file each, server half and client half together. They know tensors, not models."""

from fedmllm.algorithms.base import Algorithm, LocalResult, LocalRule, RoundInfo, Update, algorithms, regularizations

__all__ = ["Algorithm", "LocalResult", "LocalRule", "RoundInfo", "Update", "algorithms", "regularizations"]
