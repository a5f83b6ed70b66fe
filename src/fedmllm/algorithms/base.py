"""What an algorithm is: a few pure functions over States, and the data that passes between server and clients.

Every function is pure: it returns new dictionaries, draws from no global generator, and gives the same result in whatever
order the updates arrive (they are sorted by client before anything is summed).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from fedmllm.registry import Registry
from fedmllm.tensors import State, Tensors, clone, select


@dataclass(frozen=True)
class AdapterInfo:
    """What an algorithm may know of the adapter beyond its tensors.

    `layers` of the text model; `layer[name]` the one a tensor belongs to, absent where it belongs to none. LoRA adds
    `scale(rank)`·B A to a weight: α / r, or α / √r where it is rank-stabilised (rsLoRA, 2312.03732).
    """

    layers: int = 0
    layer: Mapping[str, int] = field(default_factory=dict)
    alpha: float = 1.0
    rank_stabilised: bool = False

    def scale(self, rank: int) -> float:
        return self.alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


@dataclass(frozen=True)
class ClientInfo:
    """What a client knows of itself. `gap` is the share of its (sample, modality) slots that are empty, 0 to 1."""

    client: int
    gap: float


@dataclass(frozen=True)
class RoundInfo:
    """Round `round` of `rounds`, counted from 0; `clients` in the federation, `sampled` of them in this round.

    `ranks` has the LoRA rank of each sampled client if ranks differ, else it is empty. `client` is set on the client's side
    only. `lr` is the local learning rate of the round.
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

    @property
    def me(self) -> ClientInfo:
        """The client. Raises ValueError on the server's side, which is every client's and no one's."""
        if self.client is None:
            raise ValueError("this is known on a client's side only")
        return self.client


@dataclass(frozen=True)
class LocalRule:
    """How local training differs from plain gradient descent; data, so that one client or a stacked cohort can apply it.

    The gradient of each trainable tensor becomes `g + proximal[name]·(w − w_received) + offset[name]`.
    """

    trainable: Callable[[str], bool] = lambda name: True
    proximal: Mapping[str, float] = field(default_factory=dict)
    offset: Tensors | None = None
    observe_gradient: bool = False
    """Ask for `LocalResult.mean_gradient`."""


@dataclass(frozen=True)
class LocalResult:
    """What local training hands to `Algorithm.finish`.

    `received` and `trained` are the adapter before and after, `steps` the optimizer steps taken, `lr` their learning rate,
    `momentum` that of plain SGD (0 under AdamW), `mean_gradient` the average of the raw gradients, before clipping and
    before the rule changed them; None unless the rule asked for it.
    """

    received: Tensors
    trained: Tensors
    mean_gradient: Tensors | None
    examples: int
    steps: int
    lr: float
    metrics: Mapping[str, float]
    momentum: float = 0.0


@dataclass(frozen=True)
class Update:
    """What a client sends back: groups of tensors, and the counts that weighting needs.

    `problem` says why there is nothing, for a client that could not train or did not answer; the update is refused then.
    `travelled` has the bytes that went to the client and came from it, by group, where they are not those of its message and
    of `groups`.
    """

    client: int
    groups: State
    examples: int
    steps: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    problem: str = ""
    travelled: tuple[Mapping[str, int], Mapping[str, int]] | None = None


def plain_rule(received: State, memory: State, info: RoundInfo) -> LocalRule:
    return LocalRule()


def send_adapter(result: LocalResult, received: State, memory: State, info: RoundInfo) -> tuple[State, State]:
    """Upload the trained adapter, remember nothing."""
    return {"adapter": clone(result.trained)}, {}


Message = Callable[[State, int, RoundInfo], State]


def groups(*names: str) -> Message:
    """The named groups of the server's state, the same for every client; those that are not there yet are left out."""
    return lambda state, client, info: select(state, names)


_adapter = groups("adapter")


@dataclass(frozen=True)
class Algorithm:
    """`init(adapter)` -> server state · `aggregate(server state, updates, info)` -> server state, on the server;
    `rule(received, memory, info)` before and `finish(result, received, memory, info)` -> (upload, new memory) after local
    training, on the client.

    `message(server state, client, info)` is what travels down to a client, `uploads(server state, client, info)` what an
    honest update looks like, group by group: the reference for refusing others. `refuse(update, server state, info)` says
    why an update that has the right shapes cannot be used all the same, or None.

    A client starts from `complete(message, memory, initial)`, so a message may leave out what the client has.
    """

    init: Callable[[Tensors], State]
    aggregate: Callable[[State, Sequence[Update], RoundInfo], State]
    rule: Callable[[State, State, RoundInfo], LocalRule] = plain_rule
    finish: Callable[[LocalResult, State, State, RoundInfo], tuple[State, State]] = send_adapter
    message: Message = _adapter
    uploads: Message = _adapter
    refuse: Callable[[Update, State, RoundInfo], str | None] = lambda update, state, info: None
    needs_lora: bool = False
    """It works on the factors A and B; other adapters have none."""
    needs_layers: bool = False
    """It tells layers apart; an adapter that belongs to none cannot be used."""
    unequal_ranks: bool = False
    """Clients may hold LoRA adapters of different ranks."""
    refactors: bool = False
    """An entry of the adapter does not mean the same from one round to the next, as the server makes new factors."""
    averages: Literal["examples", "uniform"] | None = None
    """`aggregate` uses no more of the updates than their mean of this weighting and their number: as many copies of the mean
    give the same. None where it looks at single updates."""
    personal: bool = False
    """Part of each client's adapter never leaves it: every client has a model of its own."""


def complete(message: State, memory: State, initial: Tensors) -> State:
    """The message with the adapter a client starts from: what was sent, else what it kept, else the shared start."""
    return {**message, "adapter": {**initial, **memory.get("adapter", {}), **message.get("adapter", {})}}


Wrapper = Callable[[Algorithm], Algorithm]

algorithms: Registry[Algorithm] = Registry("algorithm", "fedmllm.algorithms")
regularizations: Registry[Wrapper] = Registry("regularization", "fedmllm.algorithms")
compressions: Registry[Wrapper] = Registry("compression", "fedmllm.algorithms")


@regularizations.register("none")
def no_regularization() -> Wrapper:
    """No regularisation: the local loss alone."""
    return lambda algorithm: algorithm


@compressions.register("none")
def no_compression() -> Wrapper:
    """No compression: updates travel as float32."""
    return lambda algorithm: algorithm


def in_order(updates: Sequence[Update]) -> list[Update]:
    """Sorted by client. Raises ValueError where there is none, or one client reports twice."""
    ordered = sorted(updates, key=lambda update: update.client)
    clients = [update.client for update in ordered]
    if not ordered or len(set(clients)) != len(clients):
        raise ValueError(f"need at least one update and one from each client, not clients {clients}")
    return ordered


def changed_rule(algorithm: Algorithm, change: Callable[[LocalRule, State, RoundInfo], LocalRule]) -> Algorithm:
    """`algorithm` with its local rule passed through `change(rule, received, info)`."""

    def rule(received: State, memory: State, info: RoundInfo) -> LocalRule:
        return change(algorithm.rule(received, memory, info), received, info)

    return replace(algorithm, rule=rule)


def positive(**values: float) -> None:
    """Raises ValueError, naming the option, for a value that is not above 0."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} = {value} must be above 0")


def not_negative(**values: float) -> None:
    """Raises ValueError, naming the option, for a value below 0."""
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{name} = {value} must not be negative")


def fraction(**values: float) -> None:
    """Raises ValueError, naming the option, for a value outside [0, 1)."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} = {value} must be at least 0 and below 1")
