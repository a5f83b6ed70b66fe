"""Which clients cannot take part in a federation, because training takes more memory than their devices have.

Only eligible devices check in with the server, as in Bonawitz et al. 2019, "Towards Federated Learning at Scale" (1902.01046).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress

from fedmllm.config import Experiment
from fedmllm.data.files import EntryError
from fedmllm.data.manifest import Holding
from fedmllm.data.prompts import Conversation
from fedmllm.errors import ConfigError
from fedmllm.experiment.parts import Parts
from fedmllm.models.encoded import Encoded
from fedmllm.simulation.devices import devices_of

GB = 1e9


def memory_of(config: Experiment) -> dict[int, float]:
    """client -> the bytes of memory of its device, where it is limited."""
    devices = devices_of(config.clients, config.partition.clients, config.seed)
    return {client: GB * device.memory for client, device in enumerate(devices) if device.memory < math.inf}


def longest(
    held: Iterable[Holding], talk: Callable[[Holding], Conversation], encode: Callable[[Holding], Encoded]
) -> Iterator[Encoded]:
    """Of the samples that show equally many pictures, or none, the one with the most characters, encoded.

    Encoding them all to find the one with the most tokens would take as long as if every client took part. Bad samples are
    passed over: they matter if their client is sampled.
    """
    letters: dict[int, list[tuple[int, Holding]]] = {}
    for holding in held:
        text = talk(holding)
        letters.setdefault(text.image, []).append((len(text.user) + len(text.answer), holding))
    for group in letters.values():
        for _, holding in sorted(group, key=lambda entry: -entry[0]):
            with suppress(EntryError):
                yield encode(holding)
                break


def who_lacks(config: Experiment, memory: Mapping[int, float], takes: Callable[[int], int]) -> tuple[frozenset[int], str]:
    """The clients in `memory` that have fewer bytes than training `takes` at their own batch size, and how much it takes, in
    words."""
    sizes = {client: config.train_of(client).batch_size for client in memory}
    needed = {size: takes(size) for size in sorted(set(sizes.values()))}
    lacking = frozenset(client for client, size in sizes.items() if memory[client] < needed[size])
    short = {sizes[client] for client in lacking}
    return lacking, " and ".join(f"{needed[size] / GB:.3g} GB at a batch of {size}" for size in needed if size in short)


def check_enough(parts: Parts, lacking: frozenset[int], takes: str) -> None:
    """Raises ConfigError if the other clients are fewer than the experiment needs, or if nobody may be left out."""
    config, train, clients = parts.config, parts.config.train, parts.config.partition.clients
    if parts.privacy is not None:
        raise ConfigError(
            f"clients.memory: training takes {takes}, for which {len(lacking)} of {clients} devices are too small, and "
            f"privacy.name = {config.privacy.name!r} needs a draw that depends on nobody; raise clients.memory."
        )
    needs = {
        "train.clients_per_round": train.clients_per_round,
        "train.candidates": train.candidates or 0,
        "asynchronous.buffer": parts.asynchronous.buffer if parts.asynchronous else 0,
    }
    left = clients - len(lacking)
    for name, count in needs.items():
        if count > left:
            raise ConfigError(
                f"{name} = {count}, and {left} of {clients} clients have the memory that training takes, {takes}; "
                f"raise clients.memory, or lower {name} or the batch size."
            )
