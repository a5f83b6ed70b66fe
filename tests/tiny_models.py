"""Helpers for tests that compute with a small model: conversations, perturbed adapters and logits."""

from __future__ import annotations

import pytest
import torch

from fedmllm.config import AdapterTable, LoraTable, ModelTable
from fedmllm.data.prompts import Conversation
from fedmllm.models.encoded import Encoded
from fedmllm.models.mllm import MLLM
from fedmllm.tensors import Tensors

OPTIONS = ("(A) red", "(B) blue")
OPEN = [
    Conversation("which color is it?", "red", image=True),
    Conversation("a blue thing\nname the color.", "blue", image=False),
]
CLOSED = Conversation(
    "Text: a red thing that is a little longer\nwhich option is right?", "(A) red", image=True, options=OPTIONS
)

plain_peft = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
"""A mark for tests that load an adapter with PEFT alone, which uses a deprecated property of transformers."""


def load_adapted(settings: ModelTable, kind: str, rank: int = 2, precision: str = "fp32") -> MLLM:
    """The model of the settings with an adapter of this kind."""
    table = {
        "adapter": AdapterTable.model_validate({"kind": kind, "virtual_tokens": 3}),
        "lora": LoraTable(rank=rank, alpha=4.0),
        "precision": precision,
    }
    return MLLM.load(settings.model_copy(update=table), seed=0)


def perturb(model: MLLM) -> Tensors:
    """Move the adapter away from its initial values, under which A has no effect because B = 0. Return the new ones."""
    generator = torch.Generator().manual_seed(3)
    values = {k: t + 0.2 * torch.randn(t.shape, generator=generator) for k, t in model.adapter.get().items()}
    model.adapter.set(values)
    return values


@torch.no_grad()
def last_logits(model: MLLM, batch: list[Encoded], last: int = 1) -> torch.Tensor:
    """(rows, last, vocabulary): the logits at the last positions of prompts with answers, computed directly."""
    inputs = model.collate(batch, [sample.answer for sample in batch])
    logits: torch.Tensor = model.backbone.model(**inputs).logits[:, -last:]
    return logits.float()
