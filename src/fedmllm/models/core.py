"""LoRA-XS: Bałazy et al. 2024, "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters" (2405.17604).

A weight becomes W₀ + s B R A, of which only R (r, r) is trained. B (d_out, r) and A (r, d_in) are the leading singular vectors
of W₀, so every machine computes them itself, and R alone travels. As in LoRA-SB (2411.19557), both are orthonormal, which makes
s² times the projection of the weight's gradient onto them the change that a gradient step of R makes; R starts at 0.
"""

from __future__ import annotations

from typing import cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.nn import functional

from fedmllm.algorithms.factors import leading_directions
from fedmllm.errors import ConfigError


class _Frozen(nn.Module):
    """x ↦ A x. PEFT makes the parameters of its layers trainable whenever it enables them, so A is a buffer."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight: Tensor
        self.register_buffer("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)


class Core(_Frozen):
    """x ↦ B R x."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self.core = nn.Parameter(torch.zeros(weight.shape[1], weight.shape[1], device=weight.device))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(functional.linear(x, self.core))


def insert_cores(model: PeftModel, rank: int, target: str | None) -> None:
    """Replace the factors of every LoRA layer of the model by a frozen A, and by a frozen B behind a trained R.

    Draws from torch's global generator. Raises ConfigError for a layer that is not linear or has no such rank.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        base = layer.get_base_layer()
        if not isinstance(base, nn.Linear):
            raise ConfigError(
                f'model.adapter.kind = "lora-xs" adapts linear layers only, and model.lora.target = {target!r} matches '
                f"{name!r}; let it match others."
            )
        if rank > (most := min(base.in_features, base.out_features)):
            raise ConfigError(
                f'model.lora.rank = {rank}: model.adapter.kind = "lora-xs" trains a square matrix inside every weight, and the '
                f"smaller side of {name!r} is {most}; lower the rank to at most that."
            )
        weight = dequantize_module_weight(base).detach().to("cpu", torch.float64)
        b, _, a = leading_directions(weight, rank)
        factors = (factor.float().contiguous().to(base.weight.device) for factor in (a, b))
        layer.lora_A["default"], layer.lora_B["default"] = (make(f) for make, f in zip((_Frozen, Core), factors, strict=True))


def cores(model: PeftModel) -> dict[str, tuple[Tensor, Tensor]]:
    """module -> (A: (r, d_in), B: (d_out, r)) of every layer that `insert_cores` changed."""
    layers = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer) and "default" in layer.lora_B
    }
    return {
        name: (cast(Tensor, layer.lora_A["default"].weight), core.weight)
        for name, layer in layers.items()
        if isinstance(core := layer.lora_B["default"], Core)
    }
