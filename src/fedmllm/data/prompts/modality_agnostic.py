"""modality-agnostic: the prompt strategy of FedMLLM (2411.14717)."""

from __future__ import annotations

from fedmllm.data.prompts import Strategy, prompts


@prompts.register("modality-agnostic")
def modality_agnostic() -> Strategy:
    """The paper's strategy: one wording for every pattern, "Without considering the modality, …" (2411.14717)."""
    return lambda question, visible: f"Without considering the modality, {question}"
