"""modality-specific: name the modalities that the sample has."""

from __future__ import annotations

from fedmllm.data.prompts import Strategy, prompts
from fedmllm.data.samples import Modality


@prompts.register("modality-specific")
def modality_specific() -> Strategy:
    """The question names the modalities that are there: "Based on the image, …"."""

    def ask(question: str, visible: frozenset[Modality]) -> str:
        named = " and ".join(f"the {modality}" for modality in sorted(visible))
        return f"Based on {named}, {question}" if named else question

    return ask
