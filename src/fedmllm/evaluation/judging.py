"""Grade open answers with a judge, such as a language model: does an answer mean the same as the reference?

Only used if the experiment file names a judge. Prompts, replies and verdicts are stored. An unreadable or missing reply counts
as a failure, never as a correct answer. The judge receives the question, the reference and the answer, nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from fedmllm.errors import RunError
from fedmllm.evaluation.judges import Judge
from fedmllm.evaluation.predictions import Prediction

_PROMPT = """You grade answers to questions.
Question: {question}
Reference answer: {reference}
Given answer: {given}
Does the given answer mean the same as the reference answer? Reply with one word, yes or no."""
_MAX_FAILURES = 3


@dataclass(frozen=True)
class Judgement:
    """One row of `judgements.jsonl`. `verdict` is None if the reply was unreadable or missing."""

    prompt: str
    reply: str
    verdict: bool | None


def read_verdict(reply: str) -> bool | None:
    """True for a reply whose first word is yes, False for no, None for anything else."""
    word = re.match(r"\W*(\w+)", reply.lower())
    return {"yes": True, "no": False}.get(word.group(1)) if word else None


class JudgeCache:
    """Sends each distinct (question, reference, answer) to the judge once, and stops after three failures in a row."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self._judgements: dict[str, Judgement] = {}
        self._failures_in_a_row = 0

    def judge(self, predictions: Sequence[Prediction], questions: dict[str, str]) -> list[Prediction]:
        """The predictions with `judged` set on the open ones; `questions` maps a sample's id to its question."""
        return [p if p.closed else replace(p, judged=self._verdict(p, questions[p.id])) for p in predictions]

    def _verdict(self, prediction: Prediction, question: str) -> bool | None:
        prompt = _PROMPT.format(question=question, reference=prediction.answer, given=prediction.predicted)
        if prompt not in self._judgements:
            self._judgements[prompt] = self._ask(prompt)
        return self._judgements[prompt].verdict

    def _ask(self, prompt: str) -> Judgement:
        if self._failures_in_a_row >= _MAX_FAILURES:
            return Judgement(prompt, f"not asked: the judge failed {_MAX_FAILURES} times in a row", None)
        try:
            reply = self._judge(prompt)
        except RunError as error:
            self._failures_in_a_row += 1
            return Judgement(prompt, f"no reply: {error}", None)
        self._failures_in_a_row = 0
        return Judgement(prompt, reply, read_verdict(reply))

    def judgements(self) -> list[dict[str, Any]]:
        """The rows of `judgements.jsonl`."""
        return [asdict(judgement) for judgement in self._judgements.values()]
