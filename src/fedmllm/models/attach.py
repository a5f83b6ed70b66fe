"""Attach an adapter to a frozen model by PEFT."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, PromptTuningConfig, PromptTuningInit, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from fedmllm.config import ModelTable
from fedmllm.errors import ConfigError
from fedmllm.models.core import insert_cores
from fedmllm.models.families import Family
from fedmllm.models.targets import target_modules, whole_modules
from fedmllm.rng import seed_for


def peft_config(model: Any, settings: ModelTable, family: Family) -> PeftConfig:
    """PEFT's configuration of the adapter that the settings describe. Raises ConfigError for a part that the model lacks."""
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
        target_modules=target_modules(model, lora.target, family),
        modules_to_save=whole_modules(model, family) if lora.whole == "projector" else None,
        bias="none",
        use_rslora=kind == "rslora",
        use_dora=kind == "dora",
    )


def attach(model: Any, settings: ModelTable, family: Family, seed: int) -> PeftModel:
    """Wrap `model` with an adapter whose initial values depend only on `seed`. Raises ConfigError if no module matches."""
    config = peft_config(model, settings, family)
    with torch.random.fork_rng(), warnings.catch_warnings():
        # A deprecation inside PEFT is hidden, and PEFT's warning about tied weights is raised.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        warnings.filterwarnings("error", message=".*tie_word_embeddings.*", category=UserWarning)
        torch.manual_seed(seed_for(seed, "adapter"))
        try:
            adapted = get_peft_model(model, config).eval()  # PEFT's dropout would otherwise act during evaluation
            if settings.adapter.kind == "lora-xs":
                insert_cores(adapted, settings.lora.rank, settings.lora.target)
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
    for module in adapted.modules():
        if isinstance(module, ModulesToSaveWrapper):
            _train_in_float32(module.modules_to_save["default"])
    return adapted


def _train_in_float32(module: nn.Module) -> None:
    """Keep the weights of a module in float32, as PEFT keeps those of adapters, in a model of another precision: a step of
    1/1000 of a bfloat16 weight would be rounded away."""
    dtype = next(module.parameters()).dtype
    if dtype == torch.float32:
        return

    def cast(value: Any, to: torch.dtype) -> Any:
        if isinstance(value, Tensor):
            return value.to(to) if value.is_floating_point() else value
        return type(value)(cast(entry, to) for entry in value) if isinstance(value, list | tuple) else value

    module.float()
    module.register_forward_pre_hook(
        lambda _, inputs, named: (
            cast(inputs, torch.float32),
            {key: cast(value, torch.float32) for key, value in named.items()},
        ),
        with_kwargs=True,
    )
    module.register_forward_hook(lambda _, inputs, output: cast(output, dtype))
