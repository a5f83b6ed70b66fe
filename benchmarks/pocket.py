"""The accuracy of a pocket model before any fine-tuning, per capability, with 95 % intervals.

    python -m benchmarks.pocket [MODEL …] [--items 300] [--json FILE]

Run it in the root of the repository. MODEL is "pocket" (the shipped model) or a folder. All models get the same items, none of
which the recipe drew for training. An open question counts as right if the whole greedy answer is right; a yes/no or lettered
question, if the right option has the highest likelihood. The test questions of easy-VQA and shapes-qa follow.
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
from fedmllm.evaluation.intervals import mean_interval, resamples
from fedmllm.evaluation.metrics import normalise
from fedmllm.models.mllm import MLLM
from fedmllm.models.scoring import option_scores
from fedmllm.rng import stream
from recipes.pocket import questions, scenes, texts
from recipes.pocket.wording import Pair, lettered
from recipes.pocket.words import READABLE

ONE = scenes.Mix(single=1.0, word=0.0, objects=0.0)
OBJECT = replace(ONE, objects=1.0)
SEVERAL = scenes.Mix(single=0.0, word=0.0, objects=0.0)
WORD = scenes.Mix(word=1.0, word_alone=1.0)
Picture = Image.Image | Path | None
Item = tuple[Conversation, Picture]
Make = Callable[[np.random.Generator], tuple[Pair | None, Picture]]


class Capability(NamedTuple):
    name: str
    items: list[Item]


def conversation(pair: Pair, pictured: bool) -> Conversation:
    """Yes/no and lettered questions are closed. The options of a lettered question are parsed from its lines."""
    question, answer = pair
    options: tuple[str, ...] = ("yes", "no") if answer in ("yes", "no") else ()
    if answer.startswith("("):
        options = tuple(re.findall(r"^\([A-Z]\) .*$", question, re.MULTILINE))
    return Conversation(question, answer, pictured, options)


def about(mix: scenes.Mix, asker: questions.Asker, distractors: Sequence[str] = ()) -> Make:
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


def looked_up(as_options: bool, closed: bool) -> Make:
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
    "one shape: color": about(ONE, lambda s, _: ("Name the color of the object.", s.things[0].color)),
    "one shape: shape": about(ONE, lambda s, _: ("Name the shape of the object.", s.things[0].shape)),
    "one shape: place": about(ONE, questions.place_of),
    "one shape: presence (yes/no)": about(ONE, questions.presence),
    "2-3 shapes: color": about(SEVERAL, questions.color_of),
    "2-3 shapes: shape": about(SEVERAL, questions.shape_of),
    "2-3 shapes: place": about(SEVERAL, questions.place_of),
    "2-3 shapes: number": about(SEVERAL, questions.counting),
    "2-3 shapes: presence (yes/no)": about(SEVERAL, questions.presence),
    "2-3 shapes: relation (yes/no)": about(SEVERAL, questions.relation),
    "one object: name (42)": about(OBJECT, lambda s, _: ("What does one see?", s.things[0].shape)),
    "one object: its kind (lettered, 2-9)": about(OBJECT, questions.kind_of),
    "word: read (219)": about(WORD, questions.reading),
    "word: lettered, 2-9": about(WORD, questions.reading, READABLE),
    "word: is it written? (yes/no)": about(WORD, questions.written),
    "random letters: spell": about(replace(WORD, letters=1.0), questions.spelling),
    "one shape: color, lettered, 2-9": about(ONE, questions.color_of, list(scenes.COLORS)),
    "picture and text agree?": about(replace(ONE, objects=0.5, word=0.3), questions.agreement),
    "text: look-up": looked_up(False, False),
    "text: look-up (yes/no)": looked_up(False, True),
    "text: look-up, lettered, 2-9": looked_up(True, False),
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


def right(model: MLLM, items: Sequence[Item], batch: int = 32) -> np.ndarray:
    """(items) 1.0 where the model's answer is right, else 0.0."""
    scores = np.zeros(len(items))
    pictures: list[Path | bytes | None] = []
    for _, picture in items:
        if isinstance(picture, Image.Image):
            picture.save(file := io.BytesIO(), "PNG")
            pictures.append(file.getvalue())
        else:
            pictures.append(picture)
    encoded = model.encode([talk for talk, _ in items], pictures, 500)
    model.prepare_features()
    for closed in (False, True):
        order = sorted(
            (i for i, (talk, _) in enumerate(items) if bool(talk.options) == closed), key=lambda i: encoded[i].length
        )
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            if closed:
                scores_of_options = option_scores(model, [encoded[i] for i in chosen])
                answers = [items[i][0].options[int(np.argmax(s))] for i, s in zip(chosen, scores_of_options, strict=True)]
            else:
                answers = model.generate([encoded[i] for i in chosen], 14)
            for i, answer in zip(chosen, answers, strict=True):
                scores[i] = normalise(answer) == normalise(items[i][0].answer)
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description="zero-shot capabilities of pocket models")
    parser.add_argument("models", nargs="*", default=["pocket"])
    parser.add_argument("--items", type=int, default=300)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    models = [MLLM.load(ModelTable(name=name, cache_features=False), seed=0) for name in options.models]
    results: dict[str, dict[str, list[float]]] = {}
    for name, items in [*generated(options.items), *published()]:
        results[name] = {}
        draws = resamples(len(items), 1000, 0)
        for path, model in zip(options.models, models, strict=True):
            scores = 100 * right(model, items)
            results[name][path] = [float(scores.mean()), *mean_interval(scores, draws), len(items)]
        cells = " | ".join(f"{mean:.1f} [{low:.1f}, {high:.1f}]" for mean, low, high, _ in results[name].values())
        print(f"| {name} | {cells} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
