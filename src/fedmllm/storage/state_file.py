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
    """One safetensors file, written atomically; `metadata` goes into its header."""
    # Copies, because safetensors refuses tensors that share memory, as two groups with one tensor do.
    flat = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in flatten(state).items()}
    # None, because safetensors writes a broken header for no tensors with empty metadata.
    write_atomically(path, serialize(flat, metadata=dict(metadata) if metadata else None))


def load_state(path: Path) -> tuple[State, dict[str, str]]:
    """The state and the header's metadata."""
    with safe_open(path, "pt") as file:
        flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        return unflatten(flat), dict(file.metadata() or {})
