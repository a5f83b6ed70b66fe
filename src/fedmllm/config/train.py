"""The [train] table: rounds, which clients are sampled, local training, and the model that is kept."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedmllm.config.base import BatchSize, Epochs, Positive, Table, at_most, most_rounds


class TrainTable(Table):
    rounds: Annotated[int, Field(ge=1), most_rounds] = 10
    """The number of rounds."""
    clients_per_round: Positive = 2
    """The number of clients that are sampled in each round."""
    min_updates: Positive = 1
    """A round fails if fewer usable updates than this are returned."""
    selection: Literal["uniform", "available", "power-of-choice"] = "uniform"
    """[Which clients are sampled](devices.md#which-clients-are-sampled-and-waited-for): any, those that can be reached at the
    simulated time, or those with the largest loss."""
    candidates: Positive | None = None
    """The clients that `"power-of-choice"` draws and compares, by default twice `clients_per_round`."""
    over_select: Annotated[float, Field(ge=0), at_most(10, "because every client of it takes time")] = 0.0
    """The share of clients that are sampled on top; the first `clients_per_round` to answer are used."""
    deadline: Annotated[float, Field(gt=0)] | None = None
    """Simulated seconds after which a round ends without the clients that have not answered."""
    late: Literal["drop", "partial"] = "drop"
    """A client that cannot finish before the deadline is not used, or makes as many optimizer steps as fit."""
    max_norm_ratio: Annotated[float, Field(ge=0), at_most(1_000_000, "which would refuse nothing; 0 disables it")] = 100.0
    """An update whose change of the adapter is more than this many times as long as the round's median [is
    refused](attacks.md#updates-that-are-refused); 0 disables it."""
    epochs: Epochs = 1
    """Passes over its data that a client makes in a round; `[clients]` may give clients numbers of their own."""
    batch_size: BatchSize = 4
    """Samples in a batch; `[clients]` may give clients batch sizes of their own."""
    accumulate: BatchSize = 1
    """The number of batches whose gradients are accumulated for one optimizer step, which uses batch_size × accumulate
    samples."""
    batching: Literal["random", "by-length"] = "random"
    """`"random"`: plain shuffles. `"by-length"` forms batches of similar length, which [pads
    less](performance.md#what-sorting-by-length-gains). Both mix modality patterns within a batch as chance does."""
    cohort: BatchSize | Literal["auto"] = "auto"
    """The number of clients trained in one pass over the backbone, each with its own adapter and optimizer; the results
    differ from those of one after another only by floating-point rounding. `"auto"`: as many as fit in memory and still speed
    up training."""
    checkpointing: bool = False
    """Keep only the inputs of layers and compute the layers again in the backward pass: [less memory](models.md#memory), the
    same bits."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Its state is reset for each client in each round."""
    lr: Annotated[float, Field(gt=0), at_most(100, "because training diverges far below that")] = 1e-3
    """The learning rate."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """`"cosine"`: the learning rate follows a cosine over the rounds and is constant within a round."""
    first_round_factor: Annotated[float, Field(gt=0), at_most(100, "because training diverges far below that")] = 1.0
    """The learning rate of the first round is multiplied by it; the published schedule has 100 / rounds here."""
    weight_decay: Annotated[float, Field(ge=0), at_most(100, "because it must stay far below 1 / lr")] = 0.0
    """Of the optimizer, decoupled from the gradient in AdamW."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of AdamW."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Of AdamW."""
    eps: Annotated[float, Field(gt=0, lt=1)] = 1e-8
    """Of AdamW, which moves an entry whose gradient is far above it by about the learning rate, and one far below it hardly
    at all; 1e-6 also keeps rounding from deciding the [direction of entries with tiny
    gradients](performance.md#comparison-with-other-implementations)."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of SGD."""
    clip: Annotated[float, Field(ge=0), at_most(1_000_000, "which no usable gradient exceeds; 0 disables clipping")] = 1.0
    """The largest gradient norm, applied after the regularisation; 0 disables clipping."""
    max_length: Annotated[Positive, at_most(1_000_000, "because no supported model reads longer prompts")] = 1200
    """Tokens. A longer prompt is a [bad sample](data.md#what-is-a-bad-sample): `fedmllm check` examines all clients, a run
    only those that take part."""
    keep: Literal["last", "best", "mean"] = "last"
    """[Which model a run ends with](keeping.md): that of the last round, that of the best score, or the mean of the last
    ones."""
    mean_of: Annotated[Positive, at_most(100, "because each of them is in every checkpoint")] | None = None
    """The rounds whose models `"mean"` averages, by default 5."""
    patience: Positive | None = None
    """Stop after this many evaluations without a better score than the best one before."""
