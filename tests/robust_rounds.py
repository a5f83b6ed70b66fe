"""The robust aggregations that are registered, for the tests of all of them."""

from __future__ import annotations

from typing import Any

from fedmllm.algorithms.combining import Robust, robusts

METHODS = [name for name in robusts.names() if name != "none"]


def robust(name: str, **options: Any) -> Robust:
    method = robusts.build(name, options)
    assert method is not None
    return method
