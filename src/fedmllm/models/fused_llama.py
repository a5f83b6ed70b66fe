"""A frozen Llama text model under stacked LoRA with its forward and backward pass written by hand.

The results are those of transformers, with fewer passes over memory. On a CPU, a small model spends more time between its
matrix products than in them. Here a layer takes some thirty operations instead of a hundred:

- W + s B A is computed once per pass (Hu 2021, arXiv 2106.09685, section 4.1), so that a product with an adapter costs no
  more than one without. Gradients of A and B still go through the r-wide middle and never through a gradient of W.
- The scale of a norm is multiplied into the frozen weights that follow it.
- Rows are padded on the right, where a causal model needs no mask.
- The last layer is computed only at the positions whose logits are requested, because nothing else reads it.
- Positions rotate as complex numbers. The two features of a head that rotate together are made neighbours by reordering the
  rows of W_q and W_k in the same way, which changes no product of a query and a key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaModel

from fedmllm.models.adapter import Adapter
from fedmllm.tensors import Tensors

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
FACTORS = 2 * len(PROJECTIONS)
"""The number of adapter tensors per layer: A and B of each projection."""


def supports(text: Any, adapter: Adapter) -> bool:
    """Whether `FusedLlama` can compute with `text`: a Llama in float32 on a CPU, without biases, grouped heads or scaled
    rotary positions, and with plain LoRA on q, k, v and o of all its layers and nowhere else."""
    if not isinstance(text, LlamaModel) or not adapter.stacks:
        return False
    config, weight = text.config, text.embed_tokens.weight
    plain = not config.attention_bias and not config.mlp_bias and config.hidden_act == "silu"
    plain &= config.num_key_value_heads == config.num_attention_heads and config.rope_parameters["rope_type"] == "default"
    adapted = {id(base) for base, _, _ in adapter.pairs()}
    complete = adapted == {id(base) for layer in text.layers for base in _projections(layer)}
    return bool(plain and complete and weight.device.type == "cpu" and weight.dtype == torch.float32)


def _projections(layer: Any) -> list[Any]:
    """The frozen q, k, v, o of a layer, unwrapped from PEFT's layers."""
    projections = (getattr(layer.self_attn, name) for name in PROJECTIONS)
    return [getattr(projection, "base_layer", projection) for projection in projections]


class FusedLlama:
    """The text model under adapters of several clients. It copies the weights, so another fold requires a new instance."""

    def __init__(self, text: Any, adapter: Adapter) -> None:
        heads, width = text.config.num_attention_heads, text.config.head_dim
        half = torch.arange(width // 2)
        pairs = torch.stack((half, half + width // 2), dim=1).flatten()
        both = torch.cat([pairs + h * width for h in range(2 * heads)])  # the heads of q and of k
        order = torch.cat((both, torch.arange(len(both), 3 * heads * width)))
        self.layers = [_Layer(layer, heads, order, layer is text.layers[-1]) for layer in text.layers]
        self._norm, self._frequencies = text.norm, text.rotary_emb.inv_freq.float()
        names = {id(base): (a, b) for base, a, b in adapter.pairs()}
        self._names = [name for layer in text.layers for base in _projections(layer) for name in names[id(base)]]

    def __call__(
        self, embedded: Tensor, adapters: Tensors, scales: Tensor, positions: Tensor, checkpointing: bool = False
    ) -> Tensor:
        """The hidden states after the last norm at the requested positions: (rows, n, d).

        `embedded`: (rows, length, d), client by client; `adapters`: A (clients, r, d_in), B (clients, d_out, r) by name;
        `scales`: (clients); `positions`: (rows, n). With `checkpointing`, layers are computed again in the backward pass.
        """
        angle = torch.arange(embedded.shape[1]).float()[:, None] * self._frequencies
        batch = _Batch(
            positions, embedded.shape[1], scales.view(-1, 1, 1), torch.polar(torch.ones_like(angle), angle), checkpointing
        )
        factors = [adapters[name] for name in self._names]
        hidden = _Layers.apply(self.layers, batch, embedded, *factors)  # type: ignore[no-untyped-call]
        normed: Tensor = self._norm(hidden)
        return normed


@dataclass(frozen=True)
class _Batch:
    """`positions`: (rows, n); `scale`: (clients, 1, 1); `rotations`: (length, width / 2), e^(i t θ)."""

    positions: Tensor
    length: int
    scale: Tensor
    rotations: Tensor
    checkpointing: bool

    @property
    def clients(self) -> int:
        return len(self.scale)

    @property
    def rows(self) -> int:
        return len(self.positions)

    @cached_property
    def index(self) -> tuple[Tensor, Tensor]:
        """The index of the requested positions in a tensor (rows, length, …)."""
        return torch.arange(self.rows, device=self.positions.device)[:, None], self.positions

    def rotate(self, features: Tensor, back: bool = False) -> Tensor:
        """(rows, length, 2, heads, width) with each pair of neighbours rotated by the angle of its position."""
        pairs = torch.view_as_complex(features.contiguous().view(*features.shape[:-1], -1, 2))
        rotations = self.rotations[:, None, None]
        return torch.view_as_real(pairs * (rotations.conj() if back else rotations)).view(features.shape)


class _Layer:
    """The frozen weights and the two passes of one layer. In both, tokens are (clients, rows · length / clients, d)."""

    def __init__(self, layer: Any, heads: int, order: Tensor, last: bool) -> None:
        first, second, mlp = layer.input_layernorm, layer.post_attention_layernorm, layer.mlp
        q, k, v, self._out = (base.weight.detach() for base in _projections(layer))
        self._scale, self._eps = first.weight.detach(), first.variance_epsilon
        self._qkv = torch.cat((q, k, v))[order] * self._scale  # (3 d, d)
        gate_up = torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight))
        self._gate_up, self._down = gate_up.detach() * second.weight.detach(), mlp.down_proj.weight.detach()
        self._heads, self._order, self._last = heads, order, last

    def forward(self, x: Tensor, factors: Sequence[Tensor], batch: _Batch, trains: bool) -> tuple[Tensor, Tensors]:
        """(the output of the layer, the tensors that its backward pass needs)."""
        aq, bq, ak, bk, av, bv, ao, bo = factors
        down, up = torch.cat((aq, ak, av), dim=1) * self._scale, _block_diagonal((bq, bk, bv))[:, self._order] * batch.scale
        up_out = bo * batch.scale
        qkv, out = torch.baddbmm(self._qkv, up, down), torch.baddbmm(self._out, up_out, ao)
        normed, inverse = _norm(x, self._eps)
        projected = torch.bmm(normed, qkv.transpose(1, 2)).view(batch.rows, batch.length, 3, self._heads, -1)
        rotated = batch.rotate(projected[:, :, :2])
        queries, mask = rotated[:, :, 0], None
        if self._last:
            queries = queries[batch.index]
            x = x.view(batch.rows, batch.length, -1)[batch.index].view(batch.clients, -1, x.shape[-1])
            mask = (torch.arange(batch.length, device=x.device) <= batch.positions[:, :, None])[:, None]
        q, k, v = (t.transpose(1, 2).requires_grad_(trains) for t in (queries, rotated[:, :, 1], projected[:, :, 2]))
        with torch.set_grad_enabled(trains):  # autograd's backward pass of the attention is already fast
            heads = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not self._last)
        mixed = heads.detach().transpose(1, 2).reshape(x.shape)
        after = torch.baddbmm(x, mixed, out.transpose(1, 2))
        normed_2, inverse_2 = _norm(after, self._eps)
        gate, raised = functional.linear(normed_2, self._gate_up).chunk(2, dim=-1)
        silu = functional.silu(gate)
        result = after + functional.linear(silu * raised, self._down)
        kept = {
            "down": down, "up": up, "ao": ao, "up_out": up_out, "qkv": qkv, "out": out, "normed": normed, "inverse": inverse,
            "q": q, "k": k, "v": v, "heads": heads, "mixed": mixed,
            "normed_2": normed_2, "inverse_2": inverse_2, "gate": gate, "raised": raised, "silu": silu,
        }  # fmt: skip
        return result, kept if trains else {}

    def backward(self, grad: Tensor, kept: Tensors, batch: _Batch, first: bool) -> tuple[Tensor, list[Tensor]]:
        """(gradient of the layer's input, gradients of its factors). The input gradient of the `first` layer is not used."""
        grad = grad + self._feedforward_backward(grad, kept)
        middle = torch.bmm(grad, kept["up_out"])
        dao = torch.bmm(middle.transpose(1, 2), kept["mixed"])
        dbo = _outer(grad, kept["mixed"], kept["ao"]) * batch.scale
        dqkv = self._attention_backward(torch.bmm(grad, kept["out"]), kept, batch)
        middle = torch.bmm(dqkv, kept["up"])
        ddown = torch.bmm(middle.transpose(1, 2), kept["normed"]) * self._scale
        dup = torch.empty_like(kept["up"])
        dup[:, self._order] = _outer(dqkv, kept["normed"], kept["down"]) * batch.scale
        r, d = ddown.shape[1] // 3, dup.shape[1] // 3
        factors = []
        for i in range(3):  # of the gradient of the block-diagonal B, only the diagonal blocks belong to a factor
            factors += [ddown[:, i * r : (i + 1) * r], dup[:, i * d : (i + 1) * d, i * r : (i + 1) * r]]
        factors += [dao, dbo]
        if first:
            return grad, factors
        before = _norm_backward(torch.bmm(dqkv, kept["qkv"]), kept["normed"], kept["inverse"])
        if self._last:
            rows = before.view(batch.rows, batch.length, -1)
            rows.index_put_(batch.index, grad.view(batch.rows, -1, grad.shape[-1]), accumulate=True)
        else:
            before += grad
        return before, factors

    def _feedforward_backward(self, grad: Tensor, kept: Tensors) -> Tensor:
        inner = torch.matmul(grad, self._down)
        both = inner.new_empty(*inner.shape[:-1], 2 * inner.shape[-1])
        dgate, draised = both.chunk(2, dim=-1)
        torch.mul(inner, kept["silu"], out=draised)
        dgate.copy_(torch.ops.aten.silu_backward(inner.mul_(kept["raised"]), kept["gate"]))
        return _norm_backward(torch.matmul(both, self._gate_up), kept["normed_2"], kept["inverse_2"])

    def _attention_backward(self, dmixed: Tensor, kept: Tensors, batch: _Batch) -> Tensor:
        """The gradients of queries, keys and values, concatenated: (clients, rows · length / clients, 3 d)."""
        dheads = dmixed.view(batch.rows, -1, self._heads, kept["q"].shape[-1]).transpose(1, 2)
        gradients = torch.autograd.grad(kept["heads"], (kept["q"], kept["k"], kept["v"]), dheads)
        dq, dk, dv = (gradient.transpose(1, 2) for gradient in gradients)
        if self._last:
            dq = torch.zeros_like(dk).index_put_(batch.index, dq, accumulate=True)
        dqkv = dk.new_empty(batch.rows, batch.length, 3, *dk.shape[2:])
        dqkv[:, :, :2] = batch.rotate(torch.stack((dq, dk), dim=2), back=True)
        dqkv[:, :, 2] = dv
        return dqkv.view(batch.clients, -1, dqkv[0, 0].numel())


class _Layers(torch.autograd.Function):
    """All layers as one autograd function."""

    @staticmethod
    def forward(ctx: Any, layers: Sequence[_Layer], batch: _Batch, embedded: Tensor, *factors: Tensor) -> Tensor:
        x = embedded.view(batch.clients, -1, embedded.shape[-1])
        keeps = any(ctx.needs_input_grad) and not batch.checkpointing
        ctx.layers, ctx.batch, ctx.factors, ctx.kept = layers, batch, factors, []
        for i, layer in enumerate(layers):
            result, kept = layer.forward(x, factors[FACTORS * i : FACTORS * (i + 1)], batch, keeps)
            ctx.kept.append({"input": x} if batch.checkpointing else kept)
            x = result
        return x.view(batch.rows, -1, x.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad = grads[0].reshape(ctx.batch.clients, -1, grads[0].shape[-1])
        gradients: list[Tensor] = []
        for i in reversed(range(len(ctx.layers))):
            kept = ctx.kept.pop()
            if ctx.batch.checkpointing:
                used = ctx.factors[FACTORS * i : FACTORS * (i + 1)]
                kept = ctx.layers[i].forward(kept["input"], used, ctx.batch, trains=True)[1]
            grad, factors = ctx.layers[i].backward(grad, kept, ctx.batch, first=i == 0)
            gradients = factors + gradients
        return (None, None, None, *gradients)


def _norm(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x divided by its root mean square, the reciprocal of that root mean square)."""
    inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return x * inverse, inverse


def _norm_backward(grad: Tensor, normed: Tensor, inverse: Tensor) -> Tensor:
    """inverse · (grad − normed · mean(grad · normed))."""
    mean = (grad * normed).mean(dim=-1, keepdim=True)
    return torch.addcmul(grad, normed, mean, value=-1).mul_(inverse)


def _outer(grad: Tensor, x: Tensor, down: Tensor) -> Tensor:
    """Σ grad ⊗ A x over tokens: (clients, d_out, r)."""
    return torch.bmm(grad.transpose(1, 2), torch.bmm(x, down.transpose(1, 2)))


def _block_diagonal(blocks: Sequence[Tensor]) -> Tensor:
    """The block-diagonal matrix (clients, Σ d_out, Σ r) of blocks (clients, d_out, r) of equal r."""
    parts = [functional.pad(b, (i * b.shape[2], (len(blocks) - 1 - i) * b.shape[2])) for i, b in enumerate(blocks)]
    return torch.cat(parts, dim=1)
