"""One class over transformers' AutoModelForImageTextToText and AutoProcessor: load, encode, loss, scores, generate.

All work that does not depend on the adapter is done once: prompts are tokenised once, pictures go through the frozen vision
tower once, and the text model is asked for logits at answer positions only.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedmllm.algorithms import AdapterInfo
from fedmllm.config import ModelTable
from fedmllm.data.images import Picture
from fedmllm.data.prompts import Conversation
from fedmllm.errors import DataError
from fedmllm.models import fused_llama as lean
from fedmllm.models import lora
from fedmllm.models.backbone import Backbone, load_backbone
from fedmllm.models.encoded import Encoded
from fedmllm.models.fused_llama import FusedLlama
from fedmllm.models.pictures import Pictures
from fedmllm.models.scoring import option_scores
from fedmllm.models.stack import Stack
from fedmllm.models.tokens import Tokens
from fedmllm.models.virtual import VirtualTokens
from fedmllm.tensors import Tensors


class MLLM:
    """A frozen model with one adapter, and the pictures it has met."""

    def __init__(self, backbone: Backbone, settings: ModelTable, seed: int) -> None:
        self.backbone = backbone
        self.settings = settings
        self.model = lora.attach(backbone.model, settings, backbone.family, seed)
        found = {name: backbone.family.layer_of(name) for name in lora.tensor_names(self.model)}
        self.info = AdapterInfo(
            layers=int(backbone.model.config.get_text_config().num_hidden_layers),
            layer={name: layer for name, layer in found.items() if layer is not None},
            alpha=settings.lora.alpha,
            rank_stabilised=settings.adapter.kind == "rslora",
        )
        self.adapter = lora.Adapter(self.model, self.info)
        vectors = self.adapter.parameters.get(lora.VIRTUAL)
        self._virtual = VirtualTokens(backbone.model.get_input_embeddings(), vectors) if vectors is not None else None
        trains_text_only = found.keys() <= self.info.layer.keys() | {lora.VIRTUAL}
        self.caches = settings.cache_features and backbone.takes_features and trains_text_only
        self._pictures = Pictures(backbone, self.caches)
        merges = backbone.family.first_position == 0 and hasattr(backbone.model.config, "image_token_id")
        self.lean = self.caches and merges and lean.fits(backbone.model.get_decoder(), self.adapter)
        """Whether stacked adapters are computed with by `FusedLlama`: the same numbers, faster on a CPU."""
        self._lean_text: tuple[Tensors, FusedLlama] | None = None
        self._tokens = Tokens(backbone, settings.trust_remote_code)
        self._parameters = set(inspect.signature(backbone.model.forward).parameters)

    @classmethod
    def load(cls, settings: ModelTable, seed: int) -> MLLM:
        """Raises ConfigError where the model cannot be found or is not of a supported kind."""
        return cls(load_backbone(settings), settings, seed)

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """The base model alone: what an adapter does before it is trained is not always nothing."""
        virtual, self._virtual = self._virtual, None
        try:
            with nullcontext() if virtual else self.model.disable_adapter():
                yield
        finally:
            self._virtual = virtual

    @contextmanager
    def stacked(self, adapters: Sequence[Tensors]) -> Iterator[None]:
        """Answer with several adapters at once: batches hold as many rows for each, one adapter after the other."""
        stack = Stack(self.adapter, adapters, list(self.adapter.parameters))
        with torch.no_grad(), stack.installed(len(adapters)):
            stack.begin([(0, 0)] * len(adapters))
            yield

    # Encoding

    def encode(self, conversations: Sequence[Conversation], images: Sequence[Picture | None], max_length: int) -> list[Encoded]:
        """Tokenise; `images[i]` is the picture of conversation `i` where it shows one.

        Raises DataError for a prompt of more than `max_length` tokens: cutting it could cut the picture or the question.
        """
        encoded = []
        for conversation, image in zip(conversations, images, strict=True):
            one = self._encode_one(conversation, image if conversation.image else None)
            length = one.length + (len(self._virtual.ids) if self._virtual else 0)
            if length > max_length:
                raise DataError(
                    f"a prompt has {length} tokens, more than train.max_length = {max_length} "
                    f"(it begins {conversation.user[:40]!r}); raise the limit or shorten the text."
                )
            encoded.append(one)
        return encoded

    def _encode_one(self, conversation: Conversation, image: Picture | None) -> Encoded:
        picture = self._pictures.number(image) if image is not None else None
        prompt = self._tokens.prompt(conversation, image, self._pictures.size(picture) if picture is not None else None)
        answer = self._tokens.answer
        options = tuple(answer(option) for option in conversation.options)
        return Encoded(prompt.ids, answer(conversation.answer), options, picture, prompt.tokenwise, prompt.imagewise)

    def meet(self, images: Iterable[Picture]) -> None:
        """Pictures that `prepare_features` is to make too, though nothing asks about them yet."""
        for image in images:
            self._pictures.number(image)

    def prepare_features(self) -> int:
        """Put every picture met so far through the vision tower, or find that an earlier experiment did; how many were made."""
        return self._pictures.prepare()

    # Batches

    def width(self, batch: Sequence[Encoded]) -> int:
        """Tokens of the batch's longest row, learned vectors of the prompt and answer included; 0 for none."""
        return max((one.length for one in batch), default=0) + (len(self._virtual.ids) if self._virtual else 0)

    def collate(self, batch: Sequence[Encoded], endings: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Model inputs for prompts followed by `endings`, padded on the left so that endings end together."""
        virtual = self._virtual.ids if self._virtual else ()
        rows = [(*virtual, *one.prompt, *ending) for one, ending in zip(batch, endings, strict=True)]
        length = max(map(len, rows))
        pad = self.backbone.pad_id
        ids = torch.tensor([[pad] * (length - len(row)) + list(row) for row in rows])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        family = self.backbone.family
        if family.first_position is not None:
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0) + family.first_position
        for key in {k for one in batch for k in one.tokenwise} & self._parameters:
            values = []
            for one, row, ending in zip(batch, rows, endings, strict=True):
                before = [0] * (length - len(row) + len(virtual))
                prompt = one.tokenwise.get(key, (0,) * len(one.prompt))
                values.append([*before, *prompt, *[family.answer_type] * len(ending)])
            inputs[key] = torch.tensor(values)
        pictured = [one for one in batch if one.picture is not None]
        for key in {k for one in pictured for k in one.imagewise if k in self._parameters}:
            inputs[key] = torch.cat([one.imagewise[key] for one in pictured])
        inputs = {key: value.to(self.backbone.device) for key, value in inputs.items()}
        if pictured:
            inputs |= self._pictures.inputs([one.picture for one in pictured if one.picture is not None])
        return inputs

    def only_last(self, last: int) -> dict[str, int]:
        """What asks the text model for the logits of the last positions alone, where it can be asked."""
        return {"logits_to_keep": last} if "logits_to_keep" in self._parameters else {}

    def last_logits(self, batch: Sequence[Encoded], endings: Sequence[Sequence[int]], last: int) -> Tensor:
        """Logits of the last `last` positions of prompts followed by `endings`, (rows, last, vocabulary) in float32.

        Where a row is shorter than that, the first ones mean nothing.
        """
        stack = self.adapter.beside
        if stack is not None and self.lean and not stack.drops:
            return self._lean_logits(stack, batch, endings, last)
        logits = self.backbone.model(**self.collate(batch, endings), use_cache=False, **self.only_last(last)).logits
        wanted: Tensor = logits[:, -last:].float()
        return wanted

    def _lean_logits(self, stack: Stack, batch: Sequence[Encoded], endings: Sequence[Sequence[int]], last: int) -> Tensor:
        model, fold = self.backbone.model, self.adapter.fold
        if self._lean_text is None or self._lean_text[0] is not fold:
            self._lean_text = fold, FusedLlama(model.get_decoder(), self.adapter)
        rows = [(*one.prompt, *ending) for one, ending in zip(batch, endings, strict=True)]
        length, pad = max(map(len, rows)), self.backbone.pad_id
        ids = torch.tensor([[*row, *[pad] * (length - len(row))] for row in rows])
        with torch.no_grad():
            embedded = model.get_input_embeddings()(ids)
            if pictures := [one.picture for one in batch if one.picture is not None]:
                embedded[ids == model.config.image_token_id] = self._pictures.tokens(pictures)
        asked = torch.tensor([[max(0, len(row) - last + i) for i in range(last)] for row in rows])
        logits: Tensor = model.get_output_embeddings()(self._lean_text[1](embedded, stack.now, stack.scales, asked))
        return logits

    # What the model is asked

    def losses(self, batch: Sequence[Encoded]) -> Tensor:
        """(samples): the mean cross-entropy over each one's answer tokens, with gradient.

        Each sample weighs the same, so a batch of 8 and 8 accumulated batches of 1 have the same gradient.
        """
        answers = [one.answer for one in batch]
        longest = max(map(len, answers))
        logits = self.last_logits(batch, answers, longest + 1)[:, :-1]
        labels = torch.tensor([[-100] * (longest - len(a)) + list(a) for a in answers], device=logits.device)
        losses = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
        counts = torch.tensor([len(a) for a in answers], device=logits.device)
        return losses.view(labels.shape).sum(1) / counts

    def loss(self, batch: Sequence[Encoded]) -> Tensor:
        """The sum of `losses`, a scalar."""
        return self.losses(batch).sum()

    @torch.no_grad()
    def option_scores(self, batch: Sequence[Encoded], clients: int = 1) -> list[list[float]]:
        """For each closed question the log-probability of each option, normalised over the options."""
        return option_scores(self, batch, clients)

    @torch.no_grad()
    def generate(self, batch: Sequence[Encoded], max_new_tokens: int) -> list[str]:
        """Greedy answers, end mark and surrounding space removed."""
        inputs = self.collate(batch, [()] * len(batch))
        inputs.pop("position_ids", None)  # generation counts them from the mask itself
        made = self.backbone.model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=self.backbone.pad_id,
            eos_token_id=list(self.backbone.end_ids),
        )
        new = made[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.backbone.tokenizer.batch_decode(new, skip_special_tokens=True)]


__all__ = ["MLLM"]
