"""How much each speed-up of local training gains on the pocket model.

    python benchmarks/local_training.py [--repeats 5]

Each row compares two ways to do the same work, which run alternately: the common way and ours. It prints the median and range,
over the repeats, of the ratio of their times. Absolute times are not printed, because they mean nothing on a shared machine.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence

import torch
from transformers.utils import logging

from fedmllm.config import ModelTable
from fedmllm.data.prompts import prompts, render
from fedmllm.data.samples import Sample
from fedmllm.data.tasks import tasks
from fedmllm.models.encoded import Encoded
from fedmllm.models.mllm import MLLM
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


def stacked(model: MLLM, batches: Sequence[Sequence[Encoded]], lean: bool) -> None:
    """As a client trains: its adapter beside the model. `lean`: through the text model that is written out."""
    before, model.lean = model.lean, lean and model.lean
    stack = Stack(model.adapter, [model.adapter.get()], list(model.adapter.parameters))
    with stack.installed(1):
        for batch in batches:
            stack.begin([(len(batch), model.width(batch))])
            model.loss(batch).backward()
    model.lean = before


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
        mixed = [encoded[start : start + 16] for start in range(0, len(encoded), 16)]
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
            ("batches as they come / bucketed by length", lambda: backward(cached, mixed), lambda: backward(cached, batches)),
            ("closed questions generated / scored", lambda: cached.generate(closed, 8), lambda: cached.option_scores(closed)),
        ]  # fmt: skip
        for name, common, ours in rows:
            common(), ours()  # warm up
            ratios = [timed(common) / timed(ours) for _ in range(repeats)]
            print(f"{name:48s}{median_and_range(ratios)}")


if __name__ == "__main__":
    main()
