"""Gradient checkpointing (Chen et al. 2016, 1604.06174): a layer keeps only its input and is computed again for its gradient.

This trades one more forward pass for the memory of everything inside the layers, and changes no number: the layer is computed
again by the same operations on the same input, with the same dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from fedmllm.errors import ConfigError

Contexts = Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]
"""What surrounds the first pass through a layer and the second."""


def check_layers(model: nn.Module, name: str) -> None:
    """Raises ConfigError if the model has no layer that can be computed again."""
    if not any(isinstance(layer, GradientCheckpointingLayer) for layer in model.modules()):
        raise ConfigError(
            f"train.checkpointing = true: transformers knows no layer of model.name = {name!r} that can be computed again; "
            "set it to false."
        )


@contextmanager
def checkpointed(model: nn.Module, contexts: Contexts) -> Iterator[None]:
    """Compute every layer of the model again in the backward pass.

    transformers does so only in training mode, which would also switch dropout inside the frozen layers on.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    hidden: list[Any] = [vars(layer).get("forward") for layer in layers]  # accelerate puts its own there
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, context_fn=contexts)
    try:
        yield
    finally:
        for layer, forward in zip(layers, hidden, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward
