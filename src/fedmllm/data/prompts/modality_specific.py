"""modality-specific: the question names the visible modalities."""

from __future__ import annotations

from fedmllm.data.prompts import Strategy, prompts
from fedmllm.data.samples import Modality


@prompts.register("modality-specific")
def modality_specific() -> Strategy:
    """The question names the visible modalities: "Based on the image, …"."""

    def strategy(question: str, visible: frozenset[Modality]) -> str:
        named = " and ".join(f"the {modality}" for modality in sorted(visible))
        return f"Based on {named}, {question}" if named else question

    return strategy
