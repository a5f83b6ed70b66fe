"""Prompt tuning (Lester et al. 2021, 2104.08691): learned vectors before every prompt.

PEFT puts them before the padding and drops the position ids, so an answer would depend on the lengths of the other prompts
in its batch. Here they are token ids beyond the vocabulary, directly before the prompt, so that padding, masks, positions
and generation treat them like any other token. Without padding both give the same result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class VirtualTokens:
    """Makes `embedding` return `vectors` (tokens, hidden size) for the ids directly after the vocabulary."""

    def __init__(self, embedding: nn.Embedding, vectors: nn.Parameter) -> None:
        self._first = embedding.num_embeddings
        self._vectors = vectors
        self._offsets: Tensor | None = None
        self.ids = tuple(range(self._first, self._first + len(vectors)))
        embedding.register_forward_pre_hook(self._before)
        embedding.register_forward_hook(self._after)

    def _before(self, embedding: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        ids = inputs[0]
        self._offsets = ids - self._first
        return (ids.clamp(max=self._first - 1), *inputs[1:])

    def _after(self, embedding: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        assert self._offsets is not None
        offsets, self._offsets = self._offsets, None
        learned = self._vectors[offsets.clamp(min=0)].to(output.dtype)
        return torch.where((offsets >= 0).unsqueeze(-1), learned, output)
