"""How much each speed-up of local training gains on the pocket model.

    python benchmarks/local_training.py [--repeats 5]

Each row compares two ways to do the same work, which run alternately: the common way and ours. It prints the median and range,
over the repeats, of the ratio of their times. Absolute times are not printed, because they mean nothing on a shared machine.
The last rows compare random batches with batches by length on clients of one, two and four modality patterns, and with sorting
that ignores the patterns; they list the share of padding in the same order.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from transformers.utils import logging

from fedmllm.config import ModelTable
from fedmllm.data.prompts import prompts, render
from fedmllm.data.samples import Modality, Sample
from fedmllm.data.scenarios import scenarios
from fedmllm.data.tasks import tasks
from fedmllm.models.encoded import Encoded
from fedmllm.models.mllm import MLLM
from fedmllm.models.scoring import option_scores
from fedmllm.models.stack import Stack
from fedmllm.rng import stream
from fedmllm.training.batches import batch_epoch
from harness import median_and_range


def backward(model: MLLM, batches: Sequence[Sequence[Encoded]]) -> None:
    for batch in batches:
        model.loss(batch).backward()


def full_logits(model: MLLM, batches: Sequence[Sequence[Encoded]]) -> None:
    """The common way: logits at every position, labels masked to −100 outside the answers."""
    for batch in batches:
        inputs = model.collate(batch, [sample.answer for sample in batch])
        length = inputs["input_ids"].shape[1]
        labels = torch.tensor([[-100] * (length - len(sample.answer)) + list(sample.answer) for sample in batch])
        logits = model.model(**inputs, use_cache=False).logits[:, :-1].float()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).backward()


def stacked(model: MLLM, batches: Sequence[Sequence[Encoded]], fused: bool) -> None:
    """Train as a client does, with a stacked adapter; `fused` enables `FusedLlama`."""
    before, model.fused = model.fused, fused and model.fused
    stack = Stack(model.adapter, [model.adapter.get()], list(model.adapter.parameters))
    with model.using(stack, 1):
        for batch in batches:
            stack.begin([(len(batch), model.width(batch))])
            model.loss(batch).backward()
    model.fused = before


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the time of common ways to train with ours.")
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["FEDMLLM_CACHE"] = cache
        samples = [s for s in tasks.build("easy-vqa", {}).load("train") if isinstance(s, Sample)]
        chosen = [samples[int(i)] for i in stream(0, "bench").choice(len(samples), 192, replace=False)]
        strategy = prompts.build("modality-agnostic", {})
        conversations = [render(s, s.modalities, strategy) for s in chosen]
        cached, live = (MLLM.load(ModelTable(cache_features=on), seed=0) for on in (True, False))
        pictures = [s.image for s in chosen]
        encoded, uncached = (model.encode(conversations, pictures, 1200) for model in (cached, live))
        cached.prepare_features()
        order = batch_epoch([sample.length for sample in encoded], 16, 1, stream(0, "order")).steps
        batches, live_batches = ([[samples[i] for i in step[0]] for step in order] for samples in (encoded, uncached))
        closed = [sample for sample in encoded if sample.options][:96]
        singles = [[sample] for batch in batches for sample in batch]
        rows: list[tuple[str, Callable[[], object], Callable[[], object]]] = [
            ("vision tower in every step / cached features",
             lambda: backward(live, live_batches), lambda: backward(cached, batches)),
            ("logits at all positions / at the answers",
             lambda: full_logits(cached, batches), lambda: backward(cached, batches)),
            ("transformers' text model / written-out layers",
             lambda: stacked(cached, batches, False), lambda: stacked(cached, batches, True)),
            ("samples one by one / batches of 16", lambda: backward(cached, singles), lambda: backward(cached, batches)),
            ("closed questions generated / scored", lambda: cached.generate(closed, 8), lambda: option_scores(cached, closed)),
        ]  # fmt: skip
        for name, common, ours in rows:
            common(), ours()  # warm up
            ratios = [timed(common) / timed(ours) for _ in range(repeats)]
            print(f"{name:48s}{median_and_range(ratios)}")
        for name, samples in clients().items():
            compare_batching(name, cached, samples, repeats)


def clients() -> dict[str, list[tuple[Sample, frozenset[Modality]]]]:
    """Samples of three clients with what each shows: of images, of images and texts, and of pairs that lost modalities."""
    missing = scenarios.build("missing", {"rate": 0.3})
    questions, texts, memes = (
        [s for s in tasks.build(name, {}).load("train") if isinstance(s, Sample)][:192]
        for name in ("easy-vqa", "shapes-qa", "pocket-memes")
    )
    return {
        "easy-vqa": [(s, s.modalities) for s in questions],
        "easy-vqa, shapes-qa": [(s, s.modalities) for s in (*questions[:96], *texts[:96])],
        "pocket-memes, missing": [(s, missing.visible(s, 0, stream(0, "visible", s.id))) for s in memes],
    }


def compare_batching(name: str, model: MLLM, samples: Sequence[tuple[Sample, frozenset[Modality]]], repeats: int) -> None:
    """Random batches of 8 / batches by length within patterns, and / sorted whatever the pattern."""
    strategy = prompts.build("modality-agnostic", {})
    conversations = [render(sample, visible, strategy) for sample, visible in samples]
    encoded = model.encode(conversations, [sample.image for sample, _ in samples], 1200)
    model.prepare_features()
    lengths, patterns = [sample.length for sample in encoded], [sample.pattern for sample in encoded]
    epochs = [batch_epoch(lengths, 8, 1, stream(0, "order"), by) for by in (None, patterns, [0] * len(lengths))]
    random, within, sorted_ = ([[encoded[i] for i in step[0]] for step in epoch.steps] for epoch in epochs)
    backward(model, random)  # warm up
    ratios: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        seconds = [timed(partial(backward, model, batches)) for batches in (random, within, sorted_)]
        for ratio, other in zip(ratios, seconds[1:], strict=True):
            ratio.append(seconds[0] / other)
    padding = ", ".join(f"{100 * epoch.padding:.1f} %" for epoch in epochs)
    print(f"random batches / by length: {name:22s}{median_and_range(ratios[0])}   padding {padding}")
    print(f"random batches / sorted:    {name:22s}{median_and_range(ratios[1])}")


if __name__ == "__main__":
    main()
