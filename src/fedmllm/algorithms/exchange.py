"""What the server and the clients of an algorithm know and exchange: a round, rules of local training, results, updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from fedmllm.tensors import State, Tensors


def _no_base() -> NoReturn:
    raise ValueError("the adapter has no base weights to start from")


@dataclass(frozen=True)
class AdapterInfo:
    """What an algorithm may know about the adapter besides its tensors.

    `layers` is the number of layers of the text model. `layer[name]` is the layer of a tensor; tensors of no layer are not in
    it. `modality[name]` is the modality of a tensor that only samples showing it pass through, such as "image" in a vision
    tower; tensors that all samples pass through are not in it. `part(name)` is the part of the model to which a tensor of that
    name belongs, by which bytes are counted. LoRA adds `scale(rank)`·B A to a weight: the scale is α / r, or α / √r if it is
    rank-stabilised (rsLoRA, 2312.03732).
    """

    layers: int = 0
    layer: Mapping[str, int] = field(default_factory=dict)
    alpha: float = 1.0
    rank_stabilised: bool = False
    modality: Mapping[str, str] = field(default_factory=dict)
    part: Callable[[str], str] = field(default=lambda name: "text", compare=False)
    principal: Callable[[], State] = field(default=_no_base, compare=False)
    """The server's state in which the adapter holds the largest singular values of the base weights, and the fold takes them
    out of the base, so that the model is unchanged: W₀ − s B₀ A₀ + s B₀ A₀, with B₀ = U √(Σ / s) and A₀ = √(Σ / s) Vᵀ."""
    basis: Callable[[], Tensors] = field(default=_no_base, compare=False)
    """The factors A: (r, d_in) and B: (d_out, r) between which a LoRA-XS adapter has its R, by LoRA's names."""

    def scale(self, rank: int) -> float:
        return self.alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


@dataclass(frozen=True)
class ClientInfo:
    """What a client knows about itself. `gap` is the share of its (sample, modality) slots that are empty, from 0 to 1;
    `shows[modality]` is the share of its samples that show the modality, 0 if it is left out."""

    client: int
    gap: float
    shows: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RoundInfo:
    """Everything that an algorithm may know about a round.

    `round` counts from 0 to `rounds` − 1. `clients` is the number of clients in the federation, `sampled` has the ids of those
    that take part in this round. `ranks` has the LoRA rank of each sampled client if ranks differ, else it is empty. `client`
    is set on the client's side only. `lr` is the local learning rate of the round. `steps` has the most optimizer steps that a
    client may make, for those that may not make all of theirs.
    """

    round: int
    rounds: int
    clients: int
    sampled: tuple[int, ...]
    seed: int
    adapter: AdapterInfo = AdapterInfo()
    ranks: Mapping[int, int] = field(default_factory=dict)
    client: ClientInfo | None = None
    lr: float = 0.0
    steps: Mapping[int, int] = field(default_factory=dict)

    @property
    def me(self) -> ClientInfo:
        """The client that this info was made for. Raises ValueError on the server's side."""
        if self.client is None:
            raise ValueError("the server's RoundInfo belongs to no client; `me` exists on the client's side only")
        return self.client


@dataclass(frozen=True)
class LocalRule:
    """How local training differs from plain gradient descent, as data that a single client or a stacked cohort can apply.

    The gradient of each trainable tensor becomes `g + proximal[name]·(w − w_received) + offset[name] + penalty(…)[name]`. The
    learning rate is `lr_factor` times the round's.
    """

    trainable: Callable[[str], bool] = lambda name: True
    proximal: Mapping[str, float] = field(default_factory=dict)
    offset: Tensors | None = None
    penalty: Callable[[Tensors, Tensors, float], Tensors] | None = None
    """`penalty(w, w_received, done)` has the gradient of a further term of the loss, by tensor. It is called at each step with
    the trainable tensors, which it must not modify, and with the share of the client's steps that are done, 0 at the first."""
    lr_factor: float = 1.0
    frozen: Tensors | None = None
    """1 for each entry of a tensor that stays at its received value, and 0 for the others; neither gradients nor weight decay
    move it, and it does not count in the norm that is clipped."""
    probe: Callable[[LocalResult], Tensors] | None = None
    """Train for one pass over the samples first, and begin again from the received adapter with the `frozen` that this returns
    for the result."""
    observe_gradient: bool = False
    """Ask for `LocalResult.mean_gradient`."""
    observe_loss: bool = False
    """Ask for `LocalResult.loss_before`, which costs one more forward pass over the client's samples."""
    observe_base: bool = False
    """Ask for `LocalResult.base_gradient`, which costs one more pass over the client's samples, and memory for a gradient of
    every weight that has an adapter."""


@dataclass(frozen=True)
class OwnTraining:
    """A second training over the same steps, of an adapter that stays with the client.

    It goes from `start` under `rule`. The model computes with `share` times that adapter and, if it is not empty, 1 − `share`
    times `beside`, a second one that is not trained.
    """

    start: Tensors
    rule: LocalRule = field(default_factory=LocalRule)
    share: float = 1.0
    beside: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class LocalResult:
    """The result of local training, as `Algorithm.finish` receives it.

    `received` and `trained` are the adapter before and after training, `steps` is the number of optimizer steps, `lr` their
    learning rate and `momentum` the momentum of plain SGD (0 under AdamW). `metrics` has "loss", the mean loss during
    training, and "padding", the share of token slots that were padding.

    `mean_gradient` is the average of the raw gradients, before clipping and before the rule changed them. `loss_before` is the
    mean loss of the received adapter over the samples of its steps, each counted once. `base_gradient` has the gradient of the
    base model's mean loss over the same samples with respect to each weight with an adapter, as factors of the adapter's rank,
    by LoRA's names. All three are None unless the rule asked for them. `own` is the client's own adapter after its training,
    if it has one (`Algorithm.own`).
    """

    received: Tensors
    trained: Tensors
    mean_gradient: Tensors | None
    examples: int
    steps: int
    lr: float
    metrics: Mapping[str, float]
    momentum: float = 0.0
    loss_before: float | None = None
    base_gradient: Tensors | None = None
    own: Tensors | None = None


@dataclass(frozen=True)
class Update:
    """A client's reply: groups of tensors, and the counts that weighting needs.

    If the client could not train or did not answer, `problem` says why, and the update is refused. `travelled` has the bytes
    that were sent to the client and those received from it, by group, if they differ from the sizes of its message and of
    `groups`.
    """

    client: int
    groups: State
    examples: int
    steps: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    problem: str = ""
    travelled: tuple[Mapping[str, int], Mapping[str, int]] | None = None


def failed(client: int, problem: str) -> Update:
    """The reply of a client that could not train or did not answer."""
    return Update(client, {}, 0, 0, problem=problem)
