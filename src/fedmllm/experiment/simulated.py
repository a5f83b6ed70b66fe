"""Which settings exclude simulated devices. Every check raises ConfigError with the reason and a way out."""

from __future__ import annotations

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
