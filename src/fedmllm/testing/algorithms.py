"""The contract of algorithms, alone and inside regularisations and compressions, checked with toy clients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fedmllm.algorithms import Algorithm, algorithms, compressions, regularizations
from fedmllm.algorithms.base import Wrapper
from fedmllm.algorithms.combining import robusts
from fedmllm.algorithms.toy_federation import lora_adapter, round_info, same, train_round
from fedmllm.tensors import State, digest, flatten, problem_with
from fedmllm.testing import contract, properties
from fedmllm.testing.registered import check_registered


@contextmanager
def _named(part: str) -> Iterator[None]:
    """Add the name of the part to an error."""
    try:
        yield
    except Exception as error:
        error.add_note(f"while checking {part}")
        raise


def check_algorithm(name: str, **options: Any) -> None:
    """The whole contract: the algorithm alone, under every regularisation, and under every compression that accepts it."""
    check_registered(algorithms, name)
    algorithm = algorithms.build(name, options)
    with _named(f"algorithm {name!r}"):
        contract.check(algorithm)
        properties.check(algorithm)
    for kind, registry in (("regularization", regularizations), ("compression", compressions)):
        for wrapper in registry.names():
            if wrapper != "none":
                with _named(f"algorithm {name!r} with {kind} {wrapper!r}"):
                    _check_wrapped(registry.build(wrapper, {}), algorithm)


def check_regularization(name: str, **options: Any) -> None:
    """The contract of every algorithm under this regularisation, which must keep what the server does."""
    check_registered(regularizations, name)
    for inner in algorithms.names():
        with _named(f"regularization {name!r} of algorithm {inner!r}"):
            algorithm = algorithms.build(inner, {})
            wrapped = regularizations.build(name, options)(algorithm)
            assert wrapped.averages == algorithm.averages, "a regularisation changes local training, not the aggregation"
            contract.check(wrapped)


def check_compression(name: str, **options: Any) -> None:
    """The contract of every algorithm that this compression accepts; it refuses others with a ValueError."""
    check_registered(compressions, name)
    accepted = []
    for inner in algorithms.names():
        with _named(f"compression {name!r} of algorithm {inner!r}"):
            if _check_wrapped(compressions.build(name, options), algorithms.build(inner, {})):
                accepted.append(inner)
    assert accepted, f"compression {name!r} accepts no algorithm"


def check_robust(name: str, **options: Any) -> None:
    """What the round loop relies on in a robust aggregation, around FedAvg in two rounds of seven clients."""
    check_registered(robusts, name)
    robust, algorithm = robusts.build(name, options), algorithms.build("fedavg", {})
    assert robust is not None, "only `none` has no combiner"
    state, memories = algorithm.init(lora_adapter()), dict[int, State]()
    for number in range(2):
        info = round_info(number, sampled=range(7))
        updates = train_round(algorithm, state, memories, info)
        inputs = (state, *(update.groups for update in updates))
        before = [digest(flatten(groups)) for groups in inputs]
        combined = robust.combine(updates, algorithm, state, info)
        assert [digest(flatten(groups)) for groups in inputs] == before, "the server's state or an update was modified"
        assert [update.client for update in combined.updates] == list(info.sampled), "an update of each client is expected"
        for update in combined.updates:
            problem = problem_with(update.groups["adapter"], state["adapter"])
            assert problem is None, f"the adapter that is aggregated: {problem}"
        assert combined.kept.keys() == set(info.sampled), "`kept` must have a share for every client"
        assert all(0 <= share <= 1 for share in combined.kept.values()), f"`kept` is not between 0 and 1: {combined.kept}"
        own = combined.state.keys() & algorithm.init(lora_adapter()).keys()
        assert not own, f"the combiner replaces groups of the algorithm: {sorted(own)}"
        shuffled = robust.combine(updates[::-1], algorithm, state, info)
        aggregated = algorithm.aggregate(state, combined.updates, info)
        in_other_order = algorithm.aggregate(state, shuffled.updates, info)
        assert same(in_other_order, aggregated), "the order of the updates matters (use `in_order`)"
        state = {**aggregated, **combined.state}


def _check_wrapped(wrapper: Wrapper, algorithm: Algorithm) -> bool:
    """Check the wrapped algorithm; False if the wrapper refuses it."""
    try:
        wrapped = wrapper(algorithm)
    except ValueError:
        return False
    contract.check(wrapped)
    return True
