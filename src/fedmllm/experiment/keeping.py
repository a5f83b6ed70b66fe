"""Which settings exclude a choice among the models of a run. Raises ConfigError with the reason and a way out."""

from __future__ import annotations

from fedmllm.algorithms import Algorithm
from fedmllm.algorithms.toy_federation import run_rounds
from fedmllm.config import Experiment
from fedmllm.errors import ConfigError


def check_keeping(config: Experiment, algorithm: Algorithm) -> None:
    """Rounds are chosen by scores on held-out training data, and averaged where a mean of adapters is a model."""
    if reason := _pointless(config) or _without_scores(config) or _without_model(config, algorithm):
        raise ConfigError(f"{reason}.")


def _pointless(config: Experiment) -> str:
    """Which setting has no effect, and what to do; empty if none."""
    train, tests = config.train, config.eval
    if train.mean_of is not None and train.keep != "mean":
        return f'train.mean_of is for train.keep = "mean", and it is {train.keep!r}; leave it out'
    if tests.every == 0 and tests.every_split == "validation":
        return 'eval.every_split = "validation" holds out data to score rounds on, and eval.every = 0 scores none; set it to 1'
    if tests.every == 0 and tests.every_samples is not None:
        return (
            "eval.every_samples is for the rounds that are scored, and eval.every = 0 scores none; set it to 1 or leave it out"
        )
    return ""


def _without_scores(config: Experiment) -> str:
    """Why rounds cannot be chosen by their scores, and what to do; empty if they can, or need not."""
    train, name = config.train, config.privacy.name
    setting = 'train.keep = "best"' if train.keep == "best" else f"train.patience = {train.patience}"
    if train.keep != "best" and train.patience is None:
        return ""
    if config.eval.every == 0:
        return f"{setting} goes by the scores of rounds, and eval.every = 0 scores none; set it to 1"
    if not config.eval.holds_out:
        return (
            f"{setting} would go by scores on the test set, which then says too much of the model; set "
            'eval.every_split = "validation" to score rounds on held-out training data'
        )
    if name != "none":
        return (
            f"{setting} lets held-out samples of clients decide which model is published, which the ε of "
            f'privacy.name = {name!r} does not cover; leave it out, or set train.keep = "mean", which costs no privacy'
        )
    return ""


def _without_model(config: Experiment, algorithm: Algorithm) -> str:
    """Why the algorithm has no such model to keep, and what to do; empty if it has."""
    keep, name = config.train.keep, config.algorithm.name
    if keep != "last" and algorithm.personal:
        return (
            f"train.keep = {keep!r} keeps the server's model, and algorithm.name = {name!r} leaves part of each model with its "
            'client, who remembers the last round only; set it to "last"'
        )
    if keep == "mean" and algorithm.refactors:
        return (
            f'train.keep = "mean" averages the adapters of several rounds, and algorithm.name = {name!r} makes new factors in '
            'each, whose entries mean something else; choose another algorithm, or keep "best" or "last"'
        )
    if keep == "mean" and not algorithm.needs_core and any("fold" in state for *_, state, _ in run_rounds(algorithm, rounds=1)):
        return (
            f'train.keep = "mean" averages adapters, and algorithm.name = {name!r} also changes the base weights, by what is '
            'right for a single adapter; choose another algorithm, or keep "best" or "last"'
        )
    return ""
