"""Loading a model by name, and the facts about it that everything else asks for."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from fedmllm.config import ModelTable
from fedmllm.data.prompts import Conversation
from fedmllm.errors import ConfigError
from fedmllm.models.families import Family, family_of
from fedmllm.models.features import digest_of
from fedmllm.tensors import digest

POCKET = Path(__file__).parent / "pocket" / "weights"
_PROBE = "@@answer@@"


@dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen model with its processor. `end_ids` end the assistant's turn; `answer_frame` is what the chat template puts
    before and after an answer."""

    model: Any
    processor: Any
    family: Family
    device: torch.device
    dtype: torch.dtype
    end_ids: tuple[int, ...]
    answer_frame: tuple[str, str]

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.end_ids[0])

    @property
    def takes_features(self) -> bool:
        """Whether the vision tower's output can be handed back to `forward`."""
        takes = "mm_encoder_outputs" in inspect.signature(self.model.forward).parameters
        return takes and self.family.cache

    def vision_digest(self) -> str:
        """Changes with any weight outside the text model's layers, the processor's settings, and the precision."""
        named = self.model.named_parameters()
        weights = {name: p.detach() for name, p in named if self.family.layer_of(name) is None}
        return digest_of([digest(weights), self.processor.to_json_string(), str(self.dtype)])


def _device(wanted: str) -> torch.device:
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ConfigError(f'model.device = {wanted!r} is not there on this machine; use "auto" or "cpu".') from None
    return device


def pick_dtype(precision: str, device: torch.device, width: int) -> torch.dtype:
    """bfloat16 where "auto" expects it to be faster, by what the hardware has and not by a timing, so that runs repeat.

    On a GPU that has it; on a CPU with bfloat16 dot products, for text models at least 512 wide: below that the
    conversions around norms and the float32 adapter cost what the products gain.
    """
    if precision != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if device.type == "cpu":
        has = torch.cpu.get_capabilities()
        quick = bool(has.get("avx512_bf16") or has.get("amx_bf16"))
        return torch.bfloat16 if quick and width >= 512 else torch.float32
    return torch.float32


def load_backbone(settings: ModelTable) -> Backbone:
    """Raises ConfigError where there is no such model, or it takes no pictures."""
    source = str(POCKET) if settings.name == "pocket" else settings.name
    device = _device(settings.device)
    try:
        config = AutoConfig.from_pretrained(source)
        dtype = pick_dtype(settings.precision, device, config.get_text_config().hidden_size)
        processor = AutoProcessor.from_pretrained(source)
        model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype).to(device)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise ConfigError(
            f"model.name = {settings.name!r} cannot be loaded as an image-text-to-text model ({reason}); "
            'give "pocket", a Hugging Face id, or a folder that holds one.'
        ) from None
    model.requires_grad_(False)
    model.eval()
    ends = model.generation_config.eos_token_id
    ends = ends if ends is not None else processor.tokenizer.eos_token_id
    if ends is None:
        raise ConfigError(
            f"model.name = {settings.name!r} names no end-of-turn token; set eos_token_id in its generation config."
        )
    return Backbone(
        model=model,
        processor=processor,
        family=family_of(model.config.model_type),
        device=device,
        dtype=dtype,
        end_ids=tuple(ends) if isinstance(ends, list | tuple) else (ends,),
        answer_frame=_answer_frame(processor),
    )


def _answer_frame(processor: Any) -> tuple[str, str]:
    asked = Conversation("question", "", image=False).messages()
    answered = [*asked, {"role": "assistant", "content": [{"type": "text", "text": _PROBE}]}]
    prompt = processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    whole = processor.apply_chat_template(answered, tokenize=False)
    if not whole.startswith(prompt) or _PROBE not in whole:
        return "", ""  # templates that prompt differently than they record: the answer follows the prompt directly
    before, _, after = whole[len(prompt) :].partition(_PROBE)
    return before, after
