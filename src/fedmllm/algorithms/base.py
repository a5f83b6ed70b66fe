"""What an algorithm is: four pure functions over States, and the data that passes between server and clients.

Every function is pure: it returns new dictionaries, draws from no global generator, and gives the same result in whatever
order the updates arrive (they are sorted by client before anything is summed).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fedmllm.registry import Registry
from fedmllm.tensors import State, Tensors, clone


@dataclass(frozen=True)
class RoundInfo:
    """Round `round` of `rounds`, counted from 0; `clients` in the federation, `sampled` of them in this round."""

    round: int
    rounds: int
    clients: int
    sampled: tuple[int, ...]
    seed: int


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
    `mean_gradient` the average of the raw gradients, before clipping and before the rule changed them; None unless the
    rule asked for it.
    """

    received: Tensors
    trained: Tensors
    mean_gradient: Tensors | None
    examples: int
    steps: int
    lr: float
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Update:
    """What a client sends back: groups of tensors, and the counts that weighting needs."""

    client: int
    groups: State
    examples: int
    steps: int
    metrics: Mapping[str, float] = field(default_factory=dict)


def plain_rule(received: State, memory: State, info: RoundInfo) -> LocalRule:
    return LocalRule()


def send_adapter(result: LocalResult, received: State, memory: State, info: RoundInfo) -> tuple[State, State]:
    """Upload the trained adapter, remember nothing."""
    return {"adapter": clone(result.trained)}, {}


@dataclass(frozen=True)
class Algorithm:
    """`init(adapter)` -> server state · `aggregate(server state, updates, info)` -> server state, on the server;
    `rule(received, memory, info)` before and `finish(result, received, memory, info)` -> (upload, new memory) after local
    training, on the client. `send` names the groups of the server state that travel down.

    `uploads(server state)` gives the shapes an honest update has, group by group: the reference for refusing others.
    """

    init: Callable[[Tensors], State]
    aggregate: Callable[[State, Sequence[Update], RoundInfo], State]
    rule: Callable[[State, State, RoundInfo], LocalRule] = plain_rule
    finish: Callable[[LocalResult, State, State, RoundInfo], tuple[State, State]] = send_adapter
    send: tuple[str, ...] = ("adapter",)
    uploads: Callable[[State], State] = lambda state: {"adapter": state["adapter"]}


Wrapper = Callable[[Algorithm], Algorithm]

algorithms: Registry[Algorithm] = Registry("algorithm", "fedmllm.algorithms")
regularizations: Registry[Wrapper] = Registry("regularization", "fedmllm.algorithms")


@regularizations.register("none")
def none() -> Wrapper:
    """No regularisation: the local loss alone."""
    return lambda algorithm: algorithm


def in_order(updates: Sequence[Update]) -> list[Update]:
    """Sorted by client. Raises ValueError where there is none, or one client reports twice."""
    ordered = sorted(updates, key=lambda update: update.client)
    clients = [update.client for update in ordered]
    if not ordered or len(set(clients)) != len(clients):
        raise ValueError(f"need at least one update and one from each client, not clients {clients}")
    return ordered


def changed_rule(algorithm: Algorithm, change: Callable[[LocalRule, State], LocalRule]) -> Algorithm:
    """`algorithm` with its local rule passed through `change(rule, received)`."""

    def rule(received: State, memory: State, info: RoundInfo) -> LocalRule:
        return change(algorithm.rule(received, memory, info), received)

    return replace(algorithm, rule=rule)
