"""What the recipe is, and the batch of each of its steps.

One row of a batch is a picture or a text followed by several question-answer blocks. A block sees the picture and itself, never
another block, and its positions start right after the picture: each block is exactly the prompt that the finished model
will meet, while the picture is encoded once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fedmllm.rng import stream
from recipes.pocket import architecture as parts
from recipes.pocket.questions import EVENLY, MOSTLY_PRESENCE, ask_scene
from recipes.pocket.scenes import COLORS, NAMES, SLOTS, Mix, Scene, cells, draw_scene, letter_cells
from recipes.pocket.texts import ask_same, ask_texts, lettered_words
from recipes.pocket.wording import LETTERS, Pair


@dataclass(frozen=True)
class Recipe:
    vision_steps: int = 700
    vision_rows: int = 256
    match_steps: int = 450
    match_rows: int = 96
    listing_steps: int = 150  # of the match steps, the first: listings of few options alone
    answer_steps: int = 1700
    presence_steps: int = 500
    more_pictures: int = 64  # beside the answers, without text, until the presence steps
    rows: int = 32
    kept_matches: int = 12  # rows as in the match steps beside all that follows, or they are forgotten
    questions: int = 5  # a row, or fewer where these come to `row_tokens`
    row_tokens: int = 170
    text_share: float = 0.4  # rows without a picture
    vision_rates: tuple[float, float] = (0.015, 1.5e-3)  # of matrices (Muon) and of all else (AdamW)
    match_rates: tuple[float, float] = (0.01, 2e-3)
    answer_rates: tuple[float, float] = (0.01, 2e-3)
    presence_rates: tuple[float, float] = (0.005, 1e-3)
    vision_share: float = 0.3  # of those rates for the vision tower once there is text: it forgets shapes at the full ones
    warmup: int = 40
    weight_decay: float = 0.05
    cells_until: float = 1.0  # share of the answer steps over which the weight of the cell loss falls from 1 to 0
    save_every: int = 100
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


@dataclass(frozen=True)
class Batch:
    """`ids`, `positions`, `labels`: (rows, length); `mask`: (rows, 1, length, length) bool; `pixels`: (pictures, 1, 3, S, S);
    `colors`, `shapes`: (pictures, image tokens), what is in each cell; `letters`: (pictures, image tokens, SLOTS).
    `named`, `shown`: (2, rows, length), the colour and the shape that a token of the text names, or an image token shows;
    0 for none."""

    ids: Tensor
    positions: Tensor
    labels: Tensor
    mask: Tensor
    pixels: Tensor
    colors: Tensor
    shapes: Tensor
    letters: Tensor
    named: Tensor
    shown: Tensor


def _encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _inside(scenes: list[Scene]) -> tuple[Tensor, Tensor, Tensor]:
    grid = int(parts.IMAGE_TOKENS**0.5)
    things = torch.tensor([cells(scene, grid) for scene in scenes], dtype=torch.long).reshape(-1, 2, grid**2)
    return (
        things[:, 0],
        things[:, 1],
        torch.tensor([letter_cells(scene, grid) for scene in scenes], dtype=torch.long).reshape(-1, grid**2, SLOTS),
    )


def _pictures(recipe: Recipe, step: int, count: int) -> list[Scene]:
    """Pictures that nothing is asked about; every other word is random letters, so that letters are read, not words."""
    mix = Mix(word=0.5, letters=0.5)
    return [draw_scene(stream(recipe.seed, "picture", step, number), mix) for number in range(count)]


def make_pictures(recipe: Recipe, step: int) -> Batch:
    """A batch of pictures alone, for the vision steps; its text tensors are empty."""
    drawn = _pictures(recipe, step, recipe.vision_rows)
    none = torch.empty(0, dtype=torch.long)
    pictures = torch.from_numpy(parts.pixels([scene.image for scene in drawn])).unsqueeze(1)
    return Batch(none, none, none, none, pictures, *_inside(drawn), none, none)


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

    def append(self, *turns: tuple[list[int], list[int]]) -> None:
        """One more block: turns of what is asked and what is to be said, each seeing those before it."""
        after_prefix, length = self.block.count(0), sum(len(asked) + len(said) for asked, said in turns)
        self.ids += [token for asked, said in turns for token in asked + said]
        self.positions += range(after_prefix, after_prefix + length)
        self.labels += [label for asked, said in turns for label in [-100] * len(asked) + said]
        self.block += [self.block[-1] + 1] * length


def draw_row(recipe: Recipe, step: int, number: int) -> tuple[Scene | None, str, list[Pair]]:
    """What row `number` of a batch is about, a picture or none, the text that its questions share ("" for none), and these."""
    rng = stream(recipe.seed, "row", step, number)
    if rng.random() < recipe.text_share:
        return None, *ask_texts(rng, recipe.questions)
    mostly_presence = step >= recipe.presence_from
    single, asks = (0.65, MOSTLY_PRESENCE) if mostly_presence else (0.45, EVENLY)
    # Scenes start simple: words attach to pictures sooner when there is little else to explain.
    scene = draw_scene(rng, Mix(single=1.0 if step < recipe.answers_from + 60 else single))
    return scene, "", ask_scene(scene, rng, recipe.questions, asks)


@cache
def _names(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """(2, vocabulary): the number, as in `scenes.cells`, of the colour and of the shape that a token names; 0 for none."""
    table = torch.zeros(2, len(tokenizer), dtype=torch.long)
    for row, names in zip(table, (COLORS, NAMES), strict=True):
        for number, name in enumerate(names, 1):
            if len(tokens := _encode(tokenizer, f" {name}")) == 1:
                row[tokens] = number
    return table


def _tensors(tokenizer: PreTrainedTokenizerFast, rows: list[_Row], drawn: list[Scene]) -> Batch:
    """The rows padded to a common length, a multiple of 32: few lengths, so that a compiled model is compiled seldom."""
    length = -(-max(len(row.ids) for row in rows) // 32) * 32

    def padded(lists: list[list[int]], pad: int) -> Tensor:
        return torch.tensor([entries + [pad] * (length - len(entries)) for entries in lists])

    block = padded([row.block for row in rows], -1)
    same = (block[:, :, None] == block[:, None, :]) | (block[:, None, :] == 0)
    mask = same & torch.ones(length, length, dtype=torch.bool).tril()
    ids = padded([row.ids for row in rows], tokenizer.pad_token_id)
    pictures = torch.from_numpy(parts.pixels([scene.image for scene in drawn])).unsqueeze(1) if drawn else torch.empty(0)
    colors, shapes, letters = _inside(drawn)
    at = ids == tokenizer.convert_tokens_to_ids(parts.IMAGE)
    asked_about = int(at.sum()) // parts.IMAGE_TOKENS
    shown = torch.zeros(2, *ids.shape, dtype=torch.long)
    for row, inside in zip(shown, (colors, shapes), strict=True):
        row[at] = inside[:asked_about].flatten().clamp(min=0)
    return Batch(
        ids,
        padded([row.positions for row in rows], 0),
        padded([row.labels for row in rows], -100),
        mask.unsqueeze(1),
        pictures,
        colors,
        shapes,
        letters,
        _names(tokenizer)[:, ids],
        shown,
    )


def _match_row(tokenizer: PreTrainedTokenizerFast, recipe: Recipe, step: int, number: int) -> _Row:
    """Lettered options and then each of them twice, in other orders, with its letter to be said straight after it; or, in every
    other row, the lettered form itself with nothing to know."""
    rng = stream(recipe.seed, "match", step, number)
    easy = step < recipe.vision_steps + recipe.listing_steps
    if number % 2 and not easy:
        return _asked(tokenizer, "", "", [ask_same(rng) for _ in range(recipe.questions)], recipe.row_tokens)
    options, turns = lettered_words(rng, 5 if easy else len(LETTERS))
    row = _Row.begin(_encode(tokenizer, parts.BEGIN + "".join(f"\n({letter}) {word}" for letter, word in options)))
    row.append(*[(_encode(tokenizer, f" {word}"), _encode(tokenizer, letter)) for letter, word in turns])
    return row


def _asked(tokenizer: PreTrainedTokenizerFast, picture: str, text: str, pairs: list[Pair], most: int) -> _Row:
    """A row of question-answer blocks after what they share; no more of them once the row is `most` tokens long."""
    between = "\n" if text else " "
    row = _Row.begin(_encode(tokenizer, f"{parts.BEGIN}User:{picture or (f' {text}' if text else '')}"))
    for question, answer in pairs:
        if len(row.ids) >= most:  # rows about as long as each other waste little on padding
            break
        asked = _encode(tokenizer, f"{between}{question}{parts.END}\nAssistant:")
        row.append((asked, _encode(tokenizer, f" {answer}{parts.END}")))
    return row


def make_batch(tokenizer: PreTrainedTokenizerFast, recipe: Recipe, step: int) -> Batch:
    """The batch of `step`. Labels are −100 except on answers and the end mark that follows each. The pictures of the rows
    come first; more may follow."""
    image_part = f"{parts.AROUND}{parts.GLOBAL}{parts.IMAGE * parts.IMAGE_TOKENS}{parts.AROUND}"
    rows: list[_Row] = []
    drawn: list[Scene] = []
    if step < recipe.answers_from:
        return _tensors(tokenizer, [_match_row(tokenizer, recipe, step, n) for n in range(recipe.match_rows)], drawn)
    for number in range(recipe.rows):
        scene, text, pairs = draw_row(recipe, step, number)
        if scene is not None:
            drawn.append(scene)
        picture = image_part if scene is not None else ""
        rows.append(_asked(tokenizer, picture, text, pairs, recipe.row_tokens))
    if step < recipe.presence_from:
        drawn += _pictures(recipe, step, recipe.more_pictures)
    rows += [_match_row(tokenizer, recipe, step, number) for number in range(recipe.kept_matches)]
    return _tensors(tokenizer, rows, drawn)


class Batches(torch.utils.data.IterableDataset[Batch]):
    """The batches of the steps from `start` on; a DataLoader lets another process make them ahead of time."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, start: int) -> None:
        self.tokenizer, self.recipe, self.start = tokenizer, recipe, start

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.start, self.recipe.steps):
            if step < self.recipe.vision_steps:
                yield make_pictures(self.recipe, step)
            else:
                yield make_batch(self.tokenizer, self.recipe, step)
