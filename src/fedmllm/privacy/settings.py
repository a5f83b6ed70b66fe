"""The table `[privacy]` of the experiment file. Imports no accountant, whose library is optional."""

from __future__ import annotations

from fedmllm.registry import Registry

privacies: Registry[None] = Registry("privacy", __name__)


@privacies.register("none")
def no_privacy() -> None:
    """No noise is added, and nothing is promised about what the model reveals."""
