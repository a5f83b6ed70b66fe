"""Where clients train: in this process, or elsewhere."""

from __future__ import annotations

from collections.abc import Callable

from fedmllm.federation import Fleet
from fedmllm.fleets.base import Site
from fedmllm.registry import Registry

fleets: Registry[Callable[[Site], Fleet]] = Registry("fleet", __name__)
