"""A judge for open answers: a language model says whether an answer means the same as the reference.

Off unless the experiment file names one. Prompts, replies and verdicts are stored. A reply that cannot be read, or none, is a
failure: counted, and never a correct answer. An endpoint sees question, reference and answer, nothing else.
"""

from __future__ import annotations

import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedmllm.errors import RunError
from fedmllm.evaluation.predictions import Prediction
from fedmllm.registry import Registry

Judge = Callable[[str], str]
"""prompt -> reply. Raises RunError where there is none."""

judges: Registry[Judge | None] = Registry("judge", __name__)

_PROMPT = """You grade answers to questions.
Question: {question}
Reference answer: {reference}
Given answer: {given}
Does the given answer mean the same as the reference answer? Reply with one word, yes or no."""
_GIVE_UP = 3


@dataclass(frozen=True)
class Judgement:
    """One asked question; `verdict` is None where the reply could not be read or there was none."""

    prompt: str
    reply: str
    verdict: bool | None


def read_verdict(reply: str) -> bool | None:
    """True for a reply whose first word is yes, False for no, None for anything else."""
    word = re.match(r"\W*(\w+)", reply.lower())
    return {"yes": True, "no": False}.get(word.group(1)) if word else None


class JudgeCache:
    """Asks a judge about each distinct (question, reference, answer) once, and no more after three failures in a row."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self._known: dict[str, Judgement] = {}
        self._in_a_row = 0

    def judge(self, predictions: Sequence[Prediction], questions: dict[str, str]) -> list[Prediction]:
        """The predictions with `judged` set on the open ones; `questions` are the samples' by id."""
        return [p if p.closed else replace(p, judged=self._ask(p, questions[p.id]).verdict) for p in predictions]

    def _ask(self, prediction: Prediction, question: str) -> Judgement:
        prompt = _PROMPT.format(question=question, reference=prediction.answer, given=prediction.predicted)
        if prompt not in self._known:
            self._known[prompt] = self._reply(prompt)
        return self._known[prompt]

    def _reply(self, prompt: str) -> Judgement:
        if self._in_a_row >= _GIVE_UP:
            return Judgement(prompt, f"not asked: the judge failed {_GIVE_UP} times in a row", None)
        try:
            reply = self._judge(prompt)
        except RunError as error:
            self._in_a_row += 1
            return Judgement(prompt, f"no reply: {error}", None)
        self._in_a_row = 0
        return Judgement(prompt, reply, read_verdict(reply))

    def judgements(self) -> list[dict[str, Any]]:
        return [{"prompt": j.prompt, "reply": j.reply, "verdict": j.verdict} for j in self._known.values()]


@judges.register("none")
def none() -> None:
    """No judge: open answers are compared with the reference word by word."""


@judges.register("openai")
def openai(
    *, endpoint: str, model: str, key_variable: str = "OPENAI_API_KEY", timeout_seconds: float = 30.0, retries: int = 2
) -> Judge:
    """Any server with OpenAI's chat completions, at `endpoint` + "/chat/completions"; the key is read from a variable."""
    if not endpoint.startswith(("http://", "https://")):
        raise ValueError(f"endpoint = {endpoint!r} must begin with http:// or https://")
    if not timeout_seconds > 0 or retries < 0:
        raise ValueError(f"timeout_seconds = {timeout_seconds} must be above 0 and retries = {retries} not negative")

    def ask(prompt: str) -> str:
        body = {"model": model, "temperature": 0, "max_tokens": 8, "messages": [{"role": "user", "content": prompt}]}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(key_variable):
            headers["Authorization"] = f"Bearer {key}"
        url = endpoint.rstrip("/") + "/chat/completions"
        reason: object = None
        for _ in range(retries + 1):
            request = urllib.request.Request(url, json.dumps(body).encode(), headers)
            try:
                with urllib.request.urlopen(request, timeout=timeout_seconds) as response:
                    return str(json.loads(response.read())["choices"][0]["message"]["content"])
            except urllib.error.HTTPError as error:
                reason = error
                error.close()  # it holds the connection
                if error.code < 500 and error.code != 429:  # asking again would not help
                    break
            except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
                reason = error
        raise RunError(f"judge: {url} gave no usable answer ({type(reason).__name__}: {reason})")

    return ask


@judges.register("local")
def local(*, model: str, device: str = "cpu") -> Judge:
    """A causal language model of transformers, by id or folder: yes or no, whichever is more probable."""
    loaded: list[tuple[Any, Any]] = []

    def ask(prompt: str) -> str:
        import torch

        if not loaded:
            loaded.append(_load_causal(model, device))
        network, tokenizer = loaded[0]
        if tokenizer.chat_template:
            message = [{"role": "user", "content": prompt}]
            prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt, return_tensors="pt").input_ids.to(device)
        # The words as they stand after the prompt: their first tokens with and without a space.
        starts = {w: {tokenizer(s + w, add_special_tokens=False).input_ids[0] for s in ("", " ")} for w in ("yes", "no")}
        with torch.no_grad():
            logits = network(ids).logits[0, -1].float()
        best = {
            word: max(float(logits[i]) for i in starts[word] - starts[other]) for word, other in (("yes", "no"), ("no", "yes"))
        }
        return max(best, key=lambda word: best[word])

    return ask


def _load_causal(model: str, device: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        return AutoModelForCausalLM.from_pretrained(model).to(device).eval(), AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RunError(f"judge.model = {model!r} cannot be loaded as a causal language model ({reason})") from None
