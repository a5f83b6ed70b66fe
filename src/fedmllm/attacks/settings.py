"""The table `[attack]` of the experiment file."""

from __future__ import annotations

from fedmllm.registry import Registry

attacks: Registry[None] = Registry("attack", __name__)


@attacks.register("none")
def no_attack() -> None:
    """Every client is honest."""
