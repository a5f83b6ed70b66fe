"""The definition of an algorithm: a few pure functions over States, and the registries of algorithms and what wraps them.

Every function is pure: it returns new dictionaries, draws from no global generator, and its result does not depend on the
order in which updates arrive (they are sorted by client before anything is summed).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fedmllm.algorithms.exchange import (
    AdapterInfo,
    ClientInfo,
    LocalResult,
    LocalRule,
    OwnTraining,
    RoundInfo,
    Update,
    failed,
)
from fedmllm.registry import Registry
from fedmllm.tensors import State, Tensors, clone

__all__ = [
    "AdapterInfo",
    "Algorithm",
    "ClientInfo",
    "LocalResult",
    "LocalRule",
    "Message",
    "OwnTraining",
    "RoundInfo",
    "Update",
    "Wrapper",
    "algorithms",
    "changed_rule",
    "complete",
    "compressions",
    "failed",
    "fraction",
    "groups",
    "in_order",
    "not_negative",
    "own_adapter",
    "positive",
    "regularizations",
    "send_adapter",
]  # fmt: skip


def send_adapter(result: LocalResult, received: State, memory: State, info: RoundInfo) -> tuple[State, State]:
    """Upload the trained adapter and remember nothing."""
    return {"adapter": clone(result.trained)}, {}


Message = Callable[[State, int, RoundInfo], State]


def groups(*names: str) -> Message:
    """A message of the named groups of the server's state, the same for every client. Groups that do not exist yet are left
    out."""
    return lambda state, client, info: {name: state[name] for name in names if name in state}


_adapter = groups("adapter")


@dataclass(frozen=True)
class Algorithm:
    """The server's half and the client's half of a method.

    On the server, `init(adapter)` and `aggregate(server state, updates, info)` return the server's state. On the client,
    `rule(received, memory, info)` is called before local training, and `finish(result, received, memory, info)` after it:
    it returns the groups to upload and the client's new memory.

    `message(server state, client, info)` is sent to a client. `uploads(server state, client, info)` has the groups, names,
    shapes and dtypes of a valid update; updates that differ are refused. `refuse(update, server state, info)` returns why an
    update of the right shapes still cannot be used, or None.

    A client starts from `complete(message, memory, initial)`, so a message may leave out tensors that the client has. Its own
    adapter is `own_adapter(message, memory, initial)`; the server turns it into the model that is tested, `tested(message, own,
    info)`.
    """

    init: Callable[[Tensors], State]
    aggregate: Callable[[State, Sequence[Update], RoundInfo], State]
    rule: Callable[[State, State, RoundInfo], LocalRule] = lambda received, memory, info: LocalRule()
    finish: Callable[[LocalResult, State, State, RoundInfo], tuple[State, State]] = send_adapter
    own: Callable[[State, State, RoundInfo], OwnTraining | None] = lambda received, memory, info: None
    """What a client trains besides, if anything; called like `rule`. `finish` remembers its result as the group "own"."""
    tested: Callable[[State, Tensors, RoundInfo], State] = lambda message, own, info: {**message, "adapter": own}
    message: Message = _adapter
    uploads: Message = _adapter
    refuse: Callable[[Update, State, RoundInfo], str | None] = lambda update, state, info: None
    restored: Callable[[Update, State, RoundInfo], Update] = lambda update, state, info: update
    """The update as the client made it, if it was compressed for the way; a restored one stays as it is."""
    summed: tuple[str, ...] = ("adapter",)
    """The groups of an update that are averaged or summed, and whose lengths are therefore compared. All but the adapter are
    changes."""
    needs_lora: bool = False
    """The algorithm works on LoRA's factors A and B, which other adapters do not have."""
    needs_core: bool = False
    """The algorithm chooses the frozen factors of LoRA-XS, which other adapters do not have."""
    needs_layers: bool = False
    """The algorithm treats layers differently, so the adapter's tensors must belong to layers."""
    needs_modalities: bool = False
    """The algorithm treats tensors of one modality differently, so the adapter must have some (`AdapterInfo.modality`)."""
    unequal_ranks: bool = False
    """Clients may hold LoRA adapters of different ranks."""
    refactors: bool = False
    """The server computes new factors every round, so an entry of the adapter means something else in the next round."""
    averages: Literal["examples", "uniform"] | None = None
    """The weighting of the mean, if `aggregate` depends on nothing but the mean of the restored updates and their number: the
    same number of copies of the mean gives the same result. None if it needs the single updates."""
    packed: bool = False
    """Updates are packed for the way, and `restored` unpacks them."""
    personal: bool = False
    """Part of each client's adapter stays with the client, so every client has its own model."""


def complete(message: State, memory: State, initial: Tensors) -> State:
    """The message with the whole adapter that a client starts from. Each tensor comes from the message if it is there, else
    from the client's memory, else from the shared initial adapter."""
    return {**message, "adapter": {**initial, **memory.get("adapter", {}), **message.get("adapter", {})}}


def own_adapter(message: State, memory: State, initial: Tensors) -> Tensors:
    """The adapter of a client's own model: the one that it trained besides, else the one that it would start from."""
    return memory.get("own") or complete(message, memory, initial)["adapter"]


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
    """The updates sorted by client. Raises ValueError if there is none, or if a client sent two."""
    ordered = sorted(updates, key=lambda update: update.client)
    clients = [update.client for update in ordered]
    if not ordered or len(set(clients)) != len(clients):
        raise ValueError(f"need at least one update, and one from each client; these are from clients {clients}")
    return ordered


def changed_rule(algorithm: Algorithm, change: Callable[[LocalRule, State, RoundInfo], LocalRule]) -> Algorithm:
    """`algorithm` with its local rule replaced by `change(rule, received, info)`."""

    def rule(received: State, memory: State, info: RoundInfo) -> LocalRule:
        return change(algorithm.rule(received, memory, info), received, info)

    return replace(algorithm, rule=rule)


def positive(**values: float) -> None:
    """Raise ValueError, naming the option, for a value that is not above 0."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} = {value} must be above 0")


def not_negative(**values: float) -> None:
    """Raise ValueError, naming the option, for a negative value."""
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{name} = {value} must not be negative")


def fraction(**values: float) -> None:
    """Raise ValueError, naming the option, for a value outside [0, 1)."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} = {value} must be at least 0 and below 1")
