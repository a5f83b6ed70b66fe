"""What is measured on a client's samples before it trains: the loss of the received adapter, the gradient of the base."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedmllm.algorithms.factors import A, B, leading_directions
from fedmllm.models.encoded import Encoded
from fedmllm.models.mllm import MLLM
from fedmllm.tensors import Tensors


def parts_that_fit(model: MLLM, samples: int) -> list[slice]:
    """The parts in which so many samples of a client are computed; one if they fit in memory."""
    size = model.limits.samples.size(samples)
    return [slice(i, i + size) for i in range(0, samples, size)] if size < samples else [slice(None)]


def loss_before(model: MLLM, received: Tensors, batches: Sequence[Sequence[Encoded]]) -> float:
    """The mean loss of the received adapter over the batches, without dropout; 0 if there are none.

    Each client is evaluated alone, with no gradient and no random draw, so neither its neighbours nor training is affected.
    """
    if not model.adapter.stacks:
        model.model.eval()  # training switches to its own mode and back to this one
    with model.stacked([received]):
        total = 0.0
        for number, batch in enumerate(batches, start=1):
            total += sum(float(model.losses(batch[part]).sum()) for part in parts_that_fit(model, len(batch)))
            model.progress("measuring", number, len(batches), "the loss before training")
    return total / max(sum(map(len, batches)), 1)


def base_gradient(model: MLLM, batches: Sequence[Sequence[Encoded]], seed: int) -> Tensors:
    """`LocalResult.base_gradient` over the batches: factors A: (r, d_in) and B: (d_out, r) by LoRA's names, which are 0 if
    there are none. `seed` is that of the search for the largest singular values."""
    model.model.eval()
    weights = {a.removesuffix(A): base.get_parameter("weight") for base, a, _ in model.adapter.pairs()}
    totals = {m: torch.zeros(weight.shape) for m, weight in weights.items()}
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        with model.adapter.disabled():
            for number, batch in enumerate(batches, start=1):
                model.progress("measuring", number, len(batches), "the gradient of the base")
                grads = torch.autograd.grad(model.loss(batch), list(weights.values()), allow_unused=True)
                for total, grad in zip(totals.values(), grads, strict=True):
                    total += 0 if grad is None else grad.to("cpu", torch.float32)
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)
    gradient: Tensors = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for m, total in totals.items():
            u, sigma, vt = leading_directions(total.double() / max(sum(map(len, batches)), 1), model.adapter.rank)
            gradient |= {m + A: vt.float().contiguous(), m + B: (u * sigma).float().contiguous()}
    return gradient
