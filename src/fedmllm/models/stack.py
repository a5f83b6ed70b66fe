"""Adapters of several clients side by side on one frozen model: one forward and backward pass trains them all.

Row c of one matrix holds the trainable tensors of client c, and row c of another their gradients. Whatever is done to all
tensors alike (clipping, proximal terms, the optimizer) is then a few operations on a matrix, however many tensors there
are. A batch has the same number of rows for each client, client by client. Frozen layers process one large batch; a LoRA
layer adds s_c B_c A_c x to the rows of client c by a batched product.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fedmllm.models.adapter import Adapter
from fedmllm.models.checkpointing import checkpointed
from fedmllm.tensors import Tensors

Extent = tuple[int, int]
"""(samples, tokens) of a client's own batch, before it was padded to the size of the others."""


class Stack:
    """`values` and `grads`: (clients, entries) in float32. `rows[c]` is client c's parameter for an optimizer.

    The rows hold only the tensors in `trainable`; the others keep their initial values. `dropout[c]` seeds client c's
    dropout; without it nothing is dropped. The model computes with `shares[c]` times the LoRA adapter of client c, 1 if not
    given. With `checkpointing`, layers are computed again in the backward pass.
    """

    def __init__(
        self,
        adapter: Adapter,
        starts: Sequence[Tensors],
        trainable: Sequence[str],
        dropout: Sequence[int] = (),
        shares: Sequence[float] = (),
        checkpointing: bool = False,
    ) -> None:
        self._adapter, self.checkpointing = adapter, checkpointing
        self._device = next(iter(adapter.parameters.values())).device
        self.ranks = [adapter.rank_in(start) for start in starts]
        self._shapes = {name: adapter.parameters[name].shape for name in trainable}
        self.values = self.matrix(starts)
        self.grads = torch.zeros_like(self.values)
        self.rows = [nn.Parameter(row) for row in self.values]
        self._frozen: Tensors = {}
        for name in sorted(adapter.parameters.keys() - self._shapes.keys()):
            padded = [self._padded(name, start[name], rank) for start, rank in zip(starts, self.ranks, strict=True)]
            self._frozen[name] = torch.stack(padded).to(self._device)
        self._shares = shares or [1.0] * len(starts)
        pairs = zip(self.ranks, self._shares, strict=True)
        scales = [share * adapter.info.scale(rank) for rank, share in pairs] if adapter.low_rank else []
        self._scales = torch.tensor(scales, device=self._device)
        self._dropout: float = adapter.config.lora_dropout if adapter.low_rank and dropout else 0.0
        self.has_dropout, on_meta = self._dropout > 0, self._device.type == "meta"
        """Whether inputs of LoRA layers are dropped at random."""
        self._generators = [torch.Generator("cpu" if on_meta else self._device).manual_seed(seed) for seed in dropout]
        # Of the current batch: its extents, and the matrix that gradients flow into.
        self._extents: Sequence[Extent] = []
        self._part = slice(None)
        self._before: list[Tensor] = []
        self._leaf = self.values
        self._single: Tensors = {}
        self.current: Tensors = {}
        """The factors A (clients, r, d_in) and B (clients, d_out, r) of the current batch by name: views of that matrix."""

    def _padded(self, name: str, tensor: Tensor, rank: int) -> Tensor:
        """The tensor with zeros beyond `rank`, up to the model's rank."""
        padded = torch.zeros(self._adapter.parameters[name].shape)
        self._adapter.part(name, padded, rank).copy_(tensor)
        return padded

    def matrix(self, states: Sequence[Tensors]) -> Tensor:
        """(clients, entries): the trainable tensors of each client's state, with zeros for tensors that it lacks."""
        rows = []
        for state, rank in zip(states, self.ranks, strict=True):
            tensors = (self._padded(n, state[n], rank) if n in state else torch.zeros(s) for n, s in self._shapes.items())
            rows.append(torch.cat([tensor.reshape(-1) for tensor in tensors]))
        return torch.stack(rows).to(self._device)

    def constants(self, values: Sequence[Mapping[str, float]]) -> Tensor:
        """(clients, entries): one number per client and tensor, 0 if it is not given."""
        rows = [[torch.full((s.numel(),), numbers.get(n, 0.0)) for n, s in self._shapes.items()] for numbers in values]
        return torch.stack([torch.cat(row) for row in rows]).to(self._device)

    def tensors(self, client: int, row: Tensor) -> Tensors:
        """One client's row (entries) as named float32 tensors of the client's own rank on the CPU; copies."""
        parts = self.parts(client, row.detach().to("cpu", torch.float32, copy=True))
        return {name: part.contiguous() for name, part in parts.items()}

    def parts(self, client: int, row: Tensor) -> Tensors:
        """One client's row (entries) as named tensors of the client's own rank, which share the row's memory."""
        return {n: self._adapter.part(n, t[0], self.ranks[client]) for n, t in self._views(row.unsqueeze(0)).items()}

    def trained(self, client: int, received: Tensors) -> Tensors:
        """The complete adapter of a client: the trained tensors, and the others as they were received."""
        trained = self.tensors(client, self.values[client])
        return {name: trained[name] if name in trained else received[name].clone() for name in self._adapter.parameters}

    # Use by the model

    @contextmanager
    def installed(self, clients: int) -> Iterator[None]:
        """Make the model's layers compute with the adapters of the first `clients` rows. Call `begin` before each batch."""
        with ExitStack() as undo:
            if self.checkpointing:
                undo.enter_context(checkpointed(self._adapter.model, self._twice))
            if self._adapter.stacks:
                undo.enter_context(self._adapter.disabled())
                self._leaf = self.values[:clients].requires_grad_()
                self._leaf.grad = self.grads[:clients]
                for base, a, b in self._adapter.pairs():
                    undo.callback(base.register_forward_hook(self._branch(a, b, clients)).remove)
            else:  # a single client: its row replaces the adapter's own memory
                values, grads = ({n: t[0] for n, t in self._views(m).items()} for m in (self.values, self.grads))
                values |= {name: tensor[0] for name, tensor in self._frozen.items()}
                undo.enter_context(self._adapter.replaced(values, grads, self.ranks[0], self._shares[0]))
                self._single = values
            yield

    def begin(self, extents: Sequence[Extent], part: slice = slice(None)) -> None:
        """Start a batch with the extent of each client's own. Gradients of the batch are added to `grads`.

        If the batch is computed in parts, each holds the samples `part` of every client, and the same entries are dropped as
        if it were computed at once.
        """
        if self.has_dropout and part != slice(None):
            if part.start:
                self._rewind(self._before)
            else:
                self._before = self._draws()
        self._extents, self._part = extents, part
        if self._adapter.stacks:
            frozen = {name: tensor[: len(extents)] for name, tensor in self._frozen.items()}
            self.current = self._adapter.factors(self._views(self._leaf) | frozen)
        elif self._adapter.spread:
            self._adapter.refresh(self._single)

    def _draws(self) -> list[Tensor]:
        """Where each client's draws of dropout are."""
        return [generator.get_state() for generator in self._generators]

    def _rewind(self, draws: Sequence[Tensor]) -> None:
        for generator, state in zip(self._generators, draws, strict=True):
            generator.set_state(state)

    def _twice(self) -> tuple[Any, Any]:
        """Contexts for the two passes through a layer: the second drops what the first has dropped."""
        if not self.has_dropout:
            return nullcontext(), nullcontext()
        draws = self._draws()

        @contextmanager
        def again() -> Iterator[None]:
            later = self._draws()
            self._rewind(draws)
            try:
                yield
            finally:
                self._rewind(later)

        return nullcontext(), again()

    @property
    def scales(self) -> Tensor:
        """(clients): the LoRA scales of the clients in the current batch."""
        return self._scales[: len(self._extents)]

    def _views(self, matrix: Tensor) -> Tensors:
        """name -> (clients, …). This is a single split, whose gradient is a single concatenation."""
        parts = torch.split(matrix, [shape.numel() for shape in self._shapes.values()], dim=1)
        return {name: p.view(len(matrix), *shape) for p, (name, shape) in zip(parts, self._shapes.items(), strict=True)}

    def _branch(self, a: str, b: str, clients: int) -> Any:
        """A forward hook of a linear layer that adds s_c B_c A_c x; A: (clients, r, d_in), B: (clients, d_out, r).

        The products are in the layer's own precision: their sum is rounded to it anyway, and with products in float32 a step in
        bfloat16 would keep an H100 busy 1.3 times as long. Factors, gradients and the optimizer's state are in float32.
        """
        scale = self._scales[:clients].view(-1, 1, 1)

        def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            down, up = (self.current[name].transpose(1, 2).to(output.dtype) for name in (a, b))
            x = inputs[0].to(output.dtype)
            if self._dropout:
                x = self._drop(x)
            inner = (torch.bmm(x.reshape(clients, -1, x.shape[-1]), down) * scale).to(x.dtype)
            total = torch.baddbmm(output.reshape(clients, -1, output.shape[-1]), inner, up)
            return total.view(output.shape)

        return add

    def _drop(self, x: Tensor) -> Tensor:
        """Apply dropout. Only a client's own samples and tokens draw, so that other clients and padding change nothing."""
        clients = len(self._extents)
        rows = x.reshape(clients, -1, *x.shape[1:])
        keep = torch.zeros_like(rows)
        for c, (samples, tokens) in enumerate(self._extents):
            own = torch.empty((samples, tokens, *rows.shape[3:]), device=x.device, dtype=x.dtype)
            own = own.bernoulli_(1 - self._dropout, generator=self._generators[c])[self._part, -rows.shape[2] :]
            keep[c, : len(own), rows.shape[2] - own.shape[1] :] = own
        return (rows * keep / (1 - self._dropout)).reshape(x.shape)
