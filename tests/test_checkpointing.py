"""Gradient checkpointing: the same bits, and less that is kept for the backward pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fedmllm.algorithms import LocalRule
from fedmllm.config import TrainTable
from fedmllm.errors import ConfigError
from fedmllm.models.checkpointing import check_layers
from fedmllm.tensors import distance
from fedmllm.training.cohort import train_cohort
from test_cohort import load, work_of

PLAIN, AGAIN = (TrainTable(lr=1e-2, checkpointing=checkpointing) for checkpointing in (False, True))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["lora", "dora", "prompt-tuning"])
def test_layers_computed_again_train_the_same_adapter(tiny: Path, dataset: Path, kind: str, dropout: float) -> None:
    """Bit for bit: alone and in cohorts, with adapters that draw dropout themselves and with those of PEFT."""
    model = load(tiny, kind, dropout=dropout)
    works = [work_of(model, dataset, client, 5 + client, 2, 2, LocalRule()) for client in range(3 if kind == "lora" else 1)]
    if kind != "lora":
        works = [replace(work, received=model.adapter.get()) for work in works]
    assert model.fused == (kind == "lora")
    plain, again = (train_cohort(model, works, table) for table in (PLAIN, AGAIN))
    for result, expected in zip(again, plain, strict=True):
        assert distance(result.trained, expected.trained) == 0
        assert distance(result.trained, result.received) > 1e-3
        assert result.metrics == expected.metrics
    assert not any("forward" in vars(module) for module in model.model.modules()), "no layer stays as it was for training"


def test_layers_of_transformers_are_computed_again_as_well(tiny: Path, dataset: Path) -> None:
    model = load(tiny)
    model.fused = False
    works = [work_of(model, dataset, client, 5, 2, 1, LocalRule()) for client in range(2)]
    first, second = (train_cohort(model, works, table) for table in (PLAIN, AGAIN))
    assert [distance(a.trained, b.trained) for a, b in zip(first, second, strict=True)] == [0, 0]


def test_a_model_whose_layers_cannot_be_computed_again_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.checkpointing = true: transformers knows no layer of model\.name = 'odd'"):
        check_layers(nn.Linear(2, 2), "odd")


def test_what_accelerate_puts_before_a_layer_stays(tiny: Path, dataset: Path) -> None:
    """Its hooks for several devices replace `forward` of a module, as checkpointing does."""
    model = load(tiny)
    model.fused = False
    layer, seen = model.backbone.model.get_decoder().layers[0], list[int]()
    forward = layer.forward

    def moved(*args: object, **options: object) -> torch.Tensor:
        seen.append(1)
        return forward(*args, **options)  # type: ignore[no-any-return]

    layer.forward = moved
    train_cohort(model, [work_of(model, dataset, 0, 2, 2, 1, LocalRule())], AGAIN)
    assert layer.forward is moved
    assert len(seen) == 2, "in the forward pass, and again in the backward pass"
