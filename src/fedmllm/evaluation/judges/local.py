"""A causal language model that is loaded in this process on the first prompt."""

from __future__ import annotations

from functools import cache
from typing import Any

from fedmllm.errors import RunError
from fedmllm.evaluation.judges import Judge, judges


@judges.register("local")
def local(*, model: str, device: str = "cpu") -> Judge:
    """A causal language model of transformers, by id or folder: yes or no, whichever is more probable."""
    load = cache(lambda: _load_causal(model, device))

    def ask(prompt: str) -> str:
        import torch

        network, tokenizer, sample_text = load()
        prompt, cut = sample_text.cut(prompt)
        if tokenizer.chat_template:
            message = [{"role": "user", "content": prompt}]
            prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        prompt_ids = (sample_text.processor if cut else tokenizer)(prompt).input_ids
        ids = torch.tensor([[token for _, token in sample_text.restore(prompt_ids, cut)]]).to(device)
        # Whether a word needs a space before it depends on the end of the prompt: both first tokens are considered.
        starts = {w: {tokenizer(s + w, add_special_tokens=False).input_ids[0] for s in ("", " ")} for w in ("yes", "no")}
        with torch.no_grad():
            logits = network(ids).logits[0, -1].float()
        best = {
            word: max(float(logits[i]) for i in starts[word] - starts[other]) for word, other in (("yes", "no"), ("no", "yes"))
        }
        return max(best, key=lambda word: best[word])

    return ask


def _load_causal(model: str, device: str) -> tuple[Any, Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fedmllm.models.sample_text import SampleText

    try:
        network, tokenizer = AutoModelForCausalLM.from_pretrained(model).to(device).eval(), AutoTokenizer.from_pretrained(model)
        return network, tokenizer, SampleText(tokenizer, str(tokenizer.chat_template))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RunError(f"judge.model = {model!r} cannot be loaded as a causal language model ({reason})") from None
