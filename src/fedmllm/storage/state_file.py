"""A `State` as one safetensors file. torch is imported on first use, so that reading run directories does not need it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fedmllm.storage.atomic import write_atomically

if TYPE_CHECKING:
    from fedmllm.tensors import State


def save_state(path: Path, state: State, metadata: Mapping[str, str] | None = None) -> None:
    """Write the state atomically as one safetensors file with `metadata` in its header."""
    write_atomically(path, state_bytes(state, metadata))


def state_bytes(state: State, metadata: Mapping[str, str] | None = None) -> bytes:
    """The state as the content of a safetensors file."""
    import torch
    from safetensors.torch import save

    from fedmllm.tensors import flatten

    # The tensors are cloned because safetensors refuses tensors that share memory, such as one tensor in two groups.
    flat = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in flatten(state).items()}
    # None instead of {}: without tensors, safetensors writes an invalid header for empty metadata.
    return save(flat, metadata=dict(metadata) if metadata else None)


def load_state(path: Path) -> tuple[State, dict[str, str]]:
    """(the state, the metadata in the header)."""
    from safetensors import safe_open

    from fedmllm.tensors import unflatten

    with safe_open(path, "pt") as file:
        flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        return unflatten(flat), dict(file.metadata() or {})
