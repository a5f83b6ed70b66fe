"""The accuracy of a pocket model before any fine-tuning, per capability, with 95 % intervals.

    python -m benchmarks.pocket [MODEL …] [--items 300] [--json FILE]

Run it in the root of the repository. MODEL is "pocket" (the shipped model) or a folder. All models get the same items, none of
which the recipe drew for training. An open question is answered correctly if the whole greedy answer is correct, a yes/no or
lettered question if the correct option has the highest likelihood. The last rows are the test questions of easy-VQA and
shapes-qa.
"""

from __future__ import annotations

import argparse
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from fedmllm.config import ModelTable
from fedmllm.data.prompts import Conversation, prompts, render
from fedmllm.data.samples import Sample
from fedmllm.data.tasks import tasks
from fedmllm.evaluation.intervals import mean_interval
from fedmllm.evaluation.matching import normal_form
from fedmllm.models.mllm import MLLM
from fedmllm.models.scoring import option_scores
from fedmllm.rng import stream
from recipes.pocket import questions, scenes, texts
from recipes.pocket.wording import Pair, lettered
from recipes.pocket.words import READABLE

ONE_SHAPE = scenes.Mix(single=1.0, word=0.0, objects=0.0)
ONE_OBJECT = replace(ONE_SHAPE, objects=1.0)
SEVERAL_SHAPES = scenes.Mix(single=0.0, word=0.0, objects=0.0)
ONE_WORD = scenes.Mix(word=1.0, word_alone=1.0)
Picture = Image.Image | Path | None
Item = tuple[Conversation, Picture]
Make = Callable[[np.random.Generator], tuple[Pair | None, Picture]]


class Capability(NamedTuple):
    name: str
    items: list[Item]


def conversation(pair: Pair, pictured: bool) -> Conversation:
    """Yes/no and lettered questions are closed; the options of a lettered question are read from its lines."""
    question, answer = pair
    options: tuple[str, ...] = ("yes", "no") if answer in ("yes", "no") else ()
    if answer.startswith("("):
        options = tuple(re.findall(r"^\([A-Z]\) .*$", question, re.MULTILINE))
    return Conversation(question, answer, pictured, options)


def about_picture(mix: scenes.Mix, asker: questions.Asker, distractors: Sequence[str] = ()) -> Make:
    """Questions about pictures, lettered if there are `distractors`. If `mix.single` is 0, each has at least two things."""

    def make(rng: np.random.Generator) -> tuple[Pair | None, Picture]:
        scene = scenes.draw_scene(rng, mix)
        if mix.single == 0.0 and len(scene.things) < 2:
            return None, None
        pair = asker(scene, rng)
        if pair is not None and distractors:
            pair = lettered(pair, distractors, rng, seen=("image",))
        return pair, scene.image

    return make


def about_text(as_options: bool, closed: bool) -> Make:
    """Questions about facts in a text; `closed` selects the yes/no questions."""

    def make(rng: np.random.Generator) -> tuple[Pair | None, Picture]:
        facts = texts.Facts(rng)
        (question, answer), distractors = facts.ask(rng)
        if (answer in ("yes", "no")) != closed:
            return None, None
        if as_options:
            return lettered((question, answer), distractors, rng, seen=("text",), text=facts.text), None
        return (f"{facts.text}\n{question}", answer), None

    return make


def without_picture(ask: Callable[[np.random.Generator], Pair], accepted: Callable[[Pair], bool]) -> Make:
    def make(rng: np.random.Generator) -> tuple[Pair | None, Picture]:
        pair = ask(rng)
        return (pair if accepted(pair) else None), None

    return make


CAPABILITIES: dict[str, Make] = {
    "one shape: color": about_picture(ONE_SHAPE, lambda s, _: ("Name the color of the object.", s.things[0].color)),
    "one shape: shape": about_picture(ONE_SHAPE, lambda s, _: ("Name the shape of the object.", s.things[0].shape)),
    "one shape: place": about_picture(ONE_SHAPE, questions.place_of),
    "one shape: presence (yes/no)": about_picture(ONE_SHAPE, questions.presence),
    "2-3 shapes: color": about_picture(SEVERAL_SHAPES, questions.color_of),
    "2-3 shapes: shape": about_picture(SEVERAL_SHAPES, questions.shape_of),
    "2-3 shapes: place": about_picture(SEVERAL_SHAPES, questions.place_of),
    "2-3 shapes: number": about_picture(SEVERAL_SHAPES, questions.counting),
    "2-3 shapes: presence (yes/no)": about_picture(SEVERAL_SHAPES, questions.presence),
    "2-3 shapes: relation (yes/no)": about_picture(SEVERAL_SHAPES, questions.relation),
    "one object: name (42)": about_picture(ONE_OBJECT, lambda s, _: ("What does one see?", s.things[0].shape)),
    "one object: its kind (lettered, 2-9)": about_picture(ONE_OBJECT, questions.kind_of),
    "word: read (219)": about_picture(ONE_WORD, questions.reading),
    "word: lettered, 2-9": about_picture(ONE_WORD, questions.reading, READABLE),
    "word: is it written? (yes/no)": about_picture(ONE_WORD, questions.written),
    "random letters: spell": about_picture(replace(ONE_WORD, letters=1.0), questions.spelling),
    "one shape: color, lettered, 2-9": about_picture(ONE_SHAPE, questions.color_of, list(scenes.COLORS)),
    "picture and text agree?": about_picture(replace(ONE_SHAPE, objects=0.5, word=0.3), questions.agreement),
    "text: look-up": about_text(False, False),
    "text: look-up (yes/no)": about_text(False, True),
    "text: look-up, lettered, 2-9": about_text(True, False),
    "text: kind of a noun, lettered, 2-9": without_picture(texts.ask_noun, lambda p: p[0].startswith("Text:")),
    "text: option that repeats it, 2-9": without_picture(texts.ask_repetition, lambda p: p[1].startswith("(")),
}


def generated(items: int) -> Iterator[Capability]:
    for name, make in CAPABILITIES.items():
        drawn: list[Item] = []
        tries = 0
        while len(drawn) < items:
            pair, picture = make(stream(20261123, "exam", name, tries))
            tries += 1
            if pair is not None:
                drawn.append((conversation(pair, picture is not None), picture))
        yield Capability(name, drawn)


def published() -> Iterator[Capability]:
    """Test questions of the embedded tasks, at most 1,000 per task and form (open or yes/no)."""
    strategy = prompts.build("modality-agnostic", {})
    for name in ("easy-vqa", "shapes-qa"):
        samples = [s for s in tasks.build(name, {}).load("test") if isinstance(s, Sample)]
        samples = [samples[int(i)] for i in stream(0, "exam", name).permutation(len(samples))]
        for closed in (False, True):
            chosen = [s for s in samples if s.is_closed == closed][:1000]
            items = [(render(s, s.modalities, strategy), s.image if isinstance(s.image, Path) else None) for s in chosen]
            yield Capability(f"{name}: {'yes/no' if closed else 'open'}", items)


def correctness(model: MLLM, items: Sequence[Item], batch: int = 32) -> np.ndarray:
    """(items,): 1.0 if the model's answer is correct, otherwise 0.0."""
    scores = np.zeros(len(items))
    pictures: list[Path | bytes | None] = []
    for _, picture in items:
        if isinstance(picture, Image.Image):
            picture.save(file := io.BytesIO(), "PNG")
            pictures.append(file.getvalue())
        else:
            pictures.append(picture)
    encoded = model.encode([conversation for conversation, _ in items], pictures, 500)
    model.prepare_features()
    for closed in (False, True):
        order = sorted((i for i, item in enumerate(items) if bool(item[0].options) == closed), key=lambda i: encoded[i].length)
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            if closed:
                scores_of_options = option_scores(model, [encoded[i] for i in chosen])
                for i, of_options in zip(chosen, scores_of_options, strict=True):
                    scores[i] = items[i][0].options[int(np.argmax(of_options))] == items[i][0].answer
            else:
                for i, answer in zip(chosen, model.generate([encoded[i] for i in chosen], 14), strict=True):
                    scores[i] = normal_form(answer, "exact") == normal_form(items[i][0].answer, "exact")
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the zero-shot accuracy of pocket models per capability.")
    parser.add_argument("models", nargs="*", default=["pocket"])
    parser.add_argument("--items", type=int, default=300, help="generated questions per capability")
    parser.add_argument("--json", type=Path, help="write all results to this file")
    options = parser.parse_args()
    models = [MLLM.load(ModelTable(name=name, cache_features=False), seed=0) for name in options.models]
    results: dict[str, dict[str, list[float]]] = {}
    for name, items in [*generated(options.items), *published()]:
        results[name] = {}
        for path, model in zip(options.models, models, strict=True):
            scores = correctness(model, items)
            figures = (float(scores.mean()), *mean_interval(scores))
            results[name][path] = [*(100 * figure for figure in figures), len(items)]
        cells = " | ".join(f"{mean:.1f} [{low:.1f}, {high:.1f}]" for mean, low, high, _ in results[name].values())
        print(f"| {name} | {cells} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
