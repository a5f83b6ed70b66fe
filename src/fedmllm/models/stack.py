"""Adapters of several clients side by side on one frozen model: one forward and backward trains them all.

The trainable tensors of client c are row c of one matrix, gradients row c of another, so that what is done to every tensor
alike (clipping, proximal terms, the optimizer) is a few operations on a matrix, whatever the number of tensors. A batch
holds the same number of rows for each client, client by client. Frozen layers see one large batch; a LoRA layer adds
s_c B_c A_c x to the rows of client c by a batched product.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedmllm.models.lora import Adapter
from fedmllm.tensors import Tensors

Extent = tuple[int, int]
"""(samples, tokens) of a client's own batch, before it was padded to its neighbours'."""


class Stack:
    """`values` and `grads`: (clients, entries) in float32. `rows[c]` is client c's parameter for an optimizer.

    Only tensors in `trainable` are in the rows; the others are held as they came. `dropout[c]` seeds client c's dropout;
    none is drawn where it is empty.
    """

    def __init__(
        self, adapter: Adapter, starts: Sequence[Tensors], trainable: Sequence[str], dropout: Sequence[int] = ()
    ) -> None:
        self._adapter = adapter
        self._device = next(iter(adapter.parameters.values())).device
        self.ranks = [adapter.rank_in(start) for start in starts]
        self._shapes = {name: adapter.parameters[name].shape for name in trainable}
        self.values = self.matrix(starts)
        self.grads = torch.zeros_like(self.values)
        self.rows = [nn.Parameter(row) for row in self.values]
        self._frozen: Tensors = {}
        for name in sorted(adapter.parameters.keys() - self._shapes.keys()):
            each = [self._padded(name, start[name], rank) for start, rank in zip(starts, self.ranks, strict=True)]
            self._frozen[name] = torch.stack(each).to(self._device)
        scales = [adapter.info.scale(rank) for rank in self.ranks] if adapter.plain_lora else []
        self._scales = torch.tensor(scales, device=self._device)
        self._dropout: float = adapter.config.lora_dropout if adapter.plain_lora and dropout else 0.0
        self._generators = [torch.Generator(self._device).manual_seed(seed) for seed in dropout]
        # Of the batch under way: its measures, what gradients flow into, and the named parts of that.
        self._extents: Sequence[Extent] = []
        self._leaf = self.values
        self._now: Tensors = {}

    def _padded(self, name: str, tensor: Tensor, rank: int) -> Tensor:
        """Zeros beyond `rank`, up to the model's."""
        whole = torch.zeros(self._adapter.parameters[name].shape)
        self._adapter.part(name, whole, rank).copy_(tensor)
        return whole

    def matrix(self, states: Sequence[Tensors]) -> Tensor:
        """(clients, entries): the trainable tensors of each client's `states`, zeros for those that are not there."""
        rows = []
        for state, rank in zip(states, self.ranks, strict=True):
            found = (self._padded(n, state[n], rank) if n in state else torch.zeros(s) for n, s in self._shapes.items())
            rows.append(torch.cat([tensor.reshape(-1) for tensor in found]))
        return torch.stack(rows).to(self._device)

    def constants(self, values: Sequence[Mapping[str, float]]) -> Tensor:
        """(clients, entries): a number for each client and tensor, 0 where there is none."""
        full = [[torch.full((s.numel(),), one.get(n, 0.0)) for n, s in self._shapes.items()] for one in values]
        return torch.stack([torch.cat(row) for row in full]).to(self._device)

    def tensors(self, client: int, row: Tensor) -> Tensors:
        """One client's row (entries) as named float32 tensors of its own rank on the CPU; copies."""
        whole = self._views(row.detach().to("cpu", torch.float32, copy=True).unsqueeze(0))
        return {n: self._adapter.part(n, t[0], self.ranks[client]).contiguous() for n, t in whole.items()}

    def trained(self, client: int, received: Tensors) -> Tensors:
        """The whole adapter of a client: what was trained, and the rest as it was received."""
        mine = self.tensors(client, self.values[client])
        return {name: mine[name] if name in mine else received[name].clone() for name in self._adapter.parameters}

    # Beside the model

    @contextmanager
    def installed(self, clients: int) -> Iterator[None]:
        """Let the model compute with the adapters of the first `clients` rows, once `begin` was called for the batch."""
        with ExitStack() as undo:
            if self._adapter.stacks:
                undo.enter_context(self._adapter.model.disable_adapter())
                self._leaf = self.values[:clients].requires_grad_()
                self._leaf.grad = self.grads[:clients]
                self._adapter.beside = self
                undo.callback(setattr, self._adapter, "beside", None)
                for base, a, b in self._adapter.pairs():
                    undo.callback(base.register_forward_hook(self._branch(a, b, clients)).remove)
            else:  # a single client: its row takes the place of the adapter's own memory
                values, grads = ({n: t[0] for n, t in self._views(m).items()} for m in (self.values, self.grads))
                values |= {name: tensor[0] for name, tensor in self._frozen.items()}
                undo.enter_context(self._adapter.lent(values, grads, self.ranks[0]))
            yield

    def begin(self, extents: Sequence[Extent]) -> None:
        """What each client's part of the next batch measures. Gradients of the batch add up in `grads`."""
        self._extents = extents
        if self._adapter.stacks:
            self._now = self._views(self._leaf) | {name: tensor[: len(extents)] for name, tensor in self._frozen.items()}

    @property
    def now(self) -> Tensors:
        """A (clients, r, d_in) and B (clients, d_out, r) of the batch under way, by their names."""
        return self._now

    @property
    def scales(self) -> Tensor:
        """(clients): LoRA's scale for those of the batch under way."""
        return self._scales[: len(self._extents)]

    @property
    def drops(self) -> bool:
        """Whether LoRA's inputs are dropped at random."""
        return self._dropout > 0

    def _views(self, matrix: Tensor) -> Tensors:
        """name -> (clients, …). One split, whose gradient is one concatenation."""
        parts = torch.split(matrix, [shape.numel() for shape in self._shapes.values()], dim=1)
        return {name: p.view(len(matrix), *shape) for p, (name, shape) in zip(parts, self._shapes.items(), strict=True)}

    def _branch(self, a: str, b: str, clients: int) -> Any:
        """A forward hook of a linear layer that adds s_c B_c A_c x; A: (clients, r, d_in), B: (clients, d_out, r)."""
        scale = self._scales[:clients].view(-1, 1, 1)

        def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            down, up = self._now[a].transpose(1, 2), self._now[b].transpose(1, 2)
            x = inputs[0].to(down.dtype)
            if self._dropout:
                x = self._drop(x)
            inner = torch.bmm(x.reshape(clients, -1, x.shape[-1]), down) * scale
            whole = torch.baddbmm(output.to(x.dtype).reshape(clients, -1, output.shape[-1]), inner, up)
            return whole.view(output.shape).to(output.dtype)

        return add

    def _drop(self, x: Tensor) -> Tensor:
        """Dropout that draws for a client's own samples and tokens alone, so that neighbours and padding change nothing."""
        clients = len(self._extents)
        rows = x.reshape(clients, -1, *x.shape[1:])
        keep = torch.zeros_like(rows)
        for c, (samples, tokens) in enumerate(self._extents):
            own = torch.empty((samples, tokens, *rows.shape[3:]), device=x.device, dtype=x.dtype)
            keep[c, :samples, rows.shape[2] - tokens :] = own.bernoulli_(1 - self._dropout, generator=self._generators[c])
        return (rows * keep / (1 - self._dropout)).reshape(x.shape)


__all__ = ["Extent", "Stack"]
