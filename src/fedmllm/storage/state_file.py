"""A `State` as one safetensors file with a digest in its header. torch is imported on first use, so that reading run
directories does not need it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fedmllm.errors import RunError
from fedmllm.storage.atomic import write_atomically

if TYPE_CHECKING:
    from fedmllm.tensors import State, Tensors

DIGEST = "sha256"
"""The key of the digest in the header of a file."""


def save_state(path: Path, state: State, metadata: Mapping[str, str] | None = None, previous: Path | None = None) -> None:
    """Write the state atomically as one safetensors file with `metadata` and a digest of both in its header. An earlier file
    is renamed to `previous` if that is given. Raises DiskFull."""
    from fedmllm.tensors import flatten

    write_atomically(path, state_bytes(state, with_digest(flatten(state), metadata or {})), previous)


def with_digest(flat: Tensors, metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata with a SHA-256 of the tensors and the metadata, in place of the one it may have."""
    from fedmllm.tensors import digest

    entries = {key: value for key, value in metadata.items() if key != DIGEST}
    sha = hashlib.sha256(digest(flat).encode())
    for key in sorted(entries):
        sha.update(f"|{key}|{entries[key]}".encode())
    return {**entries, DIGEST: sha.hexdigest()}


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
    """(the state, the metadata in the header). Raises RunError if the file cannot be read or does not match its digest; files
    of earlier versions have none."""
    from fedmllm.tensors import unflatten

    try:
        flat, metadata = load_verified(path)
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}); restore it from a copy, or start a new run.") from None
    return unflatten(flat), metadata


def load_verified(path: Path) -> tuple[Tensors, dict[str, str]]:
    """(the tensors of a safetensors file, the metadata in its header without the digest). Raises ValueError if the file
    cannot be read or does not match its digest."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            metadata = dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise ValueError(str(error)) from None
    if DIGEST in metadata and with_digest(flat, metadata) != metadata:
        raise ValueError("its content does not match its digest")
    metadata.pop(DIGEST, None)
    return flat, metadata
