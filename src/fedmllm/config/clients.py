"""The [clients] table: what clients' devices and adapters are like."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator

from fedmllm.config.base import BatchSize, Epochs, Positive, PositiveNumbers, Table


class ClientsTable(Table):
    rank: Annotated[tuple[Positive, ...], Field(strict=False)] = ()
    """LoRA ranks, such as `[4, 8, 16]`: client k has entry k modulo the length of the list. By default all have
    `model.lora.rank`, the server's, which none may exceed. Each client trains with its own scale, alpha / rank."""
    epochs: Annotated[tuple[Epochs, ...], Field(strict=False)] = ()
    """Passes over the client's data in a round, in the same way, such as `[1, 5]`. By default `train.epochs`."""
    batch_size: Annotated[tuple[BatchSize, ...], Field(strict=False)] = ()
    """Batch sizes, in the same way; by default `train.batch_size`."""
    profile: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """[Simulated devices](devices.md), by name: one, or a list of which client k has entry k modulo its length, or, with
    `shares`, one that is drawn from the seed."""
    shares: PositiveNumbers = ()
    """One share for each profile: every client's device is drawn from the seed in these proportions."""
    speed: PositiveNumbers = ()
    """Training samples per second. This and what follows replaces the profile's figure, for client k by entry k modulo the
    length of the list; what neither gives costs no time."""
    downlink: PositiveNumbers = ()
    """Mbit/s to the client."""
    uplink: PositiveNumbers = ()
    """Mbit/s from the client."""
    availability: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(strict=False)] = ()
    """The share of the day in which a client can be reached; by default the profile's, else 1."""
    dropout: Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], ...], Field(strict=False)] = ()
    """The probability that a client never answers in a round; by default the profile's, else 0."""
    memory: PositiveNumbers = ()
    """GB (10⁹ bytes); by default the profile's, else no limit. A client whose device has less than training takes [does not
    take part](devices.md#devices-with-too-little-memory)."""

    @field_validator("profile", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value
