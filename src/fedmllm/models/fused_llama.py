"""A frozen Llama text model under stacked LoRA, forward and backward written out: the same numbers in fewer passes over memory.

On a CPU a small model spends more time between its matrix products than in them. Here a layer is some thirty operations
instead of a hundred:

- W + s B A is made once a pass (Hu 2021, arXiv 2106.09685, section 4.1), so that products with an adapter cost nothing more.
  Gradients of A and B still go through the r-wide middle, never through a gradient of W.
- The scale of a norm is multiplied into the frozen weights behind it.
- Rows are filled up on the right, where a causal model needs no mask.
- The last layer is computed at the positions that are asked for alone: nothing else reads it.
- Positions rotate as complex numbers: the two features of a head that turn together are put side by side by ordering the
  rows of W_q and W_k alike, which changes no product of a query and a key.
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

from fedmllm.models.lora import Adapter
from fedmllm.tensors import Tensors

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
FACTORS = 2 * len(PROJECTIONS)
"""Tensors of a layer's adapter: A and B of each projection."""


def fits(text: Any, adapter: Adapter) -> bool:
    """Whether `text` is a Llama in float32 on a CPU of the kind that is written out here, with plain LoRA on q, k, v and o of
    all its layers and nowhere else."""
    if not isinstance(text, LlamaModel) or not adapter.stacks:
        return False
    config, weight = text.config, text.embed_tokens.weight
    plain = not config.attention_bias and not config.mlp_bias and config.hidden_act == "silu"
    plain &= config.num_key_value_heads == config.num_attention_heads and config.rope_parameters["rope_type"] == "default"
    adapted = {id(base) for base, _, _ in adapter.pairs()}
    whole = adapted == {id(base) for layer in text.layers for base in _bases(layer)}
    return bool(plain and whole and weight.device.type == "cpu" and weight.dtype == torch.float32)


def _bases(layer: Any) -> list[Any]:
    """The frozen q, k, v, o of a layer, behind PEFT's layers where those are."""
    found = (getattr(layer.self_attn, name) for name in PROJECTIONS)
    return [getattr(one, "base_layer", one) for one in found]


class FusedLlama:
    """The text model under adapters of several clients. The weights are read when it is made: a fold asks for a new one."""

    def __init__(self, text: Any, adapter: Adapter) -> None:
        heads, width = text.config.num_attention_heads, text.config.head_dim
        half = torch.arange(width // 2)
        pairs = torch.stack((half, half + width // 2), dim=1).flatten()
        both = torch.cat([pairs + h * width for h in range(2 * heads)])  # the heads of q and of k
        order = torch.cat((both, torch.arange(len(both), 3 * heads * width)))
        self.layers = [_Layer(layer, heads, order, layer is text.layers[-1]) for layer in text.layers]
        self._norm, self._frequencies = text.norm, text.rotary_emb.inv_freq.float()
        names = {id(base): (a, b) for base, a, b in adapter.pairs()}
        self._names = [name for layer in text.layers for base in _bases(layer) for name in names[id(base)]]

    def __call__(self, embedded: Tensor, adapters: Tensors, scales: Tensor, asked: Tensor) -> Tensor:
        """The hidden states behind the last norm at the positions asked for: (rows, n, d).

        `embedded`: (rows, length, d), client by client; `adapters`: A (clients, r, d_in), B (clients, d_out, r) by name;
        `scales`: (clients); `asked`: (rows, n).
        """
        angle = torch.arange(embedded.shape[1]).float()[:, None] * self._frequencies
        batch = _Batch(asked, embedded.shape[1], scales.view(-1, 1, 1), torch.polar(torch.ones_like(angle), angle))
        given = [adapters[name] for name in self._names]
        hidden = _Layers.apply(self.layers, batch, embedded, *given)  # type: ignore[no-untyped-call]
        normed: Tensor = self._norm(hidden)
        return normed


@dataclass(frozen=True)
class _Batch:
    """`asked`: (rows, n); `scale`: (clients, 1, 1); `turns`: (length, width / 2), e^(i t θ)."""

    asked: Tensor
    length: int
    scale: Tensor
    turns: Tensor

    @property
    def clients(self) -> int:
        return len(self.scale)

    @property
    def rows(self) -> int:
        return len(self.asked)

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """Indices of the positions asked for."""
        return torch.arange(self.rows)[:, None], self.asked

    def turn(self, features: Tensor, back: bool = False) -> Tensor:
        """(rows, length, 2, heads, width) with neighbours turned by their position's angle."""
        pairs = torch.view_as_complex(features.contiguous().view(*features.shape[:-1], -1, 2))
        turns = self.turns[:, None, None]
        return torch.view_as_real(pairs * (turns.conj() if back else turns)).view(features.shape)


class _Layer:
    """One layer's frozen weights and its two passes. In those, tokens are (clients, rows · length / clients, d)."""

    def __init__(self, layer: Any, heads: int, order: Tensor, last: bool) -> None:
        first, second, mlp = layer.input_layernorm, layer.post_attention_layernorm, layer.mlp
        q, k, v, self._out = (base.weight.detach() for base in _bases(layer))
        self._scale, self._eps = first.weight.detach(), first.variance_epsilon
        self._qkv = torch.cat((q, k, v))[order] * self._scale  # (3 d, d)
        gate_up = torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight))
        self._gate_up, self._down = gate_up.detach() * second.weight.detach(), mlp.down_proj.weight.detach()
        self._heads, self._order, self._last = heads, order, last

    def forward(self, x: Tensor, factors: Sequence[Tensor], batch: _Batch, learns: bool) -> tuple[Tensor, Tensors]:
        """(what the layer gives, what its backward pass needs)."""
        aq, bq, ak, bk, av, bv, ao, bo = factors
        down, up = torch.cat((aq, ak, av), dim=1) * self._scale, _block_diagonal((bq, bk, bv))[:, self._order] * batch.scale
        up_out = bo * batch.scale
        qkv, out = torch.baddbmm(self._qkv, up, down), torch.baddbmm(self._out, up_out, ao)
        normed, inverse = _norm(x, self._eps)
        made = torch.bmm(normed, qkv.transpose(1, 2)).view(batch.rows, batch.length, 3, self._heads, -1)
        turned = batch.turn(made[:, :, :2])
        queries, mask = turned[:, :, 0], None
        if self._last:
            queries, x = queries[batch.places], self._apart(x, batch)[batch.places].view(batch.clients, -1, x.shape[-1])
            mask = (torch.arange(batch.length) <= batch.asked[:, :, None])[:, None]
        q, k, v = (t.transpose(1, 2).requires_grad_(learns) for t in (queries, turned[:, :, 1], made[:, :, 2]))
        with torch.set_grad_enabled(learns):  # the attention's own backward pass is as good as any
            heads = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not self._last)
        mixed = heads.detach().transpose(1, 2).reshape(x.shape)
        after = torch.baddbmm(x, mixed, out.transpose(1, 2))
        normed_2, inverse_2 = _norm(after, self._eps)
        gate, lift = functional.linear(normed_2, self._gate_up).chunk(2, dim=-1)
        silu = functional.silu(gate)
        result = after + functional.linear(silu * lift, self._down)
        kept = {
            "down": down, "up": up, "ao": ao, "up_out": up_out, "qkv": qkv, "out": out, "normed": normed, "inverse": inverse,
            "q": q, "k": k, "v": v, "heads": heads, "mixed": mixed,
            "normed_2": normed_2, "inverse_2": inverse_2, "gate": gate, "lift": lift, "silu": silu,
        }  # fmt: skip
        return result, kept if learns else {}

    def backward(self, grad: Tensor, kept: Tensors, batch: _Batch, first: bool) -> tuple[Tensor, list[Tensor]]:
        """(gradient of what the layer was given, of its factors). Nothing asks for the former of the `first` layer."""
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
        for i in range(3):  # of B's gradient the blocks on the diagonal; the others are nobody's
            factors += [ddown[:, i * r : (i + 1) * r], dup[:, i * d : (i + 1) * d, i * r : (i + 1) * r]]
        factors += [dao, dbo]
        if first:
            return grad, factors
        before = _norm_backward(torch.bmm(dqkv, kept["qkv"]), kept["normed"], kept["inverse"])
        if self._last:
            self._apart(before, batch).index_put_(batch.places, grad.view(batch.rows, -1, grad.shape[-1]), accumulate=True)
        else:
            before += grad
        return before, factors

    def _feedforward_backward(self, grad: Tensor, kept: Tensors) -> Tensor:
        inner = torch.matmul(grad, self._down)
        both = torch.empty(*inner.shape[:-1], 2 * inner.shape[-1])
        dgate, dlift = both.chunk(2, dim=-1)
        torch.mul(inner, kept["silu"], out=dlift)
        dgate.copy_(torch.ops.aten.silu_backward(inner.mul_(kept["lift"]), kept["gate"]))
        return _norm_backward(torch.matmul(both, self._gate_up), kept["normed_2"], kept["inverse_2"])

    def _attention_backward(self, dmixed: Tensor, kept: Tensors, batch: _Batch) -> Tensor:
        """The gradient of queries, keys and values side by side: (clients, rows · length / clients, 3 d)."""
        dheads = dmixed.view(batch.rows, -1, self._heads, kept["q"].shape[-1]).transpose(1, 2)
        found = torch.autograd.grad(kept["heads"], (kept["q"], kept["k"], kept["v"]), dheads)
        dq, dk, dv = (one.transpose(1, 2) for one in found)
        if self._last:
            dq = torch.zeros_like(dk).index_put_(batch.places, dq, accumulate=True)
        made = torch.empty(batch.rows, batch.length, 3, *dk.shape[2:])
        made[:, :, :2] = batch.turn(torch.stack((dq, dk), dim=2), back=True)
        made[:, :, 2] = dv
        return made.view(batch.clients, -1, made[0, 0].numel())

    def _apart(self, x: Tensor, batch: _Batch) -> Tensor:
        """(rows, length, d)."""
        return x.view(batch.rows, batch.length, x.shape[-1])


class _Layers(torch.autograd.Function):
    """All layers as one step of autograd."""

    @staticmethod
    def forward(ctx: Any, layers: Sequence[_Layer], batch: _Batch, embedded: Tensor, *factors: Tensor) -> Tensor:
        x = embedded.view(batch.clients, -1, embedded.shape[-1])
        ctx.layers, ctx.batch, ctx.kept = layers, batch, []
        for i, layer in enumerate(layers):
            x, kept = layer.forward(x, factors[FACTORS * i : FACTORS * (i + 1)], batch, any(ctx.needs_input_grad))
            ctx.kept.append(kept)
        return x.view(batch.rows, -1, x.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad = grads[0].reshape(ctx.batch.clients, -1, grads[0].shape[-1])
        found: list[Tensor] = []
        for i in reversed(range(len(ctx.layers))):
            grad, factors = ctx.layers[i].backward(grad, ctx.kept.pop(), ctx.batch, first=i == 0)
            found = factors + found
        return (None, None, None, *found)


def _norm(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x over its root mean square, one over that)."""
    inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return x * inverse, inverse


def _norm_backward(grad: Tensor, normed: Tensor, inverse: Tensor) -> Tensor:
    """inverse · (grad − normed · mean(grad · normed))."""
    mean = (grad * normed).mean(dim=-1, keepdim=True)
    return torch.addcmul(grad, normed, mean, value=-1).mul_(inverse)


def _outer(grad: Tensor, x: Tensor, down: Tensor) -> Tensor:
    """The sum over tokens of grad ⊗ A x: (clients, d_out, r)."""
    return torch.bmm(grad.transpose(1, 2), torch.bmm(x, down.transpose(1, 2)))


def _block_diagonal(blocks: Sequence[Tensor]) -> Tensor:
    """(clients, Σ d_out, Σ r) of three of (clients, d_out, r), the same r."""
    parts = [functional.pad(b, (i * b.shape[2], (len(blocks) - 1 - i) * b.shape[2])) for i, b in enumerate(blocks)]
    return torch.cat(parts, dim=1)
