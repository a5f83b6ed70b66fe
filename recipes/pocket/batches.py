"""The batch of each step of the recipe.

A row of a batch is a picture or a text followed by several blocks, each a question with its answer. A block sees the
picture and itself but no other block, and its positions start right after the picture. So each block is exactly the prompt
that the finished model receives, while the picture is encoded once for all blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fedmllm.rng import stream
from recipes.pocket import architecture
from recipes.pocket.architecture import Family
from recipes.pocket.questions import BALANCED, MOSTLY_PRESENCE, ask_scene
from recipes.pocket.recipe import Recipe
from recipes.pocket.scenes import COLORS, NAMES, SLOTS, Mix, Scene, cells, draw_scene, letter_cells
from recipes.pocket.texts import ask_repetition, ask_texts, lettered_words
from recipes.pocket.wording import LETTERS, Pair


@dataclass(frozen=True)
class Batch:
    """The tensors of one step. Vision-only batches have empty text tensors, and batches without pictures have empty `pixels`.

    `ids`, `positions`, `labels`: (rows, length).
    `mask`: (rows, 1, length, length) bool, true where a token may attend.
    `pixels`: (pictures, 1, 3, SIZE, SIZE). The pictures of the rows come first; others may follow.
    `colors`, `shapes`: (pictures, image tokens), the labels of `scenes.cells`.
    `letters`: (pictures, image tokens, SLOTS), the labels of `scenes.letter_cells`.
    `named`: (2, rows, length), the numbers of the colour and of the shape that a text token names, 0 for none.
    `shown`: (2, rows, length), the numbers of the colour and of the shape that an image token shows, 0 for none.
    """

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

    def to(self, device: torch.device | str) -> Batch:
        return Batch(*(getattr(self, field.name).to(device) for field in fields(self)))


def _encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _pixels(scenes: list[Scene]) -> Tensor:
    return torch.from_numpy(architecture.pixels([scene.image for scene in scenes])).unsqueeze(1)


def _cell_labels(scenes: list[Scene]) -> tuple[Tensor, Tensor, Tensor]:
    """`colors`, `shapes` and `letters` of a batch."""
    grid = int(architecture.IMAGE_TOKENS**0.5)
    things = torch.tensor([cells(scene, grid) for scene in scenes], dtype=torch.long).reshape(-1, 2, grid**2)
    letters = torch.tensor([letter_cells(scene, grid) for scene in scenes], dtype=torch.long)
    return things[:, 0], things[:, 1], letters.reshape(-1, grid**2, SLOTS)


def _scenes_without_text(recipe: Recipe, step: int, count: int) -> list[Scene]:
    """Half the words consist of random letters, so that the model learns to read letters instead of recognising words."""
    mix = Mix(word=0.5, letters=0.5)
    return [draw_scene(stream(recipe.seed, "picture", step, number), mix) for number in range(count)]


def make_picture_batch(recipe: Recipe, step: int) -> Batch:
    """A batch of pictures without text, for the vision steps."""
    scenes = _scenes_without_text(recipe, step, recipe.vision_rows)
    empty = torch.empty(0, dtype=torch.long)
    return Batch(empty, empty, empty, empty, _pixels(scenes), *_cell_labels(scenes), empty, empty)


@dataclass
class _Row:
    """A row under construction. `block` is 0 for the shared prefix and counts the blocks from 1."""

    ids: list[int]
    positions: list[int]
    labels: list[int]
    block: list[int]

    @classmethod
    def begin(cls, prefix: list[int]) -> _Row:
        return cls(list(prefix), list(range(len(prefix))), [-100] * len(prefix), [0] * len(prefix))

    def append(self, *turns: tuple[list[int], list[int]]) -> None:
        """Add a block of (prompt, answer) turns, each of which sees the turns before it."""
        prefix_length, length = self.block.count(0), sum(len(prompt) + len(answer) for prompt, answer in turns)
        self.ids += [token for prompt, answer in turns for token in prompt + answer]
        self.positions += range(prefix_length, prefix_length + length)
        self.labels += [label for prompt, answer in turns for label in [-100] * len(prompt) + answer]
        self.block += [self.block[-1] + 1] * length


def draw_row(recipe: Recipe, step: int, number: int) -> tuple[Scene | None, str, list[Pair]]:
    """The scene (if any), the shared text ("" for none) and the questions with answers of row `number` of a batch."""
    rng = stream(recipe.seed, "row", step, number)
    if rng.random() < recipe.text_share:
        return None, *ask_texts(rng, recipe.questions)
    mostly_presence = step >= recipe.presence_from
    single, askers = (0.65, MOSTLY_PRESENCE) if mostly_presence else (0.45, BALANCED)
    # Scenes start simple: the model links words to pictures sooner when there is little else to explain.
    scene = draw_scene(rng, Mix(single=1.0 if step < recipe.answers_from + 60 else single))
    return scene, "", ask_scene(scene, rng, recipe.questions, askers)


@cache
def _token_names(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """(2, vocabulary): the numbers of the colour and of the shape that a token names, as in `scenes.cells`; 0 for none."""
    table = torch.zeros(2, len(tokenizer), dtype=torch.long)
    for numbers, names in zip(table, (COLORS, NAMES), strict=True):
        for number, name in enumerate(names, 1):
            if len(tokens := _encode(tokenizer, f" {name}")) == 1:
                numbers[tokens] = number
    return table


def _collate(tokenizer: PreTrainedTokenizerFast, image: str, rows: list[_Row], scenes: list[Scene]) -> Batch:
    """Pad the rows to a multiple of 32 tokens: with few different lengths, a compiled model is rarely compiled again."""
    length = -(-max(len(row.ids) for row in rows) // 32) * 32

    def padded(lists: list[list[int]], pad: int) -> Tensor:
        return torch.tensor([entries + [pad] * (length - len(entries)) for entries in lists])

    block = padded([row.block for row in rows], -1)
    same = (block[:, :, None] == block[:, None, :]) | (block[:, None, :] == 0)
    mask = same & torch.ones(length, length, dtype=torch.bool).tril()
    ids = padded([row.ids for row in rows], tokenizer.pad_token_id)
    colors, shapes, letters = _cell_labels(scenes)
    is_image = ids == tokenizer.convert_tokens_to_ids(image)
    in_rows = int(is_image.sum()) // architecture.IMAGE_TOKENS
    shown = torch.zeros(2, *ids.shape, dtype=torch.long)
    for numbers, labels in zip(shown, (colors, shapes), strict=True):
        numbers[is_image] = labels[:in_rows].flatten().clamp(min=0)
    return Batch(
        ids,
        padded([row.positions for row in rows], 0),
        padded([row.labels for row in rows], -100),
        mask.unsqueeze(1),
        _pixels(scenes) if scenes else torch.empty(0),
        colors,
        shapes,
        letters,
        _token_names(tokenizer)[:, ids],
        shown,
    )


def _match_row(tokenizer: PreTrainedTokenizerFast, recipe: Recipe, step: int, number: int) -> _Row:
    """Lettered options, then each option twice more in random order, followed by its letter.

    After the listing steps, every second row has multiple-choice questions whose answer the prompt contains instead.
    """
    rng = stream(recipe.seed, "match", step, number)
    easy = step < recipe.vision_steps + recipe.listing_steps
    if number % 2 and not easy:
        return _question_row(tokenizer, "", "", [ask_repetition(rng) for _ in range(recipe.questions)], recipe.row_tokens)
    options, turns = lettered_words(rng, 5 if easy else len(LETTERS))
    row = _Row.begin(_encode(tokenizer, architecture.BEGIN + "".join(f"\n({letter}) {word}" for letter, word in options)))
    row.append(*[(_encode(tokenizer, f" {word}"), _encode(tokenizer, letter)) for letter, word in turns])
    return row


def _question_row(tokenizer: PreTrainedTokenizerFast, picture: str, text: str, pairs: list[Pair], row_tokens: int) -> _Row:
    """The shared picture or text, then a block per question; the rest is dropped once the row has `row_tokens` tokens."""
    separator = "\n" if text else " "
    row = _Row.begin(_encode(tokenizer, f"{architecture.BEGIN}User:{picture or (f' {text}' if text else '')}"))
    for question, answer in pairs:
        if len(row.ids) >= row_tokens:  # rows of similar length waste little on padding
            break
        prompt = _encode(tokenizer, f"{separator}{question}{architecture.END}\nAssistant:")
        row.append((prompt, _encode(tokenizer, f" {answer}{architecture.END}")))
    return row


def make_batch(family: Family, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, step: int) -> Batch:
    """The batch of a step after the vision stage. Labels are −100 except on answers and the end mark after each."""
    if step < recipe.answers_from:
        rows = [_match_row(tokenizer, recipe, step, number) for number in range(recipe.match_rows)]
        return _collate(tokenizer, family.image, rows, [])
    rows, scenes = [], list[Scene]()
    for number in range(recipe.rows):
        scene, text, pairs = draw_row(recipe, step, number)
        if scene is not None:
            scenes.append(scene)
        picture = family.picture if scene is not None else ""
        rows.append(_question_row(tokenizer, picture, text, pairs, recipe.row_tokens))
    if step < recipe.presence_from:
        scenes += _scenes_without_text(recipe, step, recipe.more_pictures)
    rows += [_match_row(tokenizer, recipe, step, number) for number in range(recipe.kept_matches)]
    return _collate(tokenizer, family.image, rows, scenes)


class Batches(torch.utils.data.IterableDataset[Batch]):
    """The batches of all steps from `start` on. A DataLoader can produce them in other processes, ahead of time: each makes
    every n-th, in the order in which the loader takes them."""

    def __init__(self, family: Family, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, start: int) -> None:
        self.family, self.tokenizer, self.recipe, self.start = family, tokenizer, recipe, start

    def __iter__(self) -> Iterator[Batch]:
        worker = torch.utils.data.get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for step in range(self.start + first, self.recipe.steps, stride):
            if step < self.recipe.vision_steps:
                yield make_picture_batch(self.recipe, step)
            else:
                yield make_batch(self.family, self.tokenizer, self.recipe, step)
