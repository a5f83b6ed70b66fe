"""Checkpoints of the pre-training, and the finished model as a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor
from transformers import Idefics3ForConditionalGeneration, PreTrainedTokenizerFast

from fedmllm.storage.atomic import write_atomically
from recipes.pocket import architecture
from recipes.pocket.recipe import Recipe


def save_checkpoint(
    path: Path, model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer], step: int, recipe: Recipe
) -> None:
    tensors = {f"model.{name}": p.detach().contiguous() for name, p in model.named_parameters()}
    for number, optimizer in enumerate(optimizers):
        for index, slots in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{index}.{slot}": value.contiguous() for slot, value in slots.items()}
    write_atomically(path, serialize(tensors, metadata={"step": str(step), "recipe": json.dumps(vars(recipe))}))


def load_checkpoint(path: Path, model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer], recipe: Recipe) -> int:
    """Load the checkpoint and return the step to continue from. Raises ValueError if another recipe wrote it."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    if metadata["recipe"] != json.dumps(vars(recipe)):
        raise ValueError(f"{path} was written by another recipe; choose another --out or remove the file.")
    tensors = load_file(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, number, index, slot = name.split(".")
            states[int(number)].setdefault(int(index), {})[slot] = value
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(metadata["step"])


def export(model: Idefics3ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the model as it is shipped. Weights are stored in float16 and used in float32."""
    architecture.build_processor(tokenizer).save_pretrained(out)
    model.config.save_pretrained(out)
    model.generation_config.save_pretrained(out)
    tensors = {name: p.detach().to(torch.float16).contiguous() for name, p in model.named_parameters()}
    write_atomically(out / "model.safetensors", serialize(tensors, metadata={"format": "pt"}))
