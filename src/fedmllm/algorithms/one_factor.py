"""Methods that train or send one LoRA factor at a time, so that averaging the factors averages the products.

FFA-LoRA   Sun et al. 2024, "Improving LoRA in Privacy-preserving Federated Learning" (2403.12313).
           A stays at its shared initial value; B is trained, sent and averaged: mean(B_k) A = mean(B_k A).
RoLoRA     Chen et al. 2025, "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA" (2502.01755).
           Even rounds train, send and average B with A fixed, odd rounds train A with B fixed.
FedSA-LoRA Guo et al. 2025, "Selective Aggregation for Low-Rank Adaptation in Federated Learning" (2410.01463).
           Both are trained; A is sent and averaged, and B_k stays with its client.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from fedmllm.algorithms.base import Algorithm, LocalResult, LocalRule, RoundInfo, Update, algorithms, groups
from fedmllm.algorithms.factors import A, B, half, lora_state
from fedmllm.algorithms.fedavg import Weighting, mean_adapter
from fedmllm.tensors import State, clone


def _one_factor(suffix_of: Callable[[RoundInfo], str], weighting: Weighting) -> Algorithm:
    """Train, send and average the factor whose names end with `suffix_of(info)`."""

    def aggregate(state: State, updates: Sequence[Update], info: RoundInfo) -> State:
        return {**state, "adapter": {**state["adapter"], **mean_adapter(updates, weighting)}}

    def rule(received: State, memory: State, info: RoundInfo) -> LocalRule:
        return LocalRule(trainable=lambda name: name.endswith(suffix_of(info)))

    def finish(result: LocalResult, received: State, memory: State, info: RoundInfo) -> tuple[State, State]:
        return {"adapter": clone(half(result.trained, suffix_of(info)))}, {}

    def only(state: State, client: int, info: RoundInfo) -> State:
        return {"adapter": half(state["adapter"], suffix_of(info))}

    return Algorithm(lora_state, aggregate, rule, finish, message=only, uploads=only, needs_lora=True, averages=weighting)


@algorithms.register("ffa-lora")
def ffa_lora(*, weighting: Weighting = "examples") -> Algorithm:
    """Freeze A at its initial value; train, send and average B alone (2403.12313)."""
    return _one_factor(lambda info: B, weighting)


@algorithms.register("rolora")
def rolora(*, weighting: Weighting = "examples") -> Algorithm:
    """Train and send B in even rounds and A in odd ones (2502.01755)."""
    alternating = _one_factor(lambda info: A if info.round % 2 else B, weighting)
    # Both factors are sent down: a client that was not sampled last round lacks the factor that changed then.
    return replace(alternating, message=groups("adapter"))


@algorithms.register("fedsa-lora")
def fedsa_lora(*, weighting: Weighting = "examples") -> Algorithm:
    """Average A; every client keeps its own B, and so has its own model (2410.01463)."""

    def finish(result: LocalResult, received: State, memory: State, info: RoundInfo) -> tuple[State, State]:
        return {"adapter": clone(half(result.trained, A))}, {"adapter": clone(half(result.trained, B))}

    return replace(
        _one_factor(lambda info: A, weighting), rule=lambda received, memory, info: LocalRule(), finish=finish, personal=True
    )
