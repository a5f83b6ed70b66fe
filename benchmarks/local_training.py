"""What each speed-up of local training is worth: ratios from one run, paired and repeated, on the pocket model.

    python benchmarks/local_training.py [--repeats 5]

Each row does the same work twice, the long way and ours, in turn, and prints the median ratio of the times with the
range over the repeats. Absolute times mean nothing on a shared machine and are not printed.
"""

from __future__ import annotations

import argparse
import os
import statistics
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
from fedmllm.models.scoring import option_scores
from fedmllm.models.stack import Stack
from fedmllm.rng import stream
from fedmllm.training.batches import batch_epoch


def backward(model: MLLM, batches: Sequence[Sequence[Encoded]]) -> None:
    for batch in batches:
        model.loss(batch).backward()


def full_logits(model: MLLM, batches: Sequence[Sequence[Encoded]]) -> None:
    """The common way: logits at every position, labels masked to −100 where there is no answer."""
    for batch in batches:
        inputs = model.collate(batch, [one.answer for one in batch])
        length = inputs["input_ids"].shape[1]
        labels = torch.tensor([[-100] * (length - len(one.answer)) + list(one.answer) for one in batch])
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
    parser = argparse.ArgumentParser(description="ratios of the long way's time to ours")
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["FEDMLLM_CACHE"] = cache
        samples = [s for s in tasks.build("easy-vqa", {}).load("train") if isinstance(s, Sample)]
        chosen = [samples[int(i)] for i in stream(0, "bench").choice(len(samples), 192, replace=False)]
        strategy = prompts.build("modality-agnostic", {})
        talks = [render(s, s.modalities, strategy) for s in chosen]
        cached, live = (MLLM.load(ModelTable(cache_features=on), seed=0) for on in (True, False))
        ours = cached.encode(talks, [s.image for s in chosen], 1200)
        theirs = live.encode(talks, [s.image for s in chosen], 1200)
        cached.prepare_features()
        order = batch_epoch([one.length for one in ours], 16, 1, stream(0, "order")).steps
        batches = [[ours[i] for i in step[0]] for step in order]
        uncached = [[theirs[i] for i in step[0]] for step in order]
        mixed = [[ours[i] for i in range(start, start + 16)] for start in range(0, len(ours), 16)]
        closed = [one for one in ours if one.options][:96]
        ones = [[one] for batch in batches for one in batch]
        rows: list[tuple[str, Callable[[], object], Callable[[], object]]] = [
            ("vision tower every step / cached features", lambda: backward(live, uncached), lambda: backward(cached, batches)),
            ("all logits / logits at the answers", lambda: full_logits(cached, batches), lambda: backward(cached, batches)),
            ("transformers' text model / written out",
             lambda: stacked(cached, batches, False), lambda: stacked(cached, batches, True)),
            ("samples one by one / batches of 16", lambda: backward(cached, ones), lambda: backward(cached, batches)),
            ("batches as they come / bucketed by length", lambda: backward(cached, mixed), lambda: backward(cached, batches)),
            ("closed questions generated / scored", lambda: cached.generate(closed, 8), lambda: option_scores(cached, closed)),
        ]  # fmt: skip
        for name, long_way, ours_way in rows:
            long_way(), ours_way()  # warm up
            ratios = [timed(long_way) / timed(ours_way) for _ in range(repeats)]
            print(f"{name:45s} {statistics.median(ratios):5.2f} ×  ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
