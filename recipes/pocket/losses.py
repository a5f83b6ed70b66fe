"""The losses of the recipe, and the auxiliary heads that are trained with the model and then discarded."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from recipes.pocket.architecture import IMAGE_TOKENS, Family
from recipes.pocket.batches import Batch
from recipes.pocket.recipe import Recipe
from recipes.pocket.scenes import ALPHABET, COLORS, NAMES, SLOTS

LOOK_BACK = (2, (0, 1))
"""Index of the layer and of its attention heads that are trained to attend to earlier occurrences of their token."""
LOOK_AT_PICTURE = (1, (0, 1))
"""Index of the layer and of its attention heads, one for colours and one for shapes, that are trained to attend to the image
tokens that show what their token names."""


class CellHeads(torch.nn.Module):
    """Linear classifiers of image tokens, (…, hidden), with the classes of `scenes.cells` and `scenes.letter_cells`."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.color = torch.nn.Linear(hidden, len(COLORS) + 1)
        self.shape = torch.nn.Linear(hidden, len(NAMES) + 1)
        self.letters = torch.nn.ModuleList(torch.nn.Linear(hidden, len(ALPHABET) + 1) for _ in range(SLOTS))

    def loss(self, tokens: Tensor, batch: Batch) -> Tensor:
        """Sum of the heads' mean cross-entropies on occupied cells, plus a fifth of those on empty cells."""
        total = tokens.new_zeros((), dtype=torch.float32)
        heads: list[tuple[torch.nn.Module, Tensor, float]] = [
            (self.color, batch.colors, 1.0),
            (self.shape, batch.shapes, 1.0),
        ]
        heads += [(head, batch.letters[..., slot], 0.5) for slot, head in enumerate(self.letters)]
        for head, labels, scale in heads:
            for cell, weight in ((labels > 0, scale), (labels == 0, 0.2 * scale)):
                if cell.any():
                    total = total + weight * torch.nn.functional.cross_entropy(head(tokens[cell]), labels[cell])
        return total


class TokensBefore(torch.nn.Module):
    """Linear maps from the output of the second layer to the embeddings of the tokens one, two and three places back."""

    LAYER, PLACES = 2, 3

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.readings = torch.nn.ModuleList(torch.nn.Linear(hidden, hidden) for _ in range(self.PLACES))

    def loss(self, states: Tensor, batch: Batch, embeddings: Tensor) -> Tensor:
        """Mean cross-entropy over every third position of each block. `states`: (rows, length, hidden)."""
        states, total = torch.nn.functional.rms_norm(states, states.shape[-1:]), states.new_zeros((), dtype=torch.float32)
        for places, reading in enumerate(self.readings, 1):
            # A block continues the shared prefix, so the token just before it in the row is not one that it sees.
            is_before = (batch.positions[:, places:] - batch.positions[:, :-places] == places)[:, ::3]
            logits = torch.nn.functional.linear(reading(states[:, places::3][is_before]), embeddings)
            labels = batch.ids[:, :-places][:, ::3][is_before]
            total = total + torch.nn.functional.cross_entropy(logits, labels) / self.PLACES
        return total


class Heads(torch.nn.Module):
    """All modules that are trained with the model and then discarded."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.cells = CellHeads(hidden)
        self.before = TokensBefore(hidden)


def _attention_loss(attention: Tensor, targets: Tensor) -> Tensor:
    """Mean −log of the attention that a token pays to its targets, over the tokens that have any.

    `attention`: (rows, length, length). `targets`: the same shape, bool.
    """
    has_target = targets.any(dim=-1)
    if not has_target.any():
        return attention.new_zeros((), dtype=torch.float32)
    return -((attention * targets).sum(dim=-1)[has_target].float() + 1e-4).log().mean()


def look_back_loss(attention: Tensor, batch: Batch, image_token: int) -> Tensor:
    """Attention loss of the `LOOK_BACK` heads: the targets of a text token are its earlier occurrences.

    `attention`: (rows, heads, length, length).
    """
    length = batch.ids.shape[1]
    itself = torch.eye(length, dtype=torch.bool, device=batch.ids.device)
    same = (batch.ids[:, :, None] == batch.ids[:, None, :]) & batch.mask[:, 0] & ~itself
    is_text = (batch.ids != image_token) & (batch.positions.diff(prepend=batch.positions[:, :1]) != 0)
    heads = LOOK_BACK[1]
    return torch.stack([_attention_loss(attention[:, head], same & is_text[:, :, None]) for head in heads]).mean()


def look_at_picture_loss(attention: Tensor, batch: Batch) -> Tensor:
    """Attention loss of the `LOOK_AT_PICTURE` heads, for tokens that name a colour or a shape.

    The targets are the image tokens that show it, or the first token of the row if the picture has things but none such.
    `attention`: (rows, heads, length, length).
    """
    has_things = batch.shown.any(dim=-1).any(dim=0)
    total = attention.new_zeros((), dtype=torch.float32)
    for head, named, shown in zip(LOOK_AT_PICTURE[1], batch.named, batch.shown, strict=True):
        targets = (named[:, :, None] == shown[:, None, :]) & (named > 0)[:, :, None]
        absent = (named > 0) & has_things[:, None] & ~targets.any(dim=-1)
        targets[:, :, 0] |= absent
        total = total + _attention_loss(attention[:, head], targets)
    return total / len(batch.named)


def vision_loss(family: Family, model: Any, heads: CellHeads, batch: Batch) -> Tensor:
    return heads.loss(torch.stack(list(family.image_tokens(model, batch.pixels))), batch)


class TextLosses(NamedTuple):
    """Losses of a batch with text."""

    answers: Tensor
    """Mean cross-entropy over answer tokens."""
    cells: Tensor
    """Loss of `CellHeads`; 0 without pictures."""
    guide: Tensor
    """Losses that supervise the text model's second layer and attention heads; 0 unless requested."""


def text_losses(family: Family, model: Any, heads: Heads, batch: Batch, *, guided: bool = False) -> TextLosses:
    """The losses of a batch with text. Logits are computed at the positions of answers only."""
    device = batch.ids.device
    cell_loss, encoded = torch.zeros((), device=device), {}
    if len(batch.pixels):
        tokens = family.image_tokens(model, batch.pixels)
        cell_loss = heads.cells.loss(torch.stack(list(tokens)), batch)
        in_rows = int((batch.ids == model.config.image_token_id).sum()) // IMAGE_TOKENS
        features = BaseModelOutputWithPooling(pooler_output=tokens[:in_rows])
        encoded = {"mm_encoder_outputs": {"image": features}}
    # Eager attention adds the mask to its scores, so a float32 mask would make everything after it float32.
    dtype = torch.bfloat16 if torch.is_autocast_enabled(device.type) else torch.float32
    outputs = model.model(
        input_ids=batch.ids,
        attention_mask=torch.zeros(batch.mask.shape, dtype=dtype, device=device).masked_fill_(~batch.mask, -torch.inf),
        position_ids=family.position_ids(batch.ids, batch.positions, model.config.image_token_id),
        **encoded,
        use_cache=False,
        output_hidden_states=guided,
        output_attentions=guided,
    )
    guide_loss = torch.zeros((), device=device)
    if guided:
        guide_loss = heads.before.loss(outputs.hidden_states[TokensBefore.LAYER], batch, model.lm_head.weight)
        guide_loss = guide_loss + 0.5 * look_back_loss(outputs.attentions[LOOK_BACK[0]], batch, model.config.image_token_id)
        guide_loss = guide_loss + 0.5 * look_at_picture_loss(outputs.attentions[LOOK_AT_PICTURE[0]], batch)
    labels = batch.labels[:, 1:]
    is_answer = labels != -100
    hidden = outputs.last_hidden_state[:, :-1][is_answer]
    answer_loss = torch.nn.functional.cross_entropy(model.lm_head(hidden), labels[is_answer])
    return TextLosses(answer_loss, cell_loss, guide_loss)


def step_loss(
    family: Family, model: Any, heads: Heads, batch: Batch, recipe: Recipe, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The total loss of `step`, and the answer loss and the cell loss within it."""
    with torch.autocast(batch.pixels.device.type, torch.bfloat16, enabled=not recipe.float32):
        if step < recipe.vision_steps:
            cell_loss = vision_loss(family, model, heads.cells, batch)
            return cell_loss, cell_loss.new_zeros(()), cell_loss
        answers, cells, guide = text_losses(family, model, heads, batch, guided=True)
        progress = (step - recipe.answers_from) / recipe.answer_steps
        return answers + guide + max(0.0, 1.0 - progress / recipe.cells_until) * cells, answers, cells
