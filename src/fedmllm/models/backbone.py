"""Load a model by name and determine the properties that the other modules need."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText

from fedmllm.config import ModelTable
from fedmllm.data.files import EntryError
from fedmllm.data.prompts import Conversation
from fedmllm.errors import ConfigError
from fedmllm.models.families import Family, family_of
from fedmllm.models.features import digest_of
from fedmllm.models.placement import check_on_gpus, device_map
from fedmllm.models.processors import load_processor
from fedmllm.models.quantized import quantization
from fedmllm.models.shipped import source_of
from fedmllm.tensors import digest

_PROBE = "@@answer@@"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen model with its processor. Inputs go to `device`, where its embeddings are. `end_ids` end the assistant's turn;
    `answer_frame` is the text that the chat template puts before and after an answer."""

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
        """The user's turn as the chat template formats it, up to the beginning of the answer."""
        messages = conversation.messages()
        text: str = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return text

    def process(self, prompt: str, images: Sequence[Image.Image]) -> dict[str, Any]:
        """The processor's output: `input_ids` (1, tokens), the inputs for the pictures, and others that depend on the family.

        Raises EntryError for pictures that the processor refuses.
        """
        begin, text_prompt = self.tokenizer.bos_token, self.family.text_prompt
        if not images and text_prompt is not None:
            text = text_prompt.format(begin=begin or "", prompt=prompt)
            options: dict[str, Any] = {"return_token_type_ids": True, "add_special_tokens": False}
            return dict(self.tokenizer([text], return_tensors="pt", **options))
        options = {"images": [list(images)]} if images else {}
        if begin and prompt.startswith(begin):  # the template has already written the begin-of-text token
            options["add_special_tokens"] = False
        try:
            return dict(self.processor(text=[prompt], return_tensors="pt", **options))
        except Exception as error:  # processors raise many types of errors, and to a text alone none has an objection
            if not images:
                raise
            sizes, reason = " and ".join(f"{i.width} × {i.height}" for i in images), " ".join(str(error).split())
            subject, other = ("a picture", "it") if len(images) == 1 else (f"{len(images)} pictures", "them or show fewer")
            what = f"the model's processor refuses {subject} of {sizes} pixels ({reason}); resize {other}"
            raise EntryError(what, "picture the model refuses") from error

    @property
    def takes_features(self) -> bool:
        """Whether `forward` accepts the vision tower's output instead of pixels."""
        accepts = "mm_encoder_outputs" in inspect.signature(self.model.forward).parameters
        return accepts and self.family.cache

    def vision_digest(self) -> str:
        """A digest of the weights outside the text model's layers, the processor's settings and the precision."""
        named = self.model.named_parameters()
        weights = {name: p.detach() for name, p in named if self.family.layer_of(name) is None}
        return digest_of([digest(weights), self.processor.to_json_string(), str(self.dtype)])


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ConfigError(f'model.device = {name!r} is not available on this machine; use "auto" or "cpu".') from None
    return device


def pick_dtype(precision: str, device: torch.device, width: int) -> torch.dtype:
    """The data type for `model.precision`. "auto" is decided by hardware features, not by a timing, so that runs repeat.

    "auto" is bfloat16 on a GPU that supports it, and on a CPU with bfloat16 dot products if the text model is at least 512
    wide; in narrower models, conversions around norms and the float32 adapter cost as much as the products gain.
    """
    if precision != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        fast = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
        return torch.bfloat16 if fast and width >= 512 else torch.float32
    return torch.float32


def load_backbone(settings: ModelTable) -> Backbone:
    """Load the model. Raises ConfigError if it does not exist, accepts no pictures, or needs what the settings do not allow."""
    source = source_of(settings.name)
    device = _device(settings.device)
    trust = settings.trust_remote_code
    if trust:
        _log.warning("model.trust_remote_code = true: code from the repository of %s will run on this machine.", settings.name)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust)
        dtype = pick_dtype(settings.precision, device, config.get_text_config().hidden_size)
        placed = quantization(settings, device) or device_map(settings, device)
        processor = load_processor(source, config, trust)
        model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, trust_remote_code=trust, **placed)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _cannot_load(settings, error) from None
    check_on_gpus(settings, model)
    model = model if placed else model.to(device)
    model.requires_grad_(False)
    model.eval()
    family = family_of(model.config.model_type)
    processor.chat_template = processor.chat_template or processor.tokenizer.chat_template or family.template
    if processor.chat_template is None:
        raise ConfigError(
            f"model.name = {settings.name!r} has no chat template, so it cannot answer prompts; choose its instruct version."
        )
    return Backbone(
        model=model,
        processor=processor,
        family=family,
        device=model.get_input_embeddings().weight.device,
        dtype=dtype,
        end_ids=_end_ids(settings, model, processor),
        answer_frame=_answer_frame(processor),
    )


def _end_ids(settings: ModelTable, model: Any, processor: Any) -> tuple[int, ...]:
    ids = model.generation_config.eos_token_id
    ids = ids if ids is not None else processor.tokenizer.eos_token_id
    if ids is None:
        raise ConfigError(
            f"model.name = {settings.name!r} has no end-of-turn token; set eos_token_id in its generation config."
        )
    return tuple(ids) if isinstance(ids, list | tuple) else (ids,)


def _cannot_load(settings: ModelTable, error: Exception) -> ConfigError:
    if "trust_remote_code" in str(error):
        return ConfigError(
            f"model.name = {settings.name!r} requires code from its repository; "
            "read that code and set model.trust_remote_code = true to run it."
        )
    reason = " ".join(str(error).split())[:200].rstrip(".")
    return ConfigError(
        f"model.name = {settings.name!r} cannot be loaded as an image-text-to-text model ({reason}); "
        'set it to "pocket", a Hugging Face id, or a folder that contains a model.'
    )


def _answer_frame(processor: Any) -> tuple[str, str]:
    question = Conversation("question", "", image=False).messages()
    answered = [*question, {"role": "assistant", "content": [{"type": "text", "text": _PROBE}]}]
    prompt = processor.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    conversation = processor.apply_chat_template(answered, tokenize=False)
    if not conversation.startswith(prompt) or _PROBE not in conversation:
        return "", ""  # the template formats prompts and past turns differently: the answer follows the prompt directly
    before, _, after = conversation[len(prompt) :].partition(_PROBE)
    return before, after
