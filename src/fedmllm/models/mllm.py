"""One class over transformers' AutoModelForImageTextToText and AutoProcessor: load, encode, loss, logits, generate.

Work that does not depend on the adapter is done once: prompts are tokenised once, pictures pass through the frozen vision
tower once, and the text model computes logits at answer positions only.
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
from fedmllm.data.files import EntryError
from fedmllm.data.images import Images, Picture, pictures_of
from fedmllm.data.prompts import Conversation
from fedmllm.models import features, fused_llama
from fedmllm.models.adapter import VIRTUAL, Adapter, adapter_parameters
from fedmllm.models.attach import attach
from fedmllm.models.backbone import Backbone, load_backbone
from fedmllm.models.encoded import Encoded
from fedmllm.models.fused_llama import FusedLlama
from fedmllm.models.halving import Limits
from fedmllm.models.pictures import Pictures
from fedmllm.models.stack import Stack
from fedmllm.models.tokens import Tokens
from fedmllm.models.virtual import VirtualTokens
from fedmllm.progress import ProgressCallback, no_progress
from fedmllm.tensors import Tensors


class MLLM:
    """A frozen model with one adapter, and the pictures that were encoded or registered so far."""

    def __init__(self, backbone: Backbone, settings: ModelTable, seed: int) -> None:
        self.backbone = backbone
        self.settings = settings
        self.model = attach(backbone.model, settings, backbone.family, seed)
        layers = {name: backbone.family.layer_of(name) for name in adapter_parameters(self.model)}
        self.info = AdapterInfo(
            layers=int(backbone.model.config.get_text_config().num_hidden_layers),
            layer={name: layer for name, layer in layers.items() if layer is not None},
            alpha=settings.lora.alpha,
            rank_stabilised=settings.adapter.kind == "rslora",
            modality={name: "image" for name in layers if backbone.family.part_of(name) != "text"},
            part=backbone.family.part_of,
            principal=lambda: self.adapter.principal,
            basis=lambda: self.adapter.basis,
        )
        self.adapter = Adapter(self.model, self.info)
        vectors = self.adapter.parameters.get(VIRTUAL)
        self._virtual = VirtualTokens(backbone.model.get_input_embeddings(), vectors) if vectors is not None else None
        trains_text_only = layers.keys() <= self.info.layer.keys() | {VIRTUAL}
        self.caches = settings.cache_features and backbone.takes_features and trains_text_only
        self.limits = Limits()
        self.progress: ProgressCallback = no_progress
        """Called at every step of training and at every batch of questions and pictures."""
        self.pictures = Pictures(backbone, self.caches, self.limits)
        merges = backbone.family.first_position == 0 and hasattr(backbone.model.config, "image_token_id")
        self.fused = self.caches and merges and fused_llama.supports(backbone.model.get_decoder(), self.adapter)
        """Whether `FusedLlama` computes with stacked adapters: the same numbers, faster on a CPU."""
        self._fused_text: tuple[Tensors, FusedLlama] | None = None
        self._stack: Stack | None = None
        self._tokens = Tokens(backbone, settings.trust_remote_code)
        self._parameters = set(inspect.signature(backbone.model.forward).parameters)

    @classmethod
    def load(cls, settings: ModelTable, seed: int) -> MLLM:
        """Load the model and attach the adapter. Raises ConfigError if the model cannot be found or is not supported."""
        return cls(load_backbone(settings), settings, seed)

    # Which adapter the model computes with

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Use the base model alone. An untrained adapter may already change it, as the vectors of prompt tuning do."""
        virtual, self._virtual = self._virtual, None
        try:
            with nullcontext() if virtual else self.model.disable_adapter():
                yield
        finally:
            self._virtual = virtual

    @contextmanager
    def using(self, stack: Stack, clients: int) -> Iterator[None]:
        """Compute with the adapters of the first `clients` rows of `stack`. Call `stack.begin` before each batch."""
        with stack.installed(clients):
            self._stack = stack
            try:
                yield
            finally:
                self._stack = None

    @contextmanager
    def stacked(self, adapters: Sequence[Tensors]) -> Iterator[None]:
        """Compute with several adapters at once. Batches have equally many rows per adapter, one adapter after another."""
        stack = Stack(self.adapter, adapters, list(self.adapter.parameters))
        with torch.no_grad(), self.using(stack, len(adapters)):
            stack.begin([(0, 0)] * len(adapters))
            yield

    # Encoding

    def encode(self, conversations: Sequence[Conversation], images: Sequence[Images | None], max_length: int) -> list[Encoded]:
        """Tokenise; `images[i]` is what conversation `i` shows. Raises EntryError as `encode_one` does."""
        return [self.encode_one(talk, image, max_length) for talk, image in zip(conversations, images, strict=True)]

    def encode_one(self, conversation: Conversation, images: Images | None, max_length: int, asks: bool = False) -> Encoded:
        """Tokenise one conversation. If it `asks`, its options are put to the model, and its answer, a reference, never is.

        Raises EntryError for pictures that the processor refuses, for more of them than the family can show, and if the prompt
        and what follows it have more than `max_length` tokens: cutting could cut a picture or the question.
        """
        shown = pictures_of(images) if conversation.image else ()
        if len(shown) > 1 and (reason := self.backbone.family.one_picture):
            what = f"the sample has {len(shown)} pictures, and the model can be shown one"
            raise EntryError(f"{what} ({reason}); keep one, or change model.name", "picture the model refuses")
        numbers = self.pictures.numbers(shown)
        prompt = self._tokens.prompt(conversation, shown, tuple(map(self.pictures.size, numbers)))
        options = tuple(self._tokens.answer(option) for option in conversation.options)
        answer = () if asks else self._tokens.answer(conversation.answer)
        encoded = Encoded(prompt.ids, answer, options, numbers, prompt.tokenwise, prompt.imagewise, conversation.text)
        length = self.width([encoded]) + (max(map(len, options), default=0) if asks else 0)
        if length > max_length:
            many = f", and it shows {len(shown)} pictures; show fewer of them," if len(shown) > 1 else ";"
            raise EntryError(
                f"a prompt has {length} tokens, more than train.max_length = {max_length} "
                f"(it begins {conversation.user[:40]!r}{many} raise the limit or shorten the text)", "prompt too long"
            )  # fmt: skip
        return encoded

    def check_one(self, conversation: Conversation, images: Images | None, max_length: int) -> int:
        """A number of tokens that the encoded conversation does not exceed, without tokenising one that is short enough by its
        letters. Raises EntryError as `encode_one` does."""
        shown = pictures_of(images) if conversation.image else ()
        sizes = tuple(map(self.pictures.size, self.pictures.numbers(shown)))
        most = self._tokens.at_most(conversation, shown, sizes) if len(shown) < 2 else None
        if most is not None and most + self.width([]) <= max_length:
            return most + self.width([])
        return self.width([self.encode_one(conversation, images, max_length)])

    def register_pictures(self, shown: Iterable[Sequence[Picture]]) -> None:
        """Include the pictures of prompts in the next `prepare_features`, although no encoded conversation shows them yet."""
        for images in shown:
            self.pictures.numbers(images)

    @contextmanager
    def forgetting_pictures(self) -> Iterator[None]:
        """Forget afterwards the pictures that are first encoded inside, so that any number can be asked about once."""
        with self.pictures.forgotten():
            yield

    def check_cache(self) -> None:
        """Raises ConfigError if vision features are to be kept and the cache's folder cannot be written to."""
        if self.caches:
            features.check_cache()

    def prepare_features(self) -> int:
        """Compute the vision features of every picture known so far, unless a cache file has them; how many were computed."""
        return self.pictures.prepare(self.progress)

    # Batches

    def width(self, batch: Sequence[Encoded]) -> int:
        """Tokens in the batch's longest row, including the answer and the vectors of prompt tuning; 0 for an empty batch."""
        return max((sample.length for sample in batch), default=0) + (len(self._virtual.ids) if self._virtual else 0)

    def collate(self, batch: Sequence[Encoded], endings: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Model inputs for prompts followed by `endings`, padded on the left so that all endings end at the last position."""
        virtual = self._virtual.ids if self._virtual else ()
        rows = [(*virtual, *sample.prompt, *ending) for sample, ending in zip(batch, endings, strict=True)]
        length = max(map(len, rows))
        pad = self.backbone.pad_id
        ids = torch.tensor([[pad] * (length - len(row)) + list(row) for row in rows])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        family = self.backbone.family
        if family.first_position is not None:
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0) + family.first_position
        for key in {k for sample in batch for k in sample.tokenwise} & self._parameters:
            values = []
            for sample, row, ending in zip(batch, rows, endings, strict=True):
                before = [0] * (length - len(row) + len(virtual))
                prompt = sample.tokenwise.get(key, (0,) * len(sample.prompt))
                values.append([*before, *prompt, *[family.answer_type] * len(ending)])
            inputs[key] = torch.tensor(values)
        with_picture = [sample for sample in batch if sample.pictures]
        for key in {k for sample in with_picture for k in sample.imagewise if k in self._parameters}:
            inputs[key] = torch.cat([sample.imagewise[key] for sample in with_picture])
        inputs = {key: value.to(self.backbone.device) for key, value in inputs.items()}
        if with_picture:
            inputs |= self.pictures.inputs([number for sample in with_picture for number in sample.pictures])
        return inputs

    def keep_last_logits(self, last: int) -> dict[str, int]:
        """The argument that makes the text model compute only the logits of the last positions, if it has such an argument."""
        return {"logits_to_keep": last} if "logits_to_keep" in self._parameters else {}

    # Computing

    def last_logits(self, batch: Sequence[Encoded], endings: Sequence[Sequence[int]], last: int) -> Tensor:
        """Logits of the last `last` positions of prompts followed by `endings`, (rows, last, vocabulary) in float32.

        In a row that is shorter than `last`, the first positions are meaningless.
        """
        stack = self._stack
        if stack is not None and self.fused and not stack.has_dropout:
            return self._fused_logits(stack, batch, endings, last)
        logits = self.backbone.model(**self.collate(batch, endings), use_cache=False, **self.keep_last_logits(last)).logits
        last_logits: Tensor = logits[:, -last:].float()
        return last_logits

    def _fused_logits(self, stack: Stack, batch: Sequence[Encoded], endings: Sequence[Sequence[int]], last: int) -> Tensor:
        model, fold = self.backbone.model, self.adapter.fold
        if self._fused_text is None or self._fused_text[0] is not fold:
            self._fused_text = fold, FusedLlama(model.get_decoder(), self.adapter)
        rows = [(*sample.prompt, *ending) for sample, ending in zip(batch, endings, strict=True)]
        length, pad = max(map(len, rows)), self.backbone.pad_id
        ids = torch.tensor([[*row, *[pad] * (length - len(row))] for row in rows])
        with torch.no_grad():
            embedded = model.get_input_embeddings()(ids)
            if pictures := [number for sample in batch for number in sample.pictures]:
                embedded[ids == model.config.image_token_id] = self.pictures.tokens(pictures)
        positions = torch.tensor([[max(0, len(row) - last + i) for i in range(last)] for row in rows])
        hidden = self._fused_text[1](embedded, stack.current, stack.scales, positions, stack.checkpointing)
        logits: Tensor = model.get_output_embeddings()(hidden)
        return logits

    def losses(self, batch: Sequence[Encoded]) -> Tensor:
        """(samples): the mean cross-entropy over each sample's answer tokens, with gradient.

        All samples have the same weight, so a batch of 8 and 8 accumulated batches of 1 have the same gradient.
        """
        answers = [sample.answer for sample in batch]
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
    def generate(self, batch: Sequence[Encoded], max_new_tokens: int) -> list[str]:
        """Greedy answers without the end mark and surrounding space. Raises FloatingPointError if the logits are NaN."""
        inputs = self.collate(batch, [()] * len(batch))
        inputs.pop("position_ids", None)  # generation computes them from the mask itself
        ids = self.backbone.model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=self.backbone.pad_id,
            eos_token_id=list(self.backbone.end_ids),
            logits_processor=[_refuse_nan],
        )
        new_ids = ids[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.backbone.tokenizer.batch_decode(new_ids, skip_special_tokens=True)]


def _refuse_nan(ids: Tensor, logits: Tensor) -> Tensor:
    # The greedy choice among NaN is a token like any other.
    if bool(logits.isnan().any()):
        raise FloatingPointError("the logits of the next token are NaN")
    return logits
