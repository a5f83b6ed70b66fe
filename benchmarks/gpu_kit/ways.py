"""The ways to train and to answer that `gpu.py` compares, all on one model in memory with the same samples and adapter."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText

from contenders import bare, published
from contenders.hf import arguments, generate
from contenders.workload import BATCH, BETAS, CLIP, LR, Item
from fedmllm.algorithms import LocalRule
from fedmllm.config import TrainTable
from fedmllm.data.prompts import Conversation
from fedmllm.models.encoded import Encoded
from fedmllm.models.mllm import MLLM
from fedmllm.models.quantized import quantization
from fedmllm.models.scoring import option_scores
from fedmllm.rng import stream
from fedmllm.tensors import Tensors
from fedmllm.training.cohort import Work, train_cohort

STEPS = 4
"""Optimizer steps of a client, of `BATCH` samples each."""
QUESTIONS = 32
TABLE = TrainTable(batch_size=BATCH, lr=LR, beta1=BETAS[0], beta2=BETAS[1], weight_decay=0.0, clip=CLIP)
MAX_LENGTH = 4096


class Done(NamedTuple):
    """What a way did: `amount` is tokens of samples or questions, `loss` the mean over the samples of each client."""

    amount: int
    loss: float | None = None


@dataclass(frozen=True)
class Bench:
    """A model and one client's samples, which every client holds. Prompts are of equal length, so that no way needs padding."""

    model: MLLM
    items: list[Item]
    encoded: list[Encoded]
    start: Tensors

    @property
    def length(self) -> int:
        """Tokens of a sample."""
        return self.encoded[0].length

    # Training

    def published(self) -> Done:
        """A Trainer for one client: batches of one, accumulated; pictures are read, processed and encoded for each sample."""
        peft, processor, device = self.model.model, self.model.backbone.processor, self.model.backbone.device
        self.model.adapter.set(self.start)
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
            options: dict[str, Any] = {"optim": "adamw_torch", "per_device_train_batch_size": 1}
            training = arguments(folder, device.type, gradient_accumulation_steps=BATCH, **options)
            loss = published.train_client(peft, processor, self._trained_items, training)
        peft.eval()
        return Done(self.length * BATCH * STEPS, loss)

    def prepared(self) -> list[bare.Batch]:
        """The batches of the bare loop. As in ours, pictures have passed through the vision tower beforehand."""
        peft, processor = self.model.model, self.model.backbone.processor
        steps = [self._trained_items[i : i + BATCH] for i in range(0, BATCH * STEPS, BATCH)]
        return [bare.collate(peft, processor, items) for items in steps]

    def bare(self, batches: list[bare.Batch]) -> Done:
        self.model.adapter.set(self.start)
        loss = float(bare.train_client(self.model.model, batches)) / (BATCH * STEPS)
        return Done(self.length * BATCH * STEPS, loss)

    def ours(self, clients: int, table: TrainTable = TABLE) -> Done:
        """`clients` clients in one pass. Raises torch.OutOfMemoryError if they trained in several, because memory was full."""
        limits = (self.model.limits.clients, self.model.limits.samples)
        for limit in limits:  # a larger way may have set them
            limit.most = None
        trained = self.encoded[: BATCH * STEPS]
        steps = [[trained[i : i + BATCH]] for i in range(0, len(trained), BATCH)]
        works = [Work(steps, self.start, LocalRule(), client) for client in range(clients)]
        losses = [result.metrics["loss"] for result in train_cohort(self.model, works, table)]
        if any(limit.most is not None for limit in limits):
            raise torch.OutOfMemoryError(f"{clients} clients in one pass")
        return Done(clients * self.length * len(trained), sum(losses) / clients)

    def checkpointed(self, clients: int) -> Done:
        """As `ours`, with layers that are computed again in the backward pass."""
        return self.ours(clients, TABLE.model_copy(update={"checkpointing": True}))

    # Answering: every way says as many tokens as the answer has

    def generated_singly(self) -> Done:
        """The published pattern: each picture is processed again, and each answer is generated alone."""
        peft, processor = self.model.model, self.model.backbone.processor
        for item in self._questions:
            generate(peft, processor, [item], self._answer_tokens)
        return Done(len(self._questions))

    def generated_together(self) -> Done:
        """Ours for open questions."""
        questions = self.encoded[:QUESTIONS]
        self.model.generate(questions, self._answer_tokens)
        return Done(len(questions))

    def scored(self) -> Done:
        """Ours for closed questions."""
        questions = self.encoded[:QUESTIONS]
        option_scores(self.model, questions)
        return Done(len(questions))

    @property
    def _trained_items(self) -> list[Item]:
        return self.items[: BATCH * STEPS]

    @property
    def _questions(self) -> list[Item]:
        return self.items[: QUESTIONS // 4]

    @property
    def _answer_tokens(self) -> int:
        return len(self.encoded[0].answer)

    # Arithmetic

    def operations_per_token(self) -> float:
        """Multiplications and additions of training, per token of a sample, without those of the vision tower.

        Frozen weights are used forward and for the gradient of the input, 2 each; factors of LoRA also for their own
        gradient; a position attends to half of the others; the head runs at the answer and one position before it.
        """
        decoder, head = self.model.backbone.model.get_decoder(), self.model.backbone.model.get_output_embeddings()
        factors = sum(p.numel() for p in self.model.adapter.parameters.values())
        linear = (module for module in decoder.layers.modules() if type(module) is nn.Linear)
        weights = sum(module.weight.numel() for module in linear) - factors
        attention = 6 * decoder.config.hidden_size * self.length * len(decoder.layers)
        positions = (self._answer_tokens + 1) / self.length
        return float(4 * weights + 6 * factors + attention + 4 * head.weight.numel() * positions)


def make_bench(model: MLLM, folder: Path, size: int) -> Bench:
    """Samples with pictures of `size` × `size` pixels in `folder`, questions of about sixty tokens and lettered answers."""
    options = tuple(f"({letter}) red" for letter in "ABCD")
    count = max(QUESTIONS, BATCH * STEPS)
    pictures = [_picture(folder / f"{number}.jpg", size, number) for number in range(count)]
    question = "\n".join(["Which of these is the color of the shape?", *options, "Answer with the letter of the right option."])
    talk = Conversation(question, options[1], True, options)
    backbone = model.backbone
    prompt, after = backbone.prompt(talk) + backbone.answer_frame[0], backbone.answer_frame[1].strip()
    items = [Item(prompt.removesuffix(" "), f" {talk.answer}{after}", str(path), talk.answer) for path in pictures]
    encoded = model.encode([talk] * count, pictures, MAX_LENGTH)
    model.prepare_features()
    # B starts at zero; with other values the adapter takes part in the numbers that are compared.
    start = {n: t if "lora_A" in n else 0.01 * torch.randn(t.shape) for n, t in model.adapter.get().items()}
    return Bench(model, items, encoded, start)


def _picture(path: Path, size: int, number: int) -> Path:
    """A smooth picture in random colours, as large on disk as a photograph of this size."""
    colours = stream(0, "gpu", number).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    Image.fromarray(colours).resize((size, size), Image.Resampling.BICUBIC).save(path, quality=90)
    return path


@contextmanager
def compiled(model: MLLM) -> Iterator[None]:
    """Inside, torch.compile fuses the operations of each layer of the text model."""
    layers = model.backbone.model.get_decoder().layers
    for layer in layers:
        layer.compile()
    try:
        with torch._dynamo.config.patch(recompile_limit=4 * len(layers)):
            yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None
        torch.compiler.reset()


def eager(way: Callable[[], Done]) -> Callable[[], Done]:
    """The same way as if nothing were compiled."""

    def run() -> Done:
        with torch.compiler.set_stance("force_eager"):
            return way()

    return run


def quantized(model: MLLM, folder: Path) -> MLLM:
    """The same model with its weights in 4 bits, as `model.quantize = "4bit"` loads it; `model` is unusable afterwards."""
    settings = model.settings.model_copy(update={"quantize": "4bit"})
    options = quantization(settings, model.backbone.device)  # before 5 GB are written
    plain = model.model.unload()  # without the adapter, whose names the file must not have
    plain.save_pretrained(folder)
    plain.to("meta")  # so that its memory is free
    loaded = AutoModelForImageTextToText.from_pretrained(folder, dtype=model.backbone.dtype, **options)
    return MLLM(replace(model.backbone, model=loaded.requires_grad_(False).eval()), settings, seed=0)
