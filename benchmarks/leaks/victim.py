"""The pocket model, its clients, and the updates that the attacks see, as vectors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmllm.algorithms import LocalRule
from fedmllm.config import LoraTable, ModelTable, TrainTable
from fedmllm.data.images import Picture, decode
from fedmllm.data.prompts import prompts, render
from fedmllm.data.samples import Sample
from fedmllm.data.tasks import tasks
from fedmllm.models.encoded import Encoded
from fedmllm.models.mllm import MLLM
from fedmllm.models.stack import Stack
from fedmllm.rng import stream
from fedmllm.tensors import Tensors
from fedmllm.training.cohort import Work, train_cohort

Floats = NDArray[np.float64]


def train_table(optimizer: str = "adamw", epochs: int = 1, batch: int = 4) -> TrainTable:
    """The quickstart's settings; plain SGD needs a higher learning rate to move as far."""
    lr = 3e-3 if optimizer == "adamw" else 0.3
    return TrainTable.model_validate({"optimizer": optimizer, "lr": lr, "batch_size": batch, "epochs": epochs})


class Victim:
    """A model, the samples of clients and attackers, and adapters as vectors (entries)."""

    def __init__(self, model: MLLM, samples: Sequence[Encoded], images: Sequence[Picture | None]) -> None:
        self.model, self.samples, self.images = model, samples, images
        model.prepare_features()
        self.initial = self.vector(model.adapter.get())

    @classmethod
    def on_easy_vqa(cls, seed: int = 0) -> Victim:
        """The pocket model with the quickstart's adapter, and one question about each of the 4,000 training pictures."""
        of_picture: dict[object, list[Sample]] = {}
        for sample in tasks.build("easy-vqa", {}).load("train"):
            if isinstance(sample, Sample):
                of_picture.setdefault(sample.image, []).append(sample)
        rng = stream(seed, "leakage")
        chosen = [questions[int(rng.integers(len(questions)))] for questions in of_picture.values()]
        strategy = prompts.build("modality-agnostic", {})
        model = MLLM.load(ModelTable(lora=LoraTable(rank=8, alpha=16)), seed)
        conversations = [render(sample, sample.modalities, strategy) for sample in chosen]
        images = [sample.image for sample in chosen]
        return cls(model, model.encode(conversations, images, 1200), images)

    def features(self, numbers: Sequence[int]) -> Tensor:
        """(samples, tokens · width): the features of the pictures of the samples with these numbers."""
        inputs = self.model.collate([self.samples[i] for i in numbers], [()] * len(numbers))
        pooled = inputs["mm_encoder_outputs"]["image"].pooler_output
        return torch.cat([part.reshape(1, -1) for part in pooled])

    def pixels(self, numbers: Sequence[int]) -> Tensor:
        """(samples, height · width · 3): their pictures, with values between 0 and 1."""
        images = [self.images[i] for i in numbers]
        arrays = [np.asarray(decode(image).convert("RGB"), np.float32) for image in images if image is not None]
        return torch.from_numpy(np.stack(arrays)).flatten(1) / 255

    def vector(self, tensors: Tensors) -> Tensor:
        return torch.cat([tensors[name].reshape(-1) for name in self.model.adapter.parameters])

    def tensors(self, vector: Tensor) -> Tensors:
        parameters = self.model.adapter.parameters
        parts = torch.split(vector, [parameter.numel() for parameter in parameters.values()])
        return {name: part.view(p.shape) for part, (name, p) in zip(parts, parameters.items(), strict=True)}

    def updates(self, adapter: Tensor, clients: Sequence[Sequence[Encoded]], train: TrainTable) -> Tensor:
        """(clients, entries): how far local training of each client moves the adapter."""
        size, received = train.batch_size, self.tensors(adapter)
        steps = [
            [[samples[i : i + size]] for _ in range(train.epochs) for i in range(0, len(samples), size)] for samples in clients
        ]
        results = train_cohort(self.model, [Work(of_client, received, LocalRule(), 0) for of_client in steps], train)
        return torch.stack([self.vector(result.trained) - adapter for result in results])

    def gradients(self, adapter: Tensor, samples: Sequence[Encoded], chunk: int = 32) -> Tensor:
        """(samples, entries): the gradient of each sample's loss."""
        parts = []
        for start in range(0, len(samples), chunk):
            batch = samples[start : start + chunk]
            stack = Stack(self.model.adapter, [self.tensors(adapter)] * len(batch), list(self.model.adapter.parameters))
            with self.model.using(stack, len(batch)):
                stack.begin([(1, self.model.width([sample])) for sample in batch])
                self.model.loss(batch).backward()
            parts.append(stack.grads)
        return torch.cat(parts)

    def losses(self, adapter: Tensor, samples: Sequence[Encoded]) -> Floats:
        with self.model.stacked([self.tensors(adapter)]):
            return self.model.losses(samples).double().numpy()

    def warmed_up(self, samples: Sequence[Encoded], rounds: int = 4, clients: int = 4) -> Tensor:
        """The adapter after a few rounds of FedAvg over `samples`, which take part in no attack."""
        adapter, train = self.initial, train_table()
        for number in range(rounds):
            part = samples[number::rounds]
            adapter = adapter + self.updates(adapter, [part[i::clients] for i in range(clients)], train).mean(0)
        return adapter


def noisy_sum(updates: Tensor, clip: float, noise: float, rng: np.random.Generator) -> Tensor:
    """The sum of the updates (clients, entries), each clipped to the L2 norm `clip`, plus noise of noise · clip per entry."""
    clipped = updates * (clip / updates.norm(dim=1, keepdim=True)).clamp(max=1.0)
    return clipped.sum(0) + noise * clip * torch.from_numpy(rng.standard_normal(updates.shape[1], dtype=np.float32))
