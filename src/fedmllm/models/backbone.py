"""Loading a model by name, and the facts about it that everything else asks for."""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText

from fedmllm.config import ModelTable
from fedmllm.data.prompts import Conversation
from fedmllm.errors import ConfigError
from fedmllm.models.families import Family, family_of
from fedmllm.models.features import digest_of
from fedmllm.models.processors import load_processor
from fedmllm.models.quantized import quantization
from fedmllm.tensors import digest

POCKET = Path(__file__).parent / "pocket" / "weights"
_PROBE = "@@answer@@"
_log = logging.getLogger(__name__)


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

    def prompt(self, conversation: Conversation) -> str:
        """What the chat template makes of the user's turn, up to where the answer begins."""
        messages = conversation.messages()
        text: str = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return text

    def process(self, prompt: str, image: Image.Image | None) -> dict[str, Any]:
        """Tokenised, with the picture's inputs: `input_ids` (1, tokens) and whatever else the family's processor makes."""
        begin, text_prompt = self.tokenizer.bos_token, self.family.text_prompt
        if image is None and text_prompt is not None:
            written = text_prompt.format(begin=begin or "", prompt=prompt)
            asked = {"return_tensors": "pt", "return_token_type_ids": True, "add_special_tokens": False}
            return dict(self.tokenizer([written], **asked))
        options: dict[str, Any] = {"images": [[image]]} if image is not None else {}
        if begin and prompt.startswith(begin):  # a template that writes the begin mark must not get a second one
            options["add_special_tokens"] = False
        return dict(self.processor(text=[prompt], return_tensors="pt", **options))

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
    """Raises ConfigError where there is no such model, it takes no pictures, or it needs what the settings do not allow."""
    source = str(POCKET) if settings.name == "pocket" else settings.name
    device = _device(settings.device)
    trust = settings.trust_remote_code
    if trust:
        _log.warning("model.trust_remote_code = true: code from the repository of %s will run on this machine.", settings.name)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust)
        dtype = pick_dtype(settings.precision, device, config.get_text_config().hidden_size)
        placed = quantization(settings, device)
        processor = load_processor(source, config, trust)
        model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, trust_remote_code=trust, **placed)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _cannot_load(settings, error) from None
    model = model if placed else model.to(device)
    model.requires_grad_(False)
    model.eval()
    ends = model.generation_config.eos_token_id
    ends = ends if ends is not None else processor.tokenizer.eos_token_id
    if ends is None:
        raise ConfigError(
            f"model.name = {settings.name!r} names no end-of-turn token; set eos_token_id in its generation config."
        )
    family = family_of(model.config.model_type)
    processor.chat_template = processor.chat_template or processor.tokenizer.chat_template or family.template
    if processor.chat_template is None:
        raise ConfigError(
            f"model.name = {settings.name!r} has no chat template, so it cannot be asked anything; choose its instruct version."
        )
    return Backbone(
        model=model,
        processor=processor,
        family=family,
        device=device,
        dtype=dtype,
        end_ids=tuple(ends) if isinstance(ends, list | tuple) else (ends,),
        answer_frame=_answer_frame(processor),
    )


def _cannot_load(settings: ModelTable, error: Exception) -> ConfigError:
    if "trust_remote_code" in str(error):
        return ConfigError(
            f"model.name = {settings.name!r} needs code from its repository; "
            "read that code and set model.trust_remote_code = true to run it."
        )
    reason = " ".join(str(error).split())[:200].rstrip(".")
    return ConfigError(
        f"model.name = {settings.name!r} cannot be loaded as an image-text-to-text model ({reason}); "
        'give "pocket", a Hugging Face id, or a folder that holds one.'
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
