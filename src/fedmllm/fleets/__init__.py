"""Where clients train: in this process, or elsewhere."""

from __future__ import annotations

from fedmllm.fleets.base import FleetKind
from fedmllm.registry import Registry

fleets: Registry[FleetKind] = Registry("fleet", __name__)
