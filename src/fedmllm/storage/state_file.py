"""A `State` as one safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save as serialize

from fedmllm.storage.atomic import write_atomically
from fedmllm.tensors import State, flatten, unflatten


def save_state(path: Path, state: State, metadata: Mapping[str, str] | None = None) -> None:
    """Write the state atomically as one safetensors file with `metadata` in its header."""
    # The tensors are cloned because safetensors refuses tensors that share memory, such as one tensor in two groups.
    flat = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in flatten(state).items()}
    # None instead of {}: without tensors, safetensors writes an invalid header for empty metadata.
    write_atomically(path, serialize(flat, metadata=dict(metadata) if metadata else None))


def load_state(path: Path) -> tuple[State, dict[str, str]]:
    """(the state, the metadata in the header)."""
    with safe_open(path, "pt") as file:
        flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        return unflatten(flat), dict(file.metadata() or {})
