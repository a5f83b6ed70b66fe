"""How a robust estimate of the mean change takes the place of the updates: the algorithm receives copies of it.

An algorithm that depends on the updates' mean and number only (`Algorithm.averages`) cannot distinguish copies of an estimate
from updates that agree. Each group of tensors is estimated on its own, because a control variate is of another size than a
change of the adapter. Under LoRA the factors A and B are entries like any others: what is estimated is the mean of the factors,
as FedAvg averages them, and not the mean of their products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from fedmllm.algorithms.base import Algorithm, RoundInfo, Update, in_order
from fedmllm.algorithms.combining import Combined, Robust, as_upload
from fedmllm.algorithms.factors import A, B, modules
from fedmllm.algorithms.fedavg import weights_of
from fedmllm.tensors import State, Tensors

On = Literal["factors", "product"]


@dataclass(frozen=True)
class Changes:
    """What the n updates of a round would change in one group of tensors.

    `weights`: (n,) are those of the algorithm's mean and sum to 1. `previous` is the estimate of the round before, without the
    tensors that had none. `whole` has a LoRA adapter as the server holds it, for factors that are not sent. All numbers that
    are computed are float64.
    """

    uploads: Sequence[Tensors]
    sent: Tensors
    weights: Tensor
    previous: Tensors
    whole: Tensors

    def rows(self, name: str) -> Tensor:
        """The changes of one tensor, a row per update: (n, its entries). Computed anew each time, because all of them together
        are twice as large as the updates."""
        rows = torch.stack([upload[name].double() for upload in self.uploads])
        return (rows - self.sent[name].double() if name in self.sent else rows).flatten(1)

    def each(self, reduce: Callable[[str, Tensor], Tensor]) -> Tensors:
        """name -> `reduce(name, rows)`, in the shape of the tensor, and in the order of the names, which `reduce` may sum over:
        files and messages change that of the tensors."""
        return {name: reduce(name, self.rows(name)).view(tensor.shape) for name, tensor in sorted(self.uploads[0].items())}

    def mean(self, weights: Tensor) -> Tensors:
        """Σ_k weights_k x_k."""
        return self.each(lambda _, rows: weights @ rows)

    def gram(self, on: On = "factors") -> Tensor:
        """⟨x_i, x_j⟩: (n, n), of the changes, or of what they change in the products B A of the adapter."""
        zeros = torch.zeros(len(self.uploads), len(self.uploads), dtype=torch.float64)
        if on == "product" and self.whole:
            return sum(self._products(), zeros)
        return sum((rows @ rows.T for rows in map(self.rows, sorted(self.uploads[0]))), zeros)

    def _products(self) -> Iterator[Tensor]:
        """Of each module ⟨B_i A_i − B A, B_j A_j − B A⟩, with ⟨B_i A_i, B_j A_j⟩ = Σ_ab (B_iᵀ B_j)_ab (A_i A_jᵀ)_ab.

        The products are never formed: (n r)² (d_in + d_out) operations.
        """
        adapters = [self.whole, *({**self.whole, **upload} for upload in self.uploads)]
        for m in modules(self.whole):
            rows_a = torch.cat([adapter[m + A].double() for adapter in adapters])
            rows_b = torch.cat([adapter[m + B].double().T for adapter in adapters])
            shape = (len(adapters), -1, len(adapters), len(rows_a) // len(adapters))
            gram = ((rows_a @ rows_a.T) * (rows_b @ rows_b.T)).view(shape).sum((1, 3))
            yield gram[1:, 1:] - gram[1:, :1] - gram[:1, 1:] + gram[0, 0]


@dataclass(frozen=True)
class Estimate:
    """An estimate of the mean change, and `counted`: (n,), the weight of each update in it divided by the update's weight in
    the algorithm's mean: 1 if it counts as it would without the method, 0 if not at all."""

    change: Tensors
    counted: Tensor


Estimator = Callable[[Changes], Estimate]


def robust(
    estimator: Estimator, *, least: int = 1, instead: str = "", remembers: bool = False, products: bool = False
) -> Robust:
    """The robust aggregation whose estimate of the mean change is `estimator`'s; see `Robust` for the rest."""
    return Robust(partial(_combine, estimator, remembers), least, instead, remembers=remembers, products=products)


def _combine(
    estimator: Estimator, remembers: bool, updates: Sequence[Update], algorithm: Algorithm, state: State, info: RoundInfo
) -> Combined:
    ordered = [algorithm.restored(update, state, info) for update in in_order(updates)]
    shapes, sent = ordered[0].groups, algorithm.message(state, ordered[0].client, info)  # all are sent the same
    weights = torch.tensor(weights_of(ordered, algorithm.averages or "uniform"), dtype=torch.float64)
    estimates: dict[str, Estimate] = {}
    memory: State = {}
    for group in shapes:
        uploads, start = [update.groups[group] for update in ordered], sent["adapter"] if group == "adapter" else {}
        whole = state["adapter"] if group == "adapter" else {}
        previous = state.get(f"robust-{group}", {})
        estimates[group] = estimator(Changes(uploads, start, weights / weights.sum(), previous, whole))
        memory[f"robust-{group}"] = {**previous, **{n: t.to(uploads[0][n].dtype) for n, t in estimates[group].change.items()}}
    groups = as_upload({group: estimate.change for group, estimate in estimates.items()}, sent, shapes)
    counted = torch.stack([estimate.counted for estimate in estimates.values()]).amin(0).clamp(0, 1)
    kept = {update.client: float(share) for update, share in zip(ordered, counted, strict=True)}
    copies = [replace(update, groups=groups) for update in ordered]
    return Combined(copies, kept, state=memory if remembers else {})
