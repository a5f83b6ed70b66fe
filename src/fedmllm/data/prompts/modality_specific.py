"""modality-specific: the question names the visible modalities."""

from __future__ import annotations

from fedmllm.data.prompts import Strategy, Wording, prompts, published_wording
from fedmllm.data.samples import Modality


@prompts.register("modality-specific")
def modality_specific(*, wording: Wording = "short") -> Strategy:
    """The question names the visible modalities: "Based on the image, …"."""

    def short(question: str, visible: frozenset[Modality]) -> str:
        named = " and ".join(f"the {modality}" for modality in sorted(visible))
        return f"Based on {named}, {question}" if named else question

    def published(question: str, visible: frozenset[Modality]) -> str:
        named = " and ".join(sorted(visible, reverse=True))
        return published_wording(question, f" based on the {named}" if named else "")

    return published if wording == "published" else short
