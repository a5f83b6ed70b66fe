"""What of an experiment cannot be had together with secure aggregation, and why."""

from __future__ import annotations

from importlib.util import find_spec

from fedmllm.algorithms import Algorithm, algorithms
from fedmllm.config import Experiment
from fedmllm.errors import ConfigError
from fedmllm.secure.fixed import FixedPoint
from fedmllm.secure.settings import Pairwise, secures


def chosen(config: Experiment, algorithm: Algorithm) -> Pairwise | None:
    """The settings of `[secure]`, None where nothing is hidden. Raises ConfigError for what needs single updates."""
    settings, name = secures.build(config.secure.name, config.secure.options), config.secure.name
    if settings is None:
        return None
    if why := _needs_single_updates(config, algorithm):
        raise ConfigError(f"secure.name: {name!r} shows the server only the mean of updates, and {why}.")
    if not all(find_spec(library) for library in ("cryptography", "Crypto")):
        raise ConfigError(f'secure.name: {name!r} needs two libraries more; pip install "fedmllm[secure]".')
    assert algorithm.averages is not None
    try:
        FixedPoint.of(settings, config.train.clients_per_round, algorithm.averages)
    except ValueError as error:
        raise ConfigError(f"{error}.") from None
    return settings


def _needs_single_updates(config: Experiment, algorithm: Algorithm) -> str:
    compression, name = config.compression.name, config.algorithm.name
    if compression != "none":
        return f'compression.name = {compression!r} makes updates that must be unpacked one by one; set it to "none"'
    if algorithm.personal:
        return f"algorithm.name = {name!r} has every client's own adapter sent to be tested; choose one model for all"
    if algorithm.averages is None:
        every = {n: algorithms.build(n, {}) for n in algorithms.names()}
        able = ", ".join(n for n, one in every.items() if one.averages and not one.personal)
        return f"algorithm.name = {name!r} works on single ones; choose one of {able}"
    if config.fleet.options.get("evaluate"):
        return "fleet.evaluate = true has every site's own figures sent; set it to false"
    if config.train.clients_per_round < 2:
        return "the mean of one is that one; set train.clients_per_round to 2 at least"
    return ""


__all__ = ["chosen"]
