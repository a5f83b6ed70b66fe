"""Devices of simulated clients: how fast they train and transfer, when they can be reached, how often they fail, their memory.

Speeds are relative to the phone, which is assumed to train on one sample per second; the ratios are those of peak 16-bit
floating point operations (the NVIDIA cards' are dense, on tensor cores, accumulated in 32 bits). Which model is trained, and
how well it uses a device, is not modelled: give `clients.speed` where it is known. Mobile and fixed connections have the global
means of Ookla's Speedtest Global Index, September 2020. Phones fail as often as in Bonawitz et al. 2019, "Towards Federated
Learning at Scale" (1902.01046), who report 6 to 10 %. Everything else is an assumption: when devices can be reached, how often
the others fail, and the connection of the hospital.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from fedmllm.config import ClientsTable
from fedmllm.errors import ConfigError, suggest
from fedmllm.registry import Registry
from fedmllm.rng import stream

_PHONE = 1.43
"""TFLOPS of 4 graphics cores of Apple's A16, by which all speeds are divided."""


@dataclass(frozen=True)
class Device:
    """`speed` is in training samples per second, `downlink` and `uplink` in Mbit/s (10⁶ bits). `availability` is the share of
    the day in which the client can be reached, which the selection "available" heeds; `dropout` is the probability that it
    never answers in a round; `memory` is in GB (10⁹ bytes). What is not given costs no time and is no limit."""

    speed: float = math.inf
    downlink: float = math.inf
    uplink: float = math.inf
    availability: float = 1.0
    dropout: float = 0.0
    memory: float = math.inf

    def seconds(self, samples: int, down: int, up: int) -> tuple[float, float]:
        """(compute, transfer) in seconds, for a number of training samples and for bytes to and from the client."""
        return samples / self.speed, 8e-6 * (down / self.downlink + up / self.uplink)


devices: Registry[Device] = Registry("device", "fedmllm.simulation.devices")


@devices.register("phone")
def phone() -> Device:
    """A phone (Apple A16, 1.43 TFLOPS, 6 GB): 1 sample/s, 35.96 / 11.22 Mbit/s (mobile), 8 hours a day, 8 % drop-outs."""
    return Device(1.0, 35.96, 11.22, availability=1 / 3, dropout=0.08, memory=6.0)


@devices.register("laptop")
def laptop() -> Device:
    """A laptop (Apple M4, 3.01 TFLOPS, 16 GB): 2.1 samples/s, 85.73 / 45.74 Mbit/s (fixed), 8 hours a day, 5 % drop-outs."""
    return Device(3.01 / _PHONE, 85.73, 45.74, availability=1 / 3, dropout=0.05, memory=16.0)


@devices.register("workstation")
def workstation() -> Device:
    """A workstation (RTX 4090, 165.2 TFLOPS, 24 GB): 116 samples/s, 85.73 / 45.74 Mbit/s (fixed), all day, 1 % drop-outs."""
    return Device(165.2 / _PHONE, 85.73, 45.74, dropout=0.01, memory=24.0)


@devices.register("hospital-server")
def hospital_server() -> Device:
    """A hospital's server (A100, 312 TFLOPS, 80 GB): 218 samples/s, 1000 / 1000 Mbit/s, always available, no drop-outs."""
    return Device(312 / _PHONE, 1000.0, 1000.0, memory=80.0)


def devices_of(table: ClientsTable, clients: int, seed: int) -> list[Device]:
    """The device of each client, empty if the table describes none. Raises ConfigError for an unknown profile."""
    own = {key: values for key in Device.__dataclass_fields__ if (values := getattr(table, key))}
    if not own and not table.profile:
        return []
    for name in table.profile:
        if name not in devices.names():
            raise ConfigError(f"clients.profile: there is no device {name!r}; {suggest(name, devices.names())}")
    profiles = [devices.build(name, {}) for name in table.profile] or [Device()]
    numbers = [client % len(profiles) for client in range(clients)]
    if table.shares:
        shares = [share / sum(table.shares) for share in table.shares]
        numbers = stream(seed, "profiles").choice(len(profiles), size=clients, p=shares).tolist()
    made: dict[tuple[float, ...], Device] = {}  # a million clients have few different devices
    for_all = []
    for client, number in enumerate(numbers):
        values = tuple(entries[client % len(entries)] for entries in own.values())
        key = (number, *values)
        if key not in made:
            made[key] = replace(profiles[number], **dict(zip(own, values, strict=True)))
        for_all.append(made[key])
    return for_all
