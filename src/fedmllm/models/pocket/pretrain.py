"""Make the pocket model from nothing: `python -m fedmllm.models.pocket.pretrain --out DIR`.

Seeded and restartable: the batch of step `i` is a function of the seed and `i`, and a checkpoint holds weights, optimizer
and step, so a run that was killed goes on where it was and ends with the same weights. About an hour on two cores.

One row of a batch is a picture followed by several question-answer blocks. A block sees the picture and itself, never
another block, and its positions start right after the picture: each block is exactly the prompt that the finished model
will meet, while the picture is encoded once for all of them.

Answers alone teach the vision tower slowly: the language model first learns what can be guessed without looking, and stays
there for long (docs/log.md has the figures). So two linear heads, thrown away afterwards, read from each image token the
colour and the shape of the thing whose centre is in its cell: first alone, on many pictures and no text, then beside the
answers with a weight that falls to nothing. A last stage asks mostly yes/no questions: to compare what is asked for with
what is there comes last and takes practice.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor
from transformers import Idefics3ForConditionalGeneration, PreTrainedTokenizerFast

from fedmllm.models.pocket import architecture as parts
from fedmllm.models.pocket.questions import EVENLY, MOSTLY_PRESENCE, ask_scene, ask_text
from fedmllm.models.pocket.scenes import COLORS, SHAPES, cells, draw_scene
from fedmllm.rng import seed_for, stream
from fedmllm.tensors import write_atomically


@dataclass(frozen=True)
class Recipe:
    vision_steps: int = 360
    vision_rows: int = 256
    vision_lr: float = 1.5e-3
    answer_steps: int = 1040
    presence_steps: int = 400
    presence_lr: float = 1e-3
    rows: int = 32
    questions: int = 5
    text_share: float = 0.3  # rows without a picture
    lr: float = 2e-3
    vision_share: float = 0.1  # of that learning rate for the vision tower, which forgets shapes at the full one
    warmup: int = 60
    weight_decay: float = 0.05
    most_things: int = 3
    cells_until: float = 0.5  # share of the later steps over which the weight of the cell loss falls from 1 to 0
    save_every: int = 100
    seed: int = 0

    @property
    def presence_from(self) -> int:
        return self.vision_steps + self.answer_steps

    @property
    def steps(self) -> int:
        return self.presence_from + self.presence_steps


@dataclass(frozen=True)
class Batch:
    """`ids`, `positions`, `labels`: (rows, length); `mask`: (rows, 1, length, length) bool; `pixels`: (pictures, 1, 3, S, S);
    `colors`, `shapes`: (pictures, image tokens), what is in each cell."""

    ids: Tensor
    positions: Tensor
    labels: Tensor
    mask: Tensor
    pixels: Tensor
    colors: Tensor
    shapes: Tensor


def _encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _inside(entries: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    colors, shapes = (torch.tensor([entry[k] for entry in entries]) for k in range(2))
    return colors, shapes


def make_pictures(recipe: Recipe, step: int) -> Batch:
    """A batch of pictures alone, for the vision steps; its text tensors are empty."""
    grid = int(parts.IMAGE_TOKENS**0.5)
    drawn = [draw_scene(stream(recipe.seed, "picture", step, row), recipe.most_things) for row in range(recipe.vision_rows)]
    none = torch.empty(0, dtype=torch.long)
    pictures = torch.from_numpy(parts.pixels([scene.image for scene in drawn])).unsqueeze(1)
    return Batch(none, none, none, none, pictures, *_inside([cells(scene, grid) for scene in drawn]))


@dataclass
class _Row:
    """One row under way. `block` is 0 for what all blocks see, then the number of the block."""

    ids: list[int]
    positions: list[int]
    labels: list[int]
    block: list[int]

    @classmethod
    def begin(cls, prefix: list[int]) -> _Row:
        return cls(list(prefix), list(range(len(prefix))), [-100] * len(prefix), [0] * len(prefix))

    def append(self, asked: list[int], said: list[int]) -> None:
        after_prefix, length = self.block.count(0), len(asked) + len(said)
        self.ids += asked + said
        self.positions += range(after_prefix, after_prefix + length)
        self.labels += [-100] * len(asked) + said
        self.block += [self.block[-1] + 1] * length


def make_batch(tokenizer: PreTrainedTokenizerFast, recipe: Recipe, step: int) -> Batch:
    """The batch of `step`. Labels are −100 except on answers and the end mark that follows each."""
    image_part = f"{parts.AROUND}{parts.GLOBAL}{parts.IMAGE * parts.IMAGE_TOKENS}{parts.AROUND}"
    prefixes = {True: _encode(tokenizer, f"{parts.BEGIN}User:{image_part}"), False: _encode(tokenizer, f"{parts.BEGIN}User:")}
    # Scenes start simple: words attach to pictures sooner when there is little else to explain.
    most = 1 if step < recipe.vision_steps + 60 else recipe.most_things
    last = step >= recipe.presence_from
    single, asks = (0.75, MOSTLY_PRESENCE) if last else (0.45, EVENLY)
    grid = int(parts.IMAGE_TOKENS**0.5)
    rows, images, inside = [], [], []
    for number in range(recipe.rows):
        rng = stream(recipe.seed, "row", step, number)
        pictured = rng.random() >= recipe.text_share
        if pictured:
            scene = draw_scene(rng, most, single)
            images.append(scene.image)
            inside.append(cells(scene, grid))
            pairs = ask_scene(scene, rng, recipe.questions, asks)
        else:
            pairs = [ask_text(rng) for _ in range(recipe.questions)]
        row = _Row.begin(prefixes[pictured])
        for question, answer in pairs:
            asked = _encode(tokenizer, f" {question}{parts.END}\nAssistant:")
            row.append(asked, _encode(tokenizer, f" {answer}{parts.END}"))
        rows.append(row)
    length = max(len(row.ids) for row in rows)

    def padded(lists: list[list[int]], pad: int) -> Tensor:
        return torch.tensor([entries + [pad] * (length - len(entries)) for entries in lists])

    block = padded([row.block for row in rows], -1)
    same = (block[:, :, None] == block[:, None, :]) | (block[:, None, :] == 0)
    mask = same & torch.ones(length, length, dtype=torch.bool).tril()
    return Batch(
        padded([row.ids for row in rows], tokenizer.pad_token_id),
        padded([row.positions for row in rows], 0),
        padded([row.labels for row in rows], -100),
        mask.unsqueeze(1),
        torch.from_numpy(parts.pixels(images)).unsqueeze(1),
        *_inside(inside),
    )


class CellHeads(torch.nn.Module):
    """Two linear readings of an image token: (…, hidden) to the numbers of `scenes.cells`."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.color = torch.nn.Linear(hidden, len(COLORS) + 1)
        self.shape = torch.nn.Linear(hidden, len(SHAPES) + 1)

    def loss(self, tokens: Tensor, batch: Batch) -> Tensor:
        """The cross-entropy of both readings: the mean over things, and a fifth of the mean over empty cells."""
        total = torch.zeros(())
        for head, truth in ((self.color, batch.colors), (self.shape, batch.shapes)):
            for cell, weight in ((truth > 0, 1.0), (truth == 0, 0.2)):
                total = total + weight * torch.nn.functional.cross_entropy(head(tokens[cell]), truth[cell])
        return total


def vision_loss(model: Idefics3ForConditionalGeneration, heads: CellHeads, batch: Batch) -> Tensor:
    return heads.loss(torch.stack(model.get_image_features(pixel_values=batch.pixels).pooler_output), batch)


def losses_of(model: Idefics3ForConditionalGeneration, heads: CellHeads, batch: Batch) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over answer tokens (logits are made at those positions only), and the cell loss."""
    features = model.get_image_features(pixel_values=batch.pixels)
    outputs = model.model(
        input_ids=batch.ids,
        attention_mask=batch.mask,
        position_ids=batch.positions,
        mm_encoder_outputs={"image": features},
        use_cache=False,
    )
    targets = batch.labels[:, 1:]
    wanted = targets != -100
    hidden = outputs.last_hidden_state[:, :-1][wanted]
    answers = torch.nn.functional.cross_entropy(model.lm_head(hidden), targets[wanted])
    return answers, heads.loss(torch.stack(features.pooler_output), batch)


def _optimizer(model: torch.nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    groups: list[dict[str, Any]] = []
    for of_vision in (True, False):
        own = [p for name, p in model.named_parameters() if (".vision_model." in name or ".connector." in name) == of_vision]
        for decay, parameters in (
            (recipe.weight_decay, [p for p in own if p.ndim >= 2]),
            (0.0, [p for p in own if p.ndim < 2]),
        ):
            groups.append({"params": parameters, "weight_decay": decay, "vision": of_vision})
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98))


def learning_rate(recipe: Recipe, step: int) -> float:
    """Warm-up and cosine, once for each of the three stages."""
    first, last, peak = 0, recipe.vision_steps, recipe.vision_lr
    if step >= recipe.presence_from:
        first, last, peak = recipe.presence_from, recipe.steps, recipe.presence_lr
    elif step >= recipe.vision_steps:
        first, last, peak = recipe.vision_steps, recipe.presence_from, recipe.lr
    if step - first < recipe.warmup:
        return peak * (step - first + 1) / recipe.warmup
    progress = (step - first - recipe.warmup) / max(1, last - first - recipe.warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def save_checkpoint(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int, recipe: Recipe) -> None:
    tensors = {f"model.{name}": p.detach().contiguous() for name, p in model.named_parameters()}
    for index, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{slot}": value.contiguous() for slot, value in slots.items()}
    write_atomically(path, serialize(tensors, metadata={"step": str(step), "recipe": json.dumps(vars(recipe))}))


def load_checkpoint(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe) -> int:
    """The step to go on from. Raises ValueError where the checkpoint was made by another recipe."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    if json.loads(metadata["recipe"]) != vars(recipe):
        raise ValueError(f"{path} was made with another recipe; choose another --out or remove it.")
    tensors = load_file(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, slot = name.split(".")
            state.setdefault(int(index), {})[slot] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(metadata["step"])


def export(model: Idefics3ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """The Hugging Face folder that ships. Weights are stored in float16 and computed with in float32."""
    parts.build_processor(tokenizer).save_pretrained(out)
    model.config.save_pretrained(out)
    model.generation_config.save_pretrained(out)
    tensors = {name: p.detach().to(torch.float16).contiguous() for name, p in model.named_parameters()}
    write_atomically(out / "model.safetensors", serialize(tensors, metadata={"format": "pt"}))


def pretrain(recipe: Recipe, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed_for(recipe.seed, "pocket-init"))
    tokenizer = parts.build_tokenizer(recipe.seed)
    model = parts.build_model(parts.build_config(tokenizer))
    heads = CellHeads(model.config.text_config.hidden_size)
    both = torch.nn.ModuleDict({"model": model, "heads": heads})
    optimizer = _optimizer(both, recipe)
    checkpoint = out / "checkpoint.safetensors"
    start = load_checkpoint(checkpoint, both, optimizer, recipe) if checkpoint.exists() else 0
    count = sum(p.numel() for p in model.parameters())
    print(f"pocket model: {count / 1e6:.2f} M parameters, steps {start} to {recipe.steps}", file=sys.stderr)
    began = time.monotonic()
    losses: list[tuple[float, float]] = []
    for step in range(start, recipe.steps):
        for group in optimizer.param_groups:
            share = recipe.vision_share if group["vision"] and step >= recipe.vision_steps else 1.0
            group["lr"] = share * learning_rate(recipe, step)
        if step < recipe.vision_steps:
            inside = loss = vision_loss(model, heads, make_pictures(recipe, step))
            answers = torch.zeros(())
        else:
            answers, inside = losses_of(model, heads, make_batch(tokenizer, recipe, step))
            later = (step - recipe.vision_steps) / recipe.answer_steps
            loss = answers + max(0.0, 1.0 - later / recipe.cells_until) * inside
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        losses.append((float(answers.detach()), float(inside.detach())))
        if (step + 1) % 20 == 0:
            (said, seen), speed = np.mean(losses[-20:], axis=0), (time.monotonic() - began) / len(losses)
            line = f"step {step + 1:5d}  answers {said:.4f}  cells {seen:.4f}  {speed:.2f} s a step"
            print(line, file=sys.stderr, flush=True)
        if (step + 1) % recipe.save_every == 0 or step + 1 in (recipe.vision_steps, recipe.presence_from, recipe.steps):
            save_checkpoint(checkpoint, both, optimizer, step + 1, recipe)
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
    pretrain(recipe, arguments.out)


if __name__ == "__main__":
    main()
