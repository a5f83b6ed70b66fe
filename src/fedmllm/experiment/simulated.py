"""Which settings exclude simulated devices. Every check raises ConfigError with the reason and a way out."""

from __future__ import annotations

from fedmllm.algorithms import Algorithm
from fedmllm.algorithms.asynchronous import Asynchronous
from fedmllm.algorithms.toy_federation import run_rounds
from fedmllm.algorithms.traffic import keeps_memory
from fedmllm.config import Experiment
from fedmllm.errors import ConfigError
from fedmllm.simulation.devices import devices_of


def check_devices(config: Experiment) -> None:
    """Devices are simulated where clients are, and only those that answer may share in a masked sum."""
    devices = devices_of(config.clients, config.partition.clients, config.seed)
    if reason := _unselectable(config, bool(devices)):
        raise ConfigError(f"train.{reason}.")
    if not devices:
        return
    if config.fleet.name == "flower":
        raise ConfigError(
            'clients.profile and the like simulate devices, and fleet.name = "flower" trains on real ones; leave them out, or '
            'set fleet.name = "in-process".'
        )
    if config.secure.name != "none" and any(device.dropout for device in devices):
        raise ConfigError(
            f"clients.dropout: a masked round of secure.name = {config.secure.name!r} must not shrink to a single client; set "
            'clients.dropout = [0.0] or secure.name = "none".'
        )


def _unselectable(config: Experiment, clock: bool) -> str:
    """Why the experiment excludes how [train] chooses clients, and what to do; empty if it does not."""
    train = config.train
    changed = {
        f"selection = {train.selection!r}": train.selection != "uniform",
        f"over_select = {train.over_select}": train.over_select > 0,
        f"deadline = {train.deadline}": train.deadline is not None,
    }
    names = [name for name, is_set in changed.items() if is_set]
    on_clock = [name for name in names if "power" not in name]
    if train.candidates is not None and train.selection != "power-of-choice":
        return 'candidates is for train.selection = "power-of-choice" alone; leave it out'
    if train.candidates is not None and not train.clients_per_round <= train.candidates <= config.partition.clients:
        return (
            f"candidates = {train.candidates} must be at least train.clients_per_round = {train.clients_per_round} and at most "
            f"partition.clients = {config.partition.clients}"
        )
    if train.late == "partial" and train.deadline is None:
        return 'late = "partial" is for clients that train.deadline is too early for; set a deadline, or leave it out'
    if on_clock and not clock:
        return (
            f'{on_clock[0]} needs a virtual clock, and [clients] describes no devices; set clients.profile = "phone" or others'
        )
    if names and config.privacy.name != "none":
        return (
            f"{names[0]} lets clients decide who else counts, and privacy.name = {config.privacy.name!r} needs a draw that "
            "depends on nobody; leave it out"
        )
    if names and config.fleet.name == "flower":
        return f'{names[0]} is for simulations, and the sites of fleet.name = "flower" check the uniform draw; leave it out'
    hidden = [name for name in names if "over_select" not in name]
    if hidden and config.secure.name != "none":
        return (
            f"{hidden[0]} needs the losses of single clients or may leave a single one, which secure.name = "
            f"{config.secure.name!r} must not show; leave it out"
        )
    return ""


def check_asynchronous(config: Experiment, algorithm: Algorithm, asynchronous: Asynchronous) -> None:
    """Asynchronous rounds need a clock, and an algorithm that averages adapters which all started from the server's."""
    reason = _needs_rounds(config) or _needs_cohort(config, algorithm)
    if not reason and asynchronous.buffer > config.partition.clients:
        reason = (
            f"uses each client once in a step, and buffer = {asynchronous.buffer} is more than partition.clients = "
            f"{config.partition.clients}; lower it"
        )
    if not reason and config.train.min_updates > asynchronous.buffer:
        reason = (
            f"makes steps of {asynchronous.buffer} updates, fewer than train.min_updates = {config.train.min_updates}; lower it"
        )
    if reason:
        raise ConfigError(f"asynchronous.name: {config.asynchronous.name!r} {reason}.")


def _needs_rounds(config: Experiment) -> str:
    """Which setting belongs to synchronous rounds, and what to do; empty if none."""
    train = config.train
    if config.fleet.name == "flower":
        return (
            'goes by a virtual clock, and fleet.name = "flower" trains on real clients and waits for all of a round; set it to '
            '"in-process" or "ray"'
        )
    if not devices_of(config.clients, 1, config.seed):
        return 'needs a virtual clock, and [clients] describes no devices; set clients.profile = "phone" or others'
    if config.secure.name != "none":
        return f'adds up what arrives, and secure.name = {config.secure.name!r} masks the updates of a round; set one to "none"'
    if config.privacy.name != "none":
        return (
            f'uses whoever arrives, and privacy.name = {config.privacy.name!r} needs a draw for each round; set one to "none"'
        )
    if config.robust.name != "none":
        return (
            f"weighs updates from different models, whose distances say how late they are, and robust.name = "
            f'{config.robust.name!r} would take late clients for bad ones; set one of them to "none"'
        )
    if train.selection != "uniform" or train.over_select or train.deadline is not None:
        return "waits for no round, so leave out train.selection, train.over_select and train.deadline"
    return ""


def _needs_cohort(config: Experiment, algorithm: Algorithm) -> str:
    """Why the algorithm needs updates that started from the same model, and what to do; empty if it does not."""
    name, instead = config.algorithm.name, 'choose an algorithm that averages adapters, such as "fedavg" or "fedadam"'
    if config.compression.name != "none":
        return f'weighs adapters, and compression.name = {config.compression.name!r} packs their changes; set it to "none"'
    if algorithm.personal:
        return f"has one model for all, and algorithm.name = {name!r} leaves part of it with each client; {instead}"
    if algorithm.averages is None or algorithm.summed != ("adapter",):
        return f"weighs single adapters, and algorithm.name = {name!r} does more than average them; {instead}"
    if algorithm.refactors:
        return f"compares adapters of several steps, and algorithm.name = {name!r} makes new factors in each; {instead}"
    if keeps_memory(algorithm):
        return f"has no rounds that clients could remember, as algorithm.name = {name!r} lets them; {instead}"
    uploads = {frozenset(u.groups["adapter"]) for _, updates, _, _ in run_rounds(algorithm, rounds=2) for u in updates}
    if len(uploads) > 1:
        return f"adds up updates of several rounds, and in algorithm.name = {name!r} they have different tensors; {instead}"
    return ""
