"""FLoRA-NA: Nguyen et al. 2025, "Communication-Efficient and Accurate Approach for Aggregation in Federated Low-Rank
Adaptation" (2509.26399).

As many numbers travel as under FedAvg, but the factors are averaged with weights of their own, which bring the product of the
means close to the mean of the products:

    B̂ = Σ_k u_k B_k,   Â = Σ_k v_k A_k,   u, v = argmin ‖Σ_k p_k B_k A_k − B̂ Â‖   for each module

The solver is ours: least squares for u and for v in turn, from u = v = p, until nothing changes or `steps` is reached. The
error falls with every step, so it is never above FedAvg's, whose means are step 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedmllm.algorithms.base import Algorithm, RoundInfo, Update, algorithms, in_order, not_negative
from fedmllm.algorithms.factors import A, B, lora_state, modules
from fedmllm.algorithms.fedavg import Weighting, weights_of
from fedmllm.tensors import State, Tensors

_SETTLED = 1e-9
"""The change of the weights in a step below which they have settled."""


def refitted(x: Tensor, y: Tensor, p: Tensor, c: Tensor, fixed: Tensor) -> Tensor:
    """The weights that minimise ‖Σ c_k x_k ŷ − Σ p_k x_k y_k‖ with ŷ = Σ fixed_k y_k, for x: (S, d, r) and y: (S, r, n).

    Of several minima it is the nearest to `c`: weights that the error does not depend on stay as they are.
    """
    y_hat = torch.tensordot(fixed, y, 1)
    rows, images = x.flatten(1), (x @ (y_hat @ y_hat.T)).flatten(1)
    normal, target = rows @ images.T, rows @ torch.tensordot(p, x @ (y @ y_hat.T), 1).flatten()
    inverse = torch.linalg.pinv((normal + normal.T) / 2, rtol=1e-12, hermitian=True)
    new: Tensor = c + inverse @ (target - normal @ c)
    return new


def fitted(b: Tensor, a: Tensor, p: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The weights u and v: (S,) of the factors b: (S, d_out, r) and a: (S, r, d_in) after at most `steps` steps; float64."""
    u = v = p
    for _ in range(steps):
        before = torch.cat((u, v))
        u = refitted(b, a, p, u, v)
        v = refitted(a.mT, b.mT, p, v, u)
        if float((torch.cat((u, v)) - before).abs().max()) < _SETTLED:
            break
    return u, v


@algorithms.register("flora-na")
def flora_na(*, steps: int = 20, weighting: Weighting = "examples") -> Algorithm:
    """Average A and B with weights that bring the product near the mean of the products; 0 steps are FedAvg (2509.26399)."""
    not_negative(steps=steps)

    def aggregate(state: State, updates: Sequence[Update], info: RoundInfo) -> State:
        ordered = in_order(updates)
        adapters = [u.groups["adapter"] for u in ordered]
        weights = torch.tensor(weights_of(ordered, weighting), dtype=torch.float64)
        new: Tensors = {}
        for m in modules(state["adapter"]):
            a, b = (torch.stack([adapter[m + suffix] for adapter in adapters]).double() for suffix in (A, B))
            u, v = fitted(b, a, weights / weights.sum(), steps)
            new[m + A], new[m + B] = torch.tensordot(v, a, 1).float(), torch.tensordot(u, b, 1).float()
        return {**state, "adapter": new}

    return Algorithm(lora_state, aggregate, needs_lora=True)
