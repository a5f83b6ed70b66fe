"""Which settings exclude simulated devices. Every check raises ConfigError with the reason and a way out."""

from __future__ import annotations

from fedmllm.config import Experiment
from fedmllm.errors import ConfigError
from fedmllm.simulation.devices import devices_of


def check_devices(config: Experiment) -> None:
    """Devices are simulated where clients are, and only those that answer may share in a masked sum."""
    devices = devices_of(config.clients, config.partition.clients, config.seed)
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
