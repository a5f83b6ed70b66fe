"""The [clients] table: what clients' devices and adapters are like."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator

from fedmllm.config.base import BatchSize, Epochs, Positive, PositiveNumbers, Table


class ClientsTable(Table):
    rank: Annotated[tuple[Positive, ...], Field(strict=False)] = ()
    """LoRA ranks: client k has entry k modulo their number. By default, and at most, `model.lora.rank`."""
    epochs: Annotated[tuple[Epochs, ...], Field(strict=False)] = ()
    """Passes over the data in a round: client k has entry k modulo their number. By default `train.epochs`."""
    batch_size: Annotated[tuple[BatchSize, ...], Field(strict=False)] = ()
    """In the same way; by default `train.batch_size`."""
    profile: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Devices: client k has entry k modulo their number, or, with `shares`, one that is drawn from the seed."""
    shares: PositiveNumbers = ()
    speed: PositiveNumbers = ()
    """Training samples per second. This and what follows replaces the profile's figure, for client k by entry k modulo their
    number; what neither gives costs no time."""
    downlink: PositiveNumbers = ()
    """Mbit/s to the client."""
    uplink: PositiveNumbers = ()
    availability: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(strict=False)] = ()
    """The share of the day in which a client can be reached."""
    dropout: Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], ...], Field(strict=False)] = ()
    """The probability that a client never answers in a round."""
    memory: PositiveNumbers = ()
    """GB (10⁹ bytes). A client whose device has less than training takes does not take part."""

    @field_validator("profile", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value
