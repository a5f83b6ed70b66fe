"""(c) The yardstick: only forward, backward, clipping and optimizer steps, on batches that are prepared beforehand.

Not timed: reading, processing, collating, and the vision tower, whose output is part of every batch. Timed: PEFT's layers,
logits at the answers only, fused AdamW, resetting the adapter for each client, and the mean over clients. The rounds cannot be
resumed and write neither records nor checkpoints: the time that (d) needs in addition is the price of a framework. (d) can also
be faster, because it updates one flat tensor where PyTorch here updates PEFT's many small ones.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from peft import get_peft_model_state_dict
from torch import Tensor
from torch.nn import functional

from contenders.hf import answer_lengths, load, process
from contenders.workload import BETAS, CLIP, EPS, LR, Item, Outcome, Workload, average, peak_memory_mb

Batch = tuple[dict[str, Any], Tensor, Tensor]
PIXELS, SIZES = ("pixel_values", "pixel_attention_mask"), ("image_grid_thw",)
"""The inputs of the vision tower that its output replaces, and those that the text model also needs."""


@torch.no_grad()
def collate(model: Any, processor: Any, items: Sequence[Item]) -> Batch:
    """(model inputs, labels: (samples, longest answer), number of answer tokens per sample). Answers are right-aligned."""
    texts = [item.prompt + item.answer for item in items]
    inputs = process(processor, texts, items, padding=True, padding_side="left")
    counts = answer_lengths(processor, items)
    labels = inputs["input_ids"][:, -max(counts) :].clone()
    for row, count in enumerate(counts):
        labels[row, : max(counts) - count] = -100
    inputs = {key: value.to(model.device) for key, value in inputs.items()}
    # The sizes of pictures, if the family has them, are also an input of the text model.
    seen = {key: inputs.pop(key) if key in PIXELS else inputs[key] for key in (*PIXELS, *SIZES) if key in inputs}
    inputs["mm_encoder_outputs"] = {"image": model.get_base_model().get_image_features(**seen, return_dict=True)}
    return inputs, labels.to(model.device), torch.tensor(counts, device=model.device)


def mean_loss(model: Any, batch: Batch) -> Tensor:
    inputs, labels, counts = batch
    keep = labels.shape[1] + 1
    logits = model(**inputs, use_cache=False, logits_to_keep=keep).logits[:, :-1].float()
    losses = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
    return (losses.view(labels.shape).sum(1) / counts).mean()


def train_client(model: Any, steps: Sequence[Batch]) -> Tensor:
    """Train the model's current adapter with a new optimizer; the sum of the losses of all samples."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, LR, betas=BETAS, eps=EPS, weight_decay=0.0, fused=True)
    total = torch.zeros((), device=parameters[0].device)
    for batch in steps:
        optimizer.zero_grad(set_to_none=True)
        loss = mean_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        total += loss.detach() * len(batch[2])
    return total


def run(workload: Workload) -> Outcome:
    model, processor = load(workload)
    prepared = [
        [[collate(model, processor, [workload.train[i] for i in step]) for step in client] for client in clients]
        for clients in workload.steps
    ]
    # These tensors share memory with the parameters, so that `copy_` below sets the adapter.
    adapter = get_peft_model_state_dict(model)
    mean_loss(model, prepared[0][0][0]).backward()  # warm up
    losses = []
    began = time.perf_counter()
    shared = {name: t.clone() for name, t in adapter.items()}
    for clients in prepared:
        trained, sizes, total = [], [], torch.zeros(())
        for steps in clients:
            for name, tensor in adapter.items():
                tensor.copy_(shared[name])
            total += train_client(model, steps)
            trained.append({name: t.clone() for name, t in adapter.items()})
            sizes.append(sum(len(batch[2]) for batch in steps))
        shared = average(trained, sizes)
        losses.append(float(total) / sum(sizes))
    seconds = time.perf_counter() - began
    return Outcome(losses, shared, seconds, None, None, torch.get_num_threads(), peak_memory_mb())
