"""Checkpoints of the pre-training, and the finished model as a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

from fedmllm.storage.atomic import write_atomically
from recipes.pocket.architecture import Family
from recipes.pocket.card import card
from recipes.pocket.families import DEFAULT
from recipes.pocket.recipe import Recipe


def _written_by(recipe: Recipe, family: Family) -> dict[str, str]:
    """The entries of a checkpoint that say what wrote it. It names the family and float32 only if they are not the first's."""
    settings = {name: value for name, value in vars(recipe).items() if name != "float32" or value}
    named = {} if family.name == DEFAULT else {"family": family.name}
    return {"recipe": json.dumps(settings), **named}


def save_checkpoint(
    path: Path, model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer], step: int, recipe: Recipe, family: Family
) -> None:
    tensors = {f"model.{name}": p.detach().contiguous() for name, p in model.named_parameters()}
    for number, optimizer in enumerate(optimizers):
        for index, slots in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{index}.{slot}": value.contiguous() for slot, value in slots.items()}
    write_atomically(path, serialize(tensors, metadata={"step": str(step), **_written_by(recipe, family)}))


def load_checkpoint(
    path: Path, model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer], recipe: Recipe, family: Family
) -> int:
    """Load the checkpoint and return the step to continue from. Raises ValueError if another recipe or family wrote it."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    step = int(metadata.pop("step"))
    if metadata != _written_by(recipe, family):
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
    return step


def copy_text(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Start the text model from that of a finished pocket model of any family, and the biases that it lacks from zero.

    The tokens that both tokenizers have keep their embeddings. Raises RuntimeError if the sizes differ.
    """
    given = dict(AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).get_decoder().named_parameters())
    ids, own_ids = PreTrainedTokenizerFast.from_pretrained(folder).get_vocab(), tokenizer.get_vocab()
    both = [token for token in own_ids if token in ids]
    embeddings = given.pop("embed_tokens.weight")
    with torch.no_grad():
        for name, parameter in model.get_decoder().named_parameters():
            if name in given:
                parameter.copy_(given[name])
            elif name == "embed_tokens.weight":
                parameter[[own_ids[token] for token in both]] = embeddings[[ids[token] for token in both]]
            else:
                parameter.zero_()


def stored(parameter: Tensor, multiples: float) -> Tensor:
    """The parameter as a folder holds it: in float16, and a matrix as multiples of `multiples` unless that is 0."""
    weights = parameter.detach().to("cpu", torch.float32)
    if multiples and weights.ndim > 1:
        weights = (weights / multiples).round() * multiples
    return weights.to(torch.float16).contiguous()


def export(family: Family, model: Any, tokenizer: PreTrainedTokenizerFast, out: Path, recipe: Recipe, step: int) -> None:
    """Write the model as it is shipped, after `step` steps. Weights are stored in float16 and used in float32."""
    family.build_processor(tokenizer).save_pretrained(out)
    model.config.save_pretrained(out)
    model.generation_config.save_pretrained(out)
    tensors = {name: stored(parameter, family.multiples) for name, parameter in model.named_parameters()}
    write_atomically(out / "model.safetensors", serialize(tensors, metadata={"format": "pt"}))
    write_atomically(out / "README.md", card(family, model, recipe, step).encode())
