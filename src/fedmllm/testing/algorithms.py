"""The contract of algorithms, alone and inside regularisations and compressions, checked with toy clients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fedmllm.algorithms import Algorithm, algorithms, compressions, regularizations
from fedmllm.algorithms.base import Wrapper
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


def _check_wrapped(wrapper: Wrapper, algorithm: Algorithm) -> bool:
    """Check the wrapped algorithm; False if the wrapper refuses it."""
    try:
        wrapped = wrapper(algorithm)
    except ValueError:
        return False
    contract.check(wrapped)
    return True
