"""The contract of every registered part."""

from __future__ import annotations

import inspect
from typing import Any, get_type_hints

from fedmllm.registry import Registry


def check_registered(registry: Registry[Any], name: str) -> None:
    """All options are keywords with types, and the docstring's first line is a sentence for `fedmllm list`."""
    factory, part = registry.factory(name), f"{registry.kind} {name!r}"
    hints = get_type_hints(factory)
    for option in inspect.signature(factory).parameters.values():
        assert option.kind is inspect.Parameter.KEYWORD_ONLY, f"{part}: option {option.name!r} must be keyword-only"
        assert option.name in hints, f"{part}: option {option.name!r} has no type"
    assert registry.describe(name).endswith("."), f"{part}: the first line of the docstring must be a sentence"
    assert registry.option_names(name) == sorted(set(hints) - {"return"}), f"{part}: an option is not a parameter"
