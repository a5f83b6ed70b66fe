"""LoRA-A²: Koo et al. 2025, "Towards Robust and Efficient Federated Low-Rank Adaptation with Heterogeneous Clients"
(2410.22815).

Even rounds train B with A fixed, odd rounds A with B fixed, as in RoLoRA. After one pass over its samples, a client scores
each rank i of each module by what the pass changed,

    ‖ΔB[:, i]‖ · ‖A[i, :]‖ when B is trained,   ‖B[:, i]‖ · ‖ΔA[i, :]‖ when A is,

keeps the best share of the ranks of all modules together, and trains again from the start with the others fixed. It sends the
changes of the ranks that it kept, and where they belong; the server adds Σ p_k Δ_k, in which a rank that a client did not keep
counts as unchanged.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from fedmllm.algorithms.base import Algorithm, LocalResult, LocalRule, RoundInfo, algorithms, positive
from fedmllm.algorithms.compression import Packed, compressed
from fedmllm.algorithms.factors import A, B, is_a, is_b, modules
from fedmllm.algorithms.fedavg import Weighting
from fedmllm.algorithms.one_factor import rolora
from fedmllm.tensors import State, Tensors


def by_rank(name: str, factor: Tensor) -> Tensor:
    """(r, d): one row for each rank. A view."""
    return factor if is_a(name) else factor.T


def scores(before: Tensors, after: Tensors) -> dict[str, Tensor]:
    """Module -> (r) scores of its ranks, for a training that changed A or B: ‖ΔB[:, i]‖·‖A[i, :]‖ or ‖B[:, i]‖·‖ΔA[i, :]‖."""
    by_module: dict[str, Tensor] = {}
    for m in modules(before):
        a, b = before[m + A].double(), before[m + B].double()
        change_a, change_b = after[m + A].double() - a, after[m + B].double() - b
        by_module[m] = change_b.norm(dim=0) * a.norm(dim=1) + b.norm(dim=0) * change_a.norm(dim=1)
    return by_module


def largest(values: Tensor, count: int) -> Tensor:
    """The places of the `count` largest values, in increasing order; of equal ones the first."""
    return torch.argsort(values, descending=True, stable=True)[:count].sort().values


def frozen(chosen: Tensor, factors: Tensors) -> Tensors:
    """1 for every entry of a rank that is not chosen; `chosen` are places among the ranks of all factors, sorted by name."""
    masks = {name: torch.ones_like(factors[name]) for name in sorted(factors)}
    rows = [row for name, mask in masks.items() for row in by_rank(name, mask)]  # views, which are written to
    for place in chosen.tolist():
        rows[place].zero_()
    return masks


@algorithms.register("lora-a2")
def lora_a2(*, share: float | list[float] = 0.5, b_lr_factor: float = 5.0, weighting: Weighting = "examples") -> Algorithm:
    """Train B and A in turn, of each only the ranks that matter most to the client; send only those (2410.22815)."""
    shares = share if isinstance(share, list) else [share]
    if not shares or not all(0 < value <= 1 for value in shares):
        raise ValueError(f"share = {share} must be above 0 and at most 1")
    positive(b_lr_factor=b_lr_factor)
    plain = rolora(weighting=weighting)

    def count(client: int, ranks: int) -> int:
        """How many of all ranks the client keeps: client 0 the first share, client 1 the second, and so on in turn."""
        return max(1, math.floor(shares[client % len(shares)] * ranks + 1e-9))

    def rule(received: State, memory: State, info: RoundInfo) -> LocalRule:
        inner, start = plain.rule(received, memory, info), received["adapter"]
        factors = {name: tensor for name, tensor in start.items() if inner.trainable(name)}

        def probe(result: LocalResult) -> Tensors:
            by_module = scores(start, result.trained)
            values = torch.cat([by_module[name.removesuffix(A).removesuffix(B)] for name in sorted(factors)])
            return frozen(largest(values, count(info.me.client, len(values))), factors)

        return replace(inner, probe=probe, lr_factor=b_lr_factor if any(map(is_b, factors)) else 1.0)

    def pack(change: Tensors, client: int, info: RoundInfo) -> Packed:
        rows = [row for name in sorted(change) for row in by_rank(name, change[name])]
        number = count(client, len(rows))
        # The ranks that were fixed have not changed at all.
        chosen = largest(torch.stack([row.double().norm() for row in rows]), number)
        values = torch.cat([rows[place] for place in chosen.tolist()])
        longest = sum(sorted(map(len, rows))[-number:])
        filled = torch.nn.functional.pad(values, (0, longest - len(values)))
        return {"places": {"ranks": chosen.to(torch.int32)}, "values": {"ranks": filled}}

    def unpack(packed: Packed, shapes: Tensors) -> Tensors:
        change = {name: torch.zeros_like(shapes[name]) for name in sorted(shapes)}
        rows = [row for name in sorted(change) for row in by_rank(name, change[name])]  # views, which are written to
        places, values = packed["places"]["ranks"].tolist(), packed["values"]["ranks"]
        if any(not 0 <= place < len(rows) for place in places) or sorted(set(places)) != places:
            raise ValueError(f"the chosen ranks are not increasing numbers below {len(rows)}")
        done = 0
        for place in places:
            rows[place].copy_(values[done : done + len(rows[place])])
            done += len(rows[place])
        return change

    return replace(compressed(replace(plain, rule=rule), pack, unpack, feedback=False), averages=None)
