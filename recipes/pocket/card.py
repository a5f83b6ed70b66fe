"""The model card of a pocket model as the recipe leaves it, before anything was measured."""

from __future__ import annotations

from typing import Any

from recipes.pocket import scenes
from recipes.pocket.architecture import IMAGE_TOKENS, Family
from recipes.pocket.recipe import Recipe

_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# A pocket model: {title}

An image-text-to-text model with {millions:.1f} million parameters, built from a stock class of transformers
({classes}) and trained by the recipe in the repository of fedmllm. It reads a picture of {size} × {size}
pixels as {tokens} image tokens. Weights are float16 on disk and float32 in use. To use it: `model.name = "FOLDER"`.

## How it was made

`python -m recipes.pocket.pretrain --family {family}{precision} --out DIR`, seed {seed}: {done}.{start} All pictures and
texts are generated. No picture or question of a benchmark is among them.

| stage | steps | what |
|---|---|---|
| vision | {r.vision_steps} | {r.vision_rows} pictures: colour, shape and letters from each image token |
| matching | {r.match_steps} | {r.match_rows} texts: lettered options, then each option again, followed by its letter |
| answers | {r.answer_steps} | {r.rows} rows of up to {r.questions} questions, and {r.kept_matches} rows of the stage before |
| presence | {r.presence_steps} | the same with mostly yes/no questions about what the picture shows |

## What it can do

Nothing was measured yet. `python -m benchmarks.pocket FOLDER` prints the table with intervals that belongs here. The model is
useful for tests and teaching only.
"""


def card(family: Family, model: Any, recipe: Recipe, step: int) -> str:
    """The card after `step` steps, as Markdown with the Hub's header.

    Only a model whose text model started from another's has no matching stage.
    """
    return _CARD.format(
        title=family.title,
        classes=type(model).__name__,
        millions=sum(p.numel() for p in model.parameters()) / 1e6,
        size=scenes.SIZE,
        tokens=IMAGE_TOKENS,
        family=family.name,
        precision=" --float32" if recipe.float32 else "",
        seed=recipe.seed,
        start="" if recipe.match_steps else " The text model started from that of another pocket model (`--text-from`).",
        done=f"all {recipe.steps} steps" if step == recipe.steps else f"unfinished, {step} of {recipe.steps} steps",
        r=recipe,
    )
