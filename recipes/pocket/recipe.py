"""The settings of the recipe: the length, batch sizes and learning rates of each stage."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """The fields are stored in checkpoints by name, so renaming one makes earlier checkpoints unusable."""

    vision_steps: int = 700
    vision_rows: int = 256
    match_steps: int = 450
    match_rows: int = 96
    listing_steps: int = 150  # the first of the match steps: they have short lists of options only
    answer_steps: int = 1700
    presence_steps: int = 500
    more_pictures: int = 64  # per step, without text, in addition to those of the rows; not in the presence steps
    rows: int = 32
    kept_matches: int = 12  # rows of the match stage in every later batch, without which the model forgets it
    questions: int = 5  # per row, or fewer if the row reaches `row_tokens`
    row_tokens: int = 170
    text_share: float = 0.4  # fraction of rows without a picture
    vision_rates: tuple[float, float] = (0.015, 1.5e-3)  # of matrices (Muon) and of all other parameters (AdamW)
    match_rates: tuple[float, float] = (0.01, 2e-3)
    answer_rates: tuple[float, float] = (0.01, 2e-3)
    presence_rates: tuple[float, float] = (0.005, 1e-3)
    vision_share: float = 0.3  # factor on the vision tower's rates after the vision stage: at 1 it forgets shapes
    warmup: int = 40
    weight_decay: float = 0.05
    cells_until: float = 1.0  # fraction of the answer steps over which the weight of the cell loss falls from 1 to 0
    save_every: int = 100
    float32: bool = False  # instead of bfloat16 autocast, for a CPU without bfloat16 units
    seed: int = 0

    @property
    def answers_from(self) -> int:
        return self.vision_steps + self.match_steps

    @property
    def presence_from(self) -> int:
        return self.answers_from + self.answer_steps

    @property
    def steps(self) -> int:
        return self.presence_from + self.presence_steps


def stage_of(recipe: Recipe, step: int) -> tuple[int, int, tuple[float, float]]:
    """First step, end (exclusive) and peak learning rates of the stage that contains `step`."""
    stages = (
        (0, recipe.vision_steps, recipe.vision_rates),
        (recipe.vision_steps, recipe.answers_from, recipe.match_rates),
        (recipe.answers_from, recipe.presence_from, recipe.answer_rates),
        (recipe.presence_from, recipe.steps, recipe.presence_rates),
    )
    return next(stage for stage in stages if step < stage[1])


def learning_rates(recipe: Recipe, step: int) -> tuple[float, float]:
    """Learning rates of matrices and of all other parameters: linear warm-up and cosine decay, once per stage."""
    first, end, peaks = stage_of(recipe, step)
    if step - first < recipe.warmup:
        factor = (step - first + 1) / recipe.warmup
    else:
        progress = (step - first - recipe.warmup) / max(1, end - first - recipe.warmup)
        factor = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))
    return factor * peaks[0], factor * peaks[1]
