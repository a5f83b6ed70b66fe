"""Attach an adapter to a frozen model by PEFT."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, PromptTuningConfig, PromptTuningInit, get_peft_model

from fedmllm.config import ModelTable
from fedmllm.errors import ConfigError
from fedmllm.models.core import insert_cores
from fedmllm.models.families import Family
from fedmllm.rng import seed_for


def peft_config(settings: ModelTable, family: Family) -> PeftConfig:
    """PEFT's configuration of the adapter that the settings describe."""
    kind, lora = settings.adapter.kind, settings.lora
    if kind == "prompt-tuning":
        # Start from vectors of the vocabulary: random vectors are much longer than those and drown out the prompt.
        start = PromptTuningInit.SAMPLE_VOCAB
        return PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=settings.adapter.virtual_tokens, prompt_tuning_init=start
        )
    if kind == "ia3":
        return IA3Config(target_modules=family.ia3_target, feedforward_modules=family.ia3_feedforward)
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target or family.target,
        bias="none",
        use_rslora=kind == "rslora",
        use_dora=kind == "dora",
    )


def attach(model: Any, settings: ModelTable, family: Family, seed: int) -> PeftModel:
    """Wrap `model` with an adapter whose initial values depend only on `seed`. Raises ConfigError if no module matches."""
    config = peft_config(settings, family)
    with torch.random.fork_rng(), warnings.catch_warnings():
        # A deprecation inside PEFT is hidden, and PEFT's warning about tied weights is raised.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        warnings.filterwarnings("error", message=".*tie_word_embeddings.*", category=UserWarning)
        torch.manual_seed(seed_for(seed, "adapter"))
        try:
            adapted = get_peft_model(model, config).eval()  # PEFT's dropout would otherwise act during evaluation
            if settings.adapter.kind == "lora-xs":
                insert_cores(adapted, settings.lora.rank, settings.lora.target)
            return adapted
        except UserWarning:  # a fold would change both layers at once, and a merged head would differ from the trained one
            raise ConfigError(
                f"model.lora.target = {settings.lora.target!r} matches the embedding or the head, which share one weight in "
                "this model; let it match other layers only."
            ) from None
        except ValueError as error:
            reason = str(error).partition(". ")[0]
            kind, target = settings.adapter.kind, settings.lora.target
            if target:
                raise ConfigError(f"model.lora.target = {target!r} matches no module of the model ({reason}).") from None
            raise ConfigError(
                f"model.adapter.kind = {kind!r} finds no module to adapt in this model ({reason}); set model.lora.target to a "
                "regular expression over its module names."
            ) from None
