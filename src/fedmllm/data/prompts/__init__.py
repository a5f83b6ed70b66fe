"""A sample and what is visible of it, as one turn of a conversation, in the words of the prompt strategy.

The same strategy words training and evaluation. The question of a question-answering sample is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fedmllm.data.samples import LETTERS, Modality, Sample
from fedmllm.registry import Registry

DEFAULT_QUESTION = "which option is right?"

Strategy = Callable[[str, frozenset[Modality]], str]
"""(question, visible modalities) -> the question as it is asked."""

prompts: Registry[Strategy] = Registry("prompt", __name__)


@dataclass(frozen=True)
class Conversation:
    """`user` is the text of the user's turn; where `image`, the picture comes before it. `answer` is the assistant's turn.

    `options` are the answers of a closed question, worded as the assistant words them; empty for an open one.
    """

    user: str
    answer: str
    image: bool
    options: tuple[str, ...] = ()

    def messages(self) -> list[dict[str, object]]:
        """The user's turn for `apply_chat_template`."""
        content: list[dict[str, str]] = [{"type": "image"}] if self.image else []
        return [{"role": "user", "content": [*content, {"type": "text", "text": self.user}]}]


def worded(sample: Sample, answer: str) -> str:
    """An answer as the assistant says it: "(B) hateful" for a lettered sample, else the bare answer."""
    if sample.lettered and sample.choices and answer in sample.choices:
        return f"({LETTERS[sample.choices.index(answer)]}) {answer}"
    return answer


def render(sample: Sample, visible: frozenset[Modality], strategy: Strategy) -> Conversation:
    """The conversation for `sample` when only `visible` of it may be seen."""
    shown = visible & sample.modalities
    lines = []
    if "text" in shown and sample.text is not None:
        lines.append(f"Text: {sample.text}" if sample.lettered else sample.text)
    if sample.lettered and sample.choices:
        lines.append(strategy(sample.question or DEFAULT_QUESTION, shown))
        lines += [f"({LETTERS[i]}) {choice}" for i, choice in enumerate(sample.choices)]
        lines.append("Answer with the letter of the right option.")
    elif sample.question:
        lines.append(sample.question)
    options = tuple(worded(sample, choice) for choice in sample.choices or ())
    return Conversation("\n".join(lines), worded(sample, sample.answer), "image" in shown, options)
