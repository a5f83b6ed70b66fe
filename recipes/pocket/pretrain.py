"""Make the pocket model from nothing: `python -m recipes.pocket.pretrain --out DIR`.

Seeded and restartable: the batch of step `i` is a function of the seed and `i`, and a checkpoint holds weights, optimizer
and step, so a run that was killed goes on where it was and ends with the same weights. An hour to an hour and a half on two
cores.

Four stages (`batches.Recipe`), as what is needed later has to be there before the answers, which teach it slowly or not
at all: a model first learns what can be guessed without looking, and stays there for long (docs/log.md has the figures).

1. Vision: linear heads, thrown away afterwards, read from each image token the colour and the shape of the thing whose centre
   is in its cell, and the letters that stand there; many pictures, no text. They go on beside the answers with a weight that
   falls to nothing.
2. Matching: a word among lettered options, then the word again with its letter to be said, in texts alone. Some such rows
   stay in every later batch, or it is forgotten.
3. Answers about pictures and texts.
4. Presence: mostly yes/no questions, as to compare what is asked for with what is there comes last and takes practice.

From the second stage on a layer and four heads of the text model are told what to do (`TokensBefore`, `looking_back_loss`,
`looking_at_pictures_loss`): a model this small does not find it out by itself in the time there is.

Matrices are trained with Muon, all else with AdamW, in bfloat16 autocast with plain attention: what was fastest by the
clock on a CPU with bfloat16 units. Without them the recipe is the same, and slower.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Idefics3ForConditionalGeneration, PreTrainedTokenizerFast

from fedmllm.rng import seed_for
from fedmllm.tensors import write_atomically
from recipes.pocket import architecture as parts
from recipes.pocket.batches import Batch, Batches, Recipe
from recipes.pocket.scenes import ALPHABET, COLORS, NAMES, SLOTS


class CellHeads(torch.nn.Module):
    """Linear readings of an image token: (…, hidden) to the numbers of `scenes.cells` and `scenes.letter_cells`."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.color = torch.nn.Linear(hidden, len(COLORS) + 1)
        self.shape = torch.nn.Linear(hidden, len(NAMES) + 1)
        self.letters = torch.nn.ModuleList(torch.nn.Linear(hidden, len(ALPHABET) + 1) for _ in range(SLOTS))

    def loss(self, tokens: Tensor, batch: Batch) -> Tensor:
        """The cross-entropy of all readings: the mean over what is there, and a fifth of the mean over what is empty."""
        total = torch.zeros(())
        readings: list[tuple[torch.nn.Module, Tensor, float]] = [
            (self.color, batch.colors, 1.0),
            (self.shape, batch.shapes, 1.0),
        ]
        readings += [(head, batch.letters[..., slot], 0.5) for slot, head in enumerate(self.letters)]
        for head, truth, share in readings:
            for cell, weight in ((truth > 0, share), (truth == 0, 0.2 * share)):
                if cell.any():
                    total = total + weight * torch.nn.functional.cross_entropy(head(tokens[cell]), truth[cell])
        return total


class TokensBefore(torch.nn.Module):
    """Linear readings, out of the second layer, of the tokens one, two and three places back; scored with the embeddings."""

    LAYER, PLACES = 2, 3

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.readings = torch.nn.ModuleList(torch.nn.Linear(hidden, hidden) for _ in range(self.PLACES))

    def loss(self, states: Tensor, batch: Batch, embeddings: Tensor) -> Tensor:
        """Mean cross-entropy over every third position of each block; `states` (rows, length, hidden)."""
        states, total = torch.nn.functional.rms_norm(states, states.shape[-1:]), torch.zeros(())
        for places, reading in enumerate(self.readings, 1):
            # A block starts anew after the shared prefix: what stands right before it in the row is not what it sees.
            near = (batch.positions[:, places:] - batch.positions[:, :-places] == places)[:, ::3]
            logits = torch.nn.functional.linear(reading(states[:, places::3][near]), embeddings)
            total = total + torch.nn.functional.cross_entropy(logits, batch.ids[:, :-places][:, ::3][near]) / self.PLACES
        return total


LOOKING_BACK = (2, (0, 1))
"""The layer, and the heads of it, that are told to look at the earlier places of their token."""
LOOKING_AT_PICTURES = (1, (0, 1))
"""The layer, and the heads of it, that are told to look at the cells of the colour and of the shape their token names."""


class Heads(torch.nn.Module):
    """What is trained beside the model and thrown away."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.cells = CellHeads(hidden)
        self.before = TokensBefore(hidden)


def _unspent(attention: Tensor, wanted: Tensor) -> Tensor:
    """Mean −log of the share of its attention (rows, length, length) that a token spends where `wanted`, over those that
    have such a place."""
    has = wanted.any(dim=-1)
    if not has.any():
        return torch.zeros(())
    return -((attention * wanted).sum(dim=-1)[has].float() + 1e-4).log().mean()


def looking_back_loss(attention: Tensor, batch: Batch, image_token: int) -> Tensor:
    """How little of its attention (rows, heads, length, length) a token spends on its own earlier occurrences, where there
    are any, in the heads of `LOOKING_BACK`."""
    length = batch.ids.shape[1]
    same = (batch.ids[:, :, None] == batch.ids[:, None, :]) & batch.mask[:, 0] & ~torch.eye(length, dtype=torch.bool)
    said = (batch.ids != image_token) & (batch.positions.diff(prepend=batch.positions[:, :1]) != 0)
    heads = LOOKING_BACK[1]
    return torch.stack([_unspent(attention[:, head], same & said[:, :, None]) for head in heads]).mean()


def looking_at_pictures_loss(attention: Tensor, batch: Batch) -> Tensor:
    """How little of its attention (rows, heads, length, length) the name of a colour or a shape spends on the cells where it
    is, or on the first token where the picture has none such."""
    pictured = batch.shown.any(dim=-1).any(dim=0)
    total = torch.zeros(())
    for head, named, shown in zip(LOOKING_AT_PICTURES[1], batch.named, batch.shown, strict=True):
        there = (named[:, :, None] == shown[:, None, :]) & (named > 0)[:, :, None]
        absent = (named > 0) & pictured[:, None] & ~there.any(dim=-1)
        there[:, :, 0] |= absent
        total = total + _unspent(attention[:, head], there)
    return total / len(batch.named)


def vision_loss(model: Idefics3ForConditionalGeneration, heads: CellHeads, batch: Batch) -> Tensor:
    return heads.loss(torch.stack(model.get_image_features(pixel_values=batch.pixels).pooler_output), batch)


def losses_of(
    model: Idefics3ForConditionalGeneration, heads: Heads, batch: Batch, guided: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross-entropy over answer tokens (logits are made at those positions only), the loss of the cells
    (0 without pictures) and, where `guided`, what the text model is told about tokens (else 0)."""
    inside, encoded = torch.zeros(()), {}
    if len(batch.pixels):
        features = model.get_image_features(pixel_values=batch.pixels)
        inside = heads.cells.loss(torch.stack(features.pooler_output), batch)
        asked_about = int((batch.ids == model.config.image_token_id).sum()) // parts.IMAGE_TOKENS
        features.pooler_output = features.pooler_output[:asked_about]
        encoded = {"mm_encoder_outputs": {"image": features}}
    # Plain attention adds its mask, and in float32 it would make all that follows float32.
    kind = torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32
    outputs = model.model(
        input_ids=batch.ids,
        attention_mask=torch.zeros(batch.mask.shape, dtype=kind).masked_fill_(~batch.mask, -torch.inf),
        position_ids=batch.positions,
        **encoded,
        use_cache=False,
        output_hidden_states=guided,
        output_attentions=guided,
    )
    guide = torch.zeros(())
    if guided:
        guide = heads.before.loss(outputs.hidden_states[TokensBefore.LAYER], batch, model.lm_head.weight)
        guide = guide + 0.5 * looking_back_loss(outputs.attentions[LOOKING_BACK[0]], batch, model.config.image_token_id)
        guide = guide + 0.5 * looking_at_pictures_loss(outputs.attentions[LOOKING_AT_PICTURES[0]], batch)
    targets = batch.labels[:, 1:]
    wanted = targets != -100
    hidden = outputs.last_hidden_state[:, :-1][wanted]
    answers = torch.nn.functional.cross_entropy(model.lm_head(hidden), targets[wanted])
    return answers, inside, guide


def _optimizers(both: torch.nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices (Jordan 2024, with the step size of 2502.16982), AdamW for all else."""
    named = list(both.named_parameters())
    groups: list[list[dict[str, Any]]] = [[], []]
    for of_vision in (True, False):
        own = [(n, p) for n, p in named if (".vision_model." in n or ".connector." in n) == of_vision]
        matrices = [p for n, p in own if p.ndim == 2 and (".layers." in n or ".connector." in n)]
        rest = [p for _, p in own if not any(p is m for m in matrices)]
        groups[0].append({"params": matrices, "weight_decay": recipe.weight_decay, "vision": of_vision})
        for decay, parameters in (
            (recipe.weight_decay, [p for p in rest if p.ndim >= 2]),
            (0.0, [p for p in rest if p.ndim < 2]),
        ):
            groups[1].append({"params": parameters, "weight_decay": decay, "vision": of_vision})
    return [
        torch.optim.Muon(groups[0], momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups[1], betas=(0.9, 0.98)),
    ]


def stage_of(recipe: Recipe, step: int) -> tuple[int, int, tuple[float, float]]:
    """First step, end and highest learning rates of the stage that `step` is in."""
    stages = (
        (0, recipe.vision_steps, recipe.vision_rates),
        (recipe.vision_steps, recipe.answers_from, recipe.match_rates),
        (recipe.answers_from, recipe.presence_from, recipe.answer_rates),
        (recipe.presence_from, recipe.steps, recipe.presence_rates),
    )
    return next(stage for stage in stages if step < stage[1])


def learning_rates(recipe: Recipe, step: int) -> tuple[float, float]:
    """Of matrices and of all else. Warm-up and cosine, once for each stage."""
    first, end, peaks = stage_of(recipe, step)
    if step - first < recipe.warmup:
        share = (step - first + 1) / recipe.warmup
    else:
        progress = (step - first - recipe.warmup) / max(1, end - first - recipe.warmup)
        share = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))
    return share * peaks[0], share * peaks[1]


def save_checkpoint(
    path: Path, model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer], step: int, recipe: Recipe
) -> None:
    tensors = {f"model.{name}": p.detach().contiguous() for name, p in model.named_parameters()}
    for number, optimizer in enumerate(optimizers):
        for index, slots in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{index}.{slot}": value.contiguous() for slot, value in slots.items()}
    write_atomically(path, serialize(tensors, metadata={"step": str(step), "recipe": json.dumps(vars(recipe))}))


def load_checkpoint(path: Path, model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer], recipe: Recipe) -> int:
    """The step to go on from. Raises ValueError where the checkpoint was made by another recipe."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    if metadata["recipe"] != json.dumps(vars(recipe)):
        raise ValueError(f"{path} was made with another recipe; choose another --out or remove it.")
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
    """The Hugging Face folder that ships. Weights are stored in float16 and computed with in float32."""
    parts.build_processor(tokenizer).save_pretrained(out)
    model.config.save_pretrained(out)
    model.generation_config.save_pretrained(out)
    tensors = {name: p.detach().to(torch.float16).contiguous() for name, p in model.named_parameters()}
    write_atomically(out / "model.safetensors", serialize(tensors, metadata={"format": "pt"}))


def loss_of(
    model: Idefics3ForConditionalGeneration, heads: Heads, batch: Batch, recipe: Recipe, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What is minimised at `step`, and of it the losses of the answers and of the cells."""
    with torch.autocast("cpu", torch.bfloat16):
        if step < recipe.vision_steps:
            inside = vision_loss(model, heads.cells, batch)
            return inside, torch.zeros(()), inside
        answers, inside, guide = losses_of(model, heads, batch, guided=True)
        later = (step - recipe.answers_from) / recipe.answer_steps
        return answers + guide + max(0.0, 1.0 - later / recipe.cells_until) * inside, answers, inside


def pretrain(recipe: Recipe, out: Path, workers: int = 0, *, compiled: bool = False) -> None:
    """Train, or go on training, in `out`. `workers`: 1 for a second process that makes the batches; the result is the same.

    `compiled` fuses what happens between the matrix products (it takes a C++ compiler, and about a minute at each new
    length of texts): three times the speed, and the same numbers up to rounding.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed_for(recipe.seed, "pocket-init"))
    tokenizer = parts.build_tokenizer(recipe.seed)
    model = parts.build_model(parts.build_config(tokenizer))
    model.set_attn_implementation("eager")
    hidden = model.config.text_config.hidden_size
    heads = Heads(hidden)
    both = torch.nn.ModuleDict({"model": model, "heads": heads})
    optimizers = _optimizers(both, recipe)
    checkpoint = out / "checkpoint.safetensors"
    start = load_checkpoint(checkpoint, both, optimizers, recipe) if checkpoint.exists() else 0
    if compiled:
        model.model.text_model.compile(dynamic=False)
    count = sum(p.numel() for p in model.parameters())
    print(f"pocket model: {count / 1e6:.2f} M parameters, steps {start} to {recipe.steps}", file=sys.stderr)
    began = time.monotonic()
    losses: list[tuple[float, float]] = []
    batches = DataLoader(Batches(tokenizer, recipe, start), batch_size=None, num_workers=workers)
    for step, batch in enumerate(batches, start):
        _, end, _ = stage_of(recipe, step)
        if step == recipe.vision_steps:
            optimizers = _optimizers(both, recipe)
        for optimizer, rate in zip(optimizers, learning_rates(recipe, step), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * (recipe.vision_share if group["vision"] and step >= recipe.vision_steps else 1.0)
        loss, answers, inside = loss_of(model, heads, batch, recipe, step)
        both.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        losses.append((float(answers.detach()), float(inside.detach())))
        if (step + 1) % 20 == 0:
            (said, seen), speed = np.mean(losses[-20:], axis=0), (time.monotonic() - began) / len(losses)
            line = f"step {step + 1:5d}  answers {said:.4f}  cells {seen:.4f}  {speed:.2f} s a step"
            print(line, file=sys.stderr, flush=True)
        if (step + 1) % recipe.save_every == 0 or step + 1 == end:
            save_checkpoint(checkpoint, both, optimizers, step + 1, recipe)
            export(model, tokenizer, out / "pocket")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint and, in pocket/, the finished model")
    defaults = Recipe()
    parser.add_argument("--answer-steps", type=int, default=defaults.answer_steps)
    parser.add_argument("--rows", type=int, default=defaults.rows)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    arguments = parser.parse_args()
    recipe = Recipe(answer_steps=arguments.answer_steps, rows=arguments.rows, seed=arguments.seed)
    pretrain(recipe, arguments.out, workers=1, compiled=shutil.which("g++") is not None)


if __name__ == "__main__":
    main()
