"""Prompt tuning (Lester et al. 2021, 2104.08691): learned vectors in front of every prompt.

PEFT puts them in front of the padding and drops the position ids, so that an answer would depend on the length of the other
prompts in its batch. Here they are token ids beyond the vocabulary that stand directly before the prompt: padding, masks,
positions and generation then treat them as any other token. Without padding the two are the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class VirtualTokens:
    """Makes `embedding` return `vectors` (tokens, hidden size) for the ids that follow the vocabulary."""

    def __init__(self, embedding: nn.Embedding, vectors: nn.Parameter) -> None:
        self._first = embedding.num_embeddings
        self._vectors = vectors
        self._asked: Tensor | None = None
        self.ids = tuple(range(self._first, self._first + len(vectors)))
        embedding.register_forward_pre_hook(self._before)
        embedding.register_forward_hook(self._after)

    def _before(self, embedding: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        ids = inputs[0]
        self._asked = ids - self._first
        return (ids.clamp(max=self._first - 1), *inputs[1:])

    def _after(self, embedding: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        assert self._asked is not None
        place, self._asked = self._asked, None
        learned = self._vectors[place.clamp(min=0)].to(output.dtype)
        return torch.where((place >= 0).unsqueeze(-1), learned, output)
