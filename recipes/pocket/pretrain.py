"""Train a pocket model from scratch: `python -m recipes.pocket.pretrain --out DIR`, in the root of the repository.

With `--family`, the same recipe makes a model of other classes; `families.py` has the table.

Training is seeded and can be resumed: the batch of step `i` depends only on the seed and `i`, and a checkpoint holds weights,
optimizer states and the step, so a run that was killed continues from its checkpoint and ends with the same weights. It
takes 60 to 90 minutes on two cores.

There are four stages (`recipe.Recipe`). Each teaches what the next one needs and would teach slowly or not at all: a model
first learns what can be guessed without looking, and stays there for a long time (docs/log.md has the figures).

1. Vision: linear heads, discarded afterwards, predict from each image token the colour and the shape of the thing whose centre
   is in its cell, and the letters in the cell. Many pictures, no text. These losses continue in the answer stage with a weight
   that falls to zero.
2. Matching: lettered options, then each option again, followed by its letter, in texts only. Some such rows stay in every
   later batch, because the model forgets the skill without them.
3. Answers to questions about pictures and texts.
4. Presence: mostly yes/no questions. Comparing a description with a picture is the last skill that the model learns, and it
   takes practice.

From the second stage on, one layer and four attention heads of the text model are supervised directly (`TokensBefore`,
`look_back_loss`, `look_at_picture_loss`): a model of this size does not discover such attention by itself in the time
available.

Matrices are trained with Muon and all other parameters with AdamW, in bfloat16 autocast with eager attention. This was the
fastest in wall-clock time on a CPU with bfloat16 units. On one without, bfloat16 is emulated, and `--float32` is many times
faster: the same recipe with more exact numbers, so with other weights.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from fedmllm.models.shipped import SHIPPED
from fedmllm.rng import seed_for
from recipes.pocket import architecture
from recipes.pocket.architecture import Family
from recipes.pocket.batches import Batches
from recipes.pocket.checkpoints import copy_text, export, load_checkpoint, save_checkpoint
from recipes.pocket.families import DEFAULT, FAMILIES
from recipes.pocket.losses import Heads, step_loss
from recipes.pocket.muon import Float32Muon
from recipes.pocket.recipe import Recipe, learning_rates, stage_of


def _optimizers(trained: torch.nn.Module, recipe: Recipe, family: Family) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers (Jordan 2024, with the step size of 2502.16982), AdamW for all other parameters."""
    named = list(trained.named_parameters())
    groups: list[list[dict[str, Any]]] = [[], []]
    for is_vision in (True, False):
        own = [(n, p) for n, p in named if any(part in n for part in family.vision) == is_vision]
        matrices = [p for n, p in own if p.ndim == 2 and any(part in n for part in family.layers)]
        rest = [p for _, p in own if not any(p is m for m in matrices)]
        groups[0].append({"params": matrices, "weight_decay": recipe.weight_decay, "vision": is_vision})
        for decay, parameters in (
            (recipe.weight_decay, [p for p in rest if p.ndim >= 2]),
            (0.0, [p for p in rest if p.ndim < 2]),
        ):
            groups[1].append({"params": parameters, "weight_decay": decay, "vision": is_vision})
    muon = Float32Muon if recipe.float32 else torch.optim.Muon
    return [
        muon(groups[0], momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups[1], betas=(0.9, 0.98)),
    ]


def _set_learning_rates(optimizers: Sequence[torch.optim.Optimizer], recipe: Recipe, step: int) -> None:
    for optimizer, rate in zip(optimizers, learning_rates(recipe, step), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate * (recipe.vision_share if group["vision"] and step >= recipe.vision_steps else 1.0)


def pretrain(
    recipe: Recipe,
    out: Path,
    family: Family = FAMILIES[DEFAULT],
    text_from: Path | None = None,
    workers: int = 0,
    *,
    compiled: bool = False,
    device: str = "cpu",
) -> None:
    """Train in the folder `out`, or resume if it has a checkpoint. The text model starts from that of the pocket model in the
    folder `text_from`, if given.

    `workers` other processes produce the batches, with the same result. `compiled` fuses the operations between
    the matrix products: three times as fast, and the same numbers up to rounding. It needs a C++ compiler, and about a
    minute for each new text length.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed_for(recipe.seed, "pocket-init"))
    tokenizer = architecture.build_tokenizer(recipe.seed, special=family.special)
    model = family.build_model(family.build_config(tokenizer))
    model.set_attn_implementation("eager")
    heads = Heads(model.config.text_config.hidden_size)
    if text_from is not None:
        copy_text(model, tokenizer, text_from)
    trained = torch.nn.ModuleDict({"model": model, "heads": heads}).to(device)
    optimizers = _optimizers(trained, recipe, family)
    checkpoint = out / "checkpoint.safetensors"
    start = load_checkpoint(checkpoint, trained, optimizers, recipe, family) if checkpoint.exists() else 0
    if compiled:
        model.get_decoder().compile(dynamic=False)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{family.title}: {parameters / 1e6:.2f} M parameters, steps {start} to {recipe.steps}", file=sys.stderr)
    start_time = time.monotonic()
    losses: list[tuple[float, float]] = []
    batches = DataLoader(Batches(family, tokenizer, recipe, start), batch_size=None, num_workers=workers)
    for step, batch in enumerate(batches, start):
        if step == recipe.vision_steps:
            optimizers = _optimizers(trained, recipe, family)
        _set_learning_rates(optimizers, recipe, step)
        loss, answer_loss, cell_loss = step_loss(family, model, heads, batch.to(device), recipe, step)
        trained.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        losses.append((float(answer_loss.detach()), float(cell_loss.detach())))
        if (step + 1) % 20 == 0:
            (answers, cells), seconds = np.mean(losses[-20:], axis=0), (time.monotonic() - start_time) / len(losses)
            line = f"step {step + 1:5d}  answers {answers:.4f}  cells {cells:.4f}  {seconds:.2f} s per step"
            print(line, file=sys.stderr, flush=True)
        if (step + 1) % recipe.save_every == 0 or step + 1 == stage_of(recipe, step)[1]:
            save_checkpoint(checkpoint, trained, optimizers, step + 1, recipe, family)
            export(family, model, tokenizer, out / "pocket", recipe, step + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint and, in pocket/, the finished model")
    parser.add_argument("--family", choices=FAMILIES, default=DEFAULT, help="the classes of the model (default: %(default)s)")
    parser.add_argument(
        "--text-from",
        metavar="MODEL",
        help='"pocket" or a folder: start the text model from that of a finished pocket model, without the matching stage',
    )
    defaults = Recipe()
    parser.add_argument("--answer-steps", type=int, default=defaults.answer_steps)
    parser.add_argument("--rows", type=int, default=defaults.rows)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--device", default="cpu", help="where to train, such as cuda (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes that make the batches (default: %(default)s)")
    parser.add_argument("--float32", action="store_true", help="for a CPU without bfloat16 units, where bfloat16 is slow")
    arguments = parser.parse_args()
    recipe = Recipe(answer_steps=arguments.answer_steps, rows=arguments.rows, seed=arguments.seed, float32=arguments.float32)
    source = None
    if arguments.text_from is not None:
        source = SHIPPED["pocket"].folder if arguments.text_from == "pocket" else Path(arguments.text_from)
        recipe = replace(recipe, match_steps=0, listing_steps=0)
    # On a GPU the recipe takes minutes, and compiling would take about one for each length of the texts.
    family, compiled = FAMILIES[arguments.family], arguments.device == "cpu" and shutil.which("g++") is not None
    pretrain(recipe, arguments.out, family, source, arguments.workers, compiled=compiled, device=arguments.device)


if __name__ == "__main__":
    main()
