"""modality-agnostic: the prompt strategy of FedMLLM (2411.14717)."""

from __future__ import annotations

from fedmllm.data.prompts import Strategy, Wording, prompts, published_wording


@prompts.register("modality-agnostic")
def modality_agnostic(*, wording: Wording = "short") -> Strategy:
    """The paper's strategy: one wording for every pattern, "Without considering the modality, …" (2411.14717)."""
    if wording == "published":
        return lambda question, visible: published_wording(question, ", without considering the modality")
    return lambda question, visible: f"Without considering the modality, {question}"
