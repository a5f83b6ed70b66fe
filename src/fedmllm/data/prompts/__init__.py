"""Prompt strategies: how a sample and its visible modalities become one turn of a conversation. One file per strategy.

The same strategy is used in training and evaluation. It rewords only the question of a sample with lettered choices; other
questions are left unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from fedmllm.data.samples import LETTERS, Modality, Sample
from fedmllm.registry import Registry

DEFAULT_QUESTION = "which option is right?"

Strategy = Callable[[str, frozenset[Modality]], str]
"""(question, visible modalities) -> the question in the prompt."""

Wording = Literal["short", "published"]
"""Where a strategy puts its clause: before the question, or as the published code does (see `published_wording`)."""

prompts: Registry[Strategy] = Registry("prompt", __name__)


def published_wording(question: str, clause: str) -> str:
    """The wording of FedMLLM's code, with the clause at the end of an instruction and of the question.

    Its prompts begin with the instruction, and have the text between it and the question; here it follows the text.
    """
    stem = question.rstrip("?.")
    instruction = f"Select the best answer to the following multiple-choice question{clause}."
    return f"{instruction}\n{stem}{clause}{question[len(stem) :]}"


@dataclass(frozen=True)
class Conversation:
    """A user's turn and the assistant's answer."""

    user: str
    """The text of the user's turn."""
    answer: str
    image: int
    """How many pictures are placed before the user's text."""
    options: tuple[str, ...] = ()
    """The possible answers of a closed question, worded like `answer`; empty for an open question."""
    text: bool = False
    """Whether the text modality is part of `user`."""

    def messages(self) -> list[dict[str, object]]:
        """The user's turn for `apply_chat_template`."""
        content: list[dict[str, str]] = [{"type": "image"}] * self.image
        return [{"role": "user", "content": [*content, {"type": "text", "text": self.user}]}]


@lru_cache(1 << 12)  # a data set has few different lists of choices
def lettered(choices: tuple[str, ...]) -> dict[str, str]:
    """choice -> the choice as the assistant words it if the prompt gives it a letter: "hateful" -> "(B) hateful"."""
    return {choice: f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False)}


def render(sample: Sample, visible: frozenset[Modality], strategy: Strategy) -> Conversation:
    """The conversation for `sample` if only the modalities in `visible` may be shown."""
    shown, choices = visible & sample.modalities, sample.choices or ()
    worded = lettered(choices) if sample.lettered else {}
    lines = []
    if "text" in shown and sample.text is not None:
        lines.append(f"Text: {sample.text}" if sample.lettered else sample.text)
    if worded:
        lines += [strategy(sample.question or DEFAULT_QUESTION, shown), *worded.values()]
        lines.append("Answer with the letter of the right option.")
    elif sample.question:
        lines.append(sample.question)
    answer = worded.get(sample.answer, sample.answer)
    pictures = len(sample.pictures) if "image" in shown else 0
    return Conversation("\n".join(lines), answer, pictures, tuple(worded.values()) or choices, "text" in shown)
