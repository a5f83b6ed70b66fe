"""Compressed updates: wrappers around any algorithm that reduce the size of a client's upload.

The change of the adapter since the server sent it, Δ_k = w_k − w, is compressed; other groups (control variates, step counts)
are sent unchanged. The server restores w + Δ̂_k before it aggregates.

int8    Δ̂ = s q with s = max|Δ| / 127 for each tensor and q = ⌊Δ / s + u⌋, u uniform in [0, 1): E[Δ̂] = Δ. QSGD's stochastic
        rounding (Alistarh et al. 2017, 1610.02132).
top-k   the k = ⌈share · n⌉ entries of largest absolute value of each tensor, with error feedback: the client remembers the
        entries that were left out and adds them to its next change (Stich et al. 2018, 1809.07599; Karimireddy et al. 2019,
        1901.09847).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from fedmllm.algorithms.base import Algorithm, LocalResult, RoundInfo, Update, Wrapper, compressions
from fedmllm.rng import stream
from fedmllm.tensors import State, Tensors, add, subtract, zeros_like

Packed = State
Pack = Callable[[Tensors, int, RoundInfo], Packed]
"""(changes, client, info) -> packed groups, whose shapes depend on the shapes of the changes, the client and the info alone."""
Unpack = Callable[[Packed, Tensors], Tensors]
"""(packed groups, tensors of the shapes to restore) -> changes. Raises ValueError for invalid groups."""


def compressed(algorithm: Algorithm, pack: Pack, unpack: Unpack, feedback: bool) -> Algorithm:
    """`algorithm` with its uploaded adapter packed by `pack`. With `feedback`, each client adds what the packing lost to its
    next change. Raises ValueError if the algorithm packs its updates itself."""
    if algorithm.packed:
        raise ValueError("its clients send chosen parts of their changes, which are packed already; leave the compression out")

    def finish(result: LocalResult, received: State, memory: State, info: RoundInfo) -> tuple[State, State]:
        residual = memory.get("residual", {})
        upload, remembered = algorithm.finish(result, received, {g: t for g, t in memory.items() if g != "residual"}, info)
        change = {name: tensor - received["adapter"][name] for name, tensor in upload["adapter"].items()}
        if feedback:
            change = {name: tensor + residual[name] if name in residual else tensor for name, tensor in change.items()}
        packed = pack(change, info.me.client, info)
        if feedback:
            lost = subtract(change, unpack(packed, change))
            remembered = {**remembered, "residual": {**residual, **lost}}
        return {**{g: t for g, t in upload.items() if g != "adapter"}, **packed}, remembered

    def restored(update: Update, state: State, info: RoundInfo) -> Update:
        if "adapter" in update.groups:  # it is restored already
            return update
        shapes = algorithm.uploads(state, update.client, info)
        sent = algorithm.message(state, update.client, info)["adapter"]
        change = unpack(update.groups, shapes["adapter"])
        groups = {g: update.groups[g] for g in shapes if g != "adapter"}
        return replace(update, groups={**groups, "adapter": add({n: sent[n] for n in change}, change)})

    def aggregate(state: State, updates: Sequence[Update], info: RoundInfo) -> State:
        return algorithm.aggregate(state, [restored(update, state, info) for update in updates], info)

    def uploads(state: State, client: int, info: RoundInfo) -> State:
        shapes = algorithm.uploads(state, client, info)
        return {**{g: t for g, t in shapes.items() if g != "adapter"}, **pack(zeros_like(shapes["adapter"]), client, info)}

    def refuse(update: Update, state: State, info: RoundInfo) -> str | None:
        try:
            uncompressed = restored(update, state, info)
        except ValueError as error:
            return str(error)
        for name, tensor in sorted(uncompressed.groups["adapter"].items()):
            if not bool(torch.isfinite(tensor).all()):
                return f"NaN or infinity in {name!r} after decompression"
        return algorithm.refuse(uncompressed, state, info)

    return replace(
        algorithm, finish=finish, aggregate=aggregate, uploads=uploads, refuse=refuse, restored=restored, packed=True
    )


@compressions.register("int8")
def int8() -> Wrapper:
    """One byte per number: one scale per tensor and stochastic rounding, unbiased (1610.02132)."""

    def pack(change: Tensors, client: int, info: RoundInfo) -> Packed:
        codes: Tensors = {}
        steps: Tensors = {}
        for name, tensor in sorted(change.items()):
            step = tensor.abs().max() / 127
            codes[name] = torch.zeros_like(tensor, dtype=torch.int8)
            if step > 0:  # in `uploads`, which asks for the shapes alone, all numbers are 0
                noise = stream(info.seed, "int8", client, info.round, name).random(tuple(tensor.shape), dtype="float32")
                codes[name] = (tensor / step + torch.from_numpy(noise)).floor().clamp(-127, 127).to(torch.int8)
            steps[name] = step.reshape(1)
        return {"int8": codes, "step": steps}

    def unpack(packed: Packed, shapes: Tensors) -> Tensors:
        return {name: packed["int8"][name].to(t.dtype) * packed["step"][name] for name, t in shapes.items()}

    return lambda algorithm: compressed(algorithm, pack, unpack, feedback=False)


@compressions.register("top-k")
def top_k(*, share: float = 0.1, feedback: bool = True) -> Wrapper:
    """The largest entries of each tensor; the others are remembered and sent later (1809.07599)."""
    if not 0 < share <= 1:
        raise ValueError(f"share = {share} must be above 0 and at most 1")

    def pack(change: Tensors, client: int, info: RoundInfo) -> Packed:
        places: Tensors = {}
        values: Tensors = {}
        for name, tensor in change.items():
            flat, count = tensor.flatten(), max(1, math.ceil(share * tensor.numel()))
            # A stable sort, because torch.topk breaks ties arbitrarily.
            largest = torch.argsort(flat.abs(), descending=True, stable=True)[:count].sort().values
            places[name], values[name] = largest.to(torch.int32), flat[largest]
        return {"places": places, "values": values}

    def unpack(packed: Packed, shapes: Tensors) -> Tensors:
        change: Tensors = {}
        for name, shape in shapes.items():
            places = packed["places"][name].long()
            if bool((places < 0).any()) or bool((places >= shape.numel()).any()) or bool((places.diff() <= 0).any()):
                raise ValueError(f"the places of {name!r} are not increasing numbers below {shape.numel()}")
            flat = torch.zeros(shape.numel(), dtype=shape.dtype)
            flat[places] = packed["values"][name]
            change[name] = flat.view(shape.shape)
        return change

    def wrap(algorithm: Algorithm) -> Algorithm:
        if feedback and algorithm.refactors:
            raise ValueError(
                "error feedback adds last round's remainder to this round's change, but the server computes new factors "
                "between them; set feedback = false or use int8"
            )
        return compressed(algorithm, pack, unpack, feedback)

    return wrap
