"""(a) The pattern of FedMLLM's published code (github.com/1xbq1/FedMLLM, finetune/finetune.py, trainer.py, eval_*.py).

Kept: one resident model; a new `Trainer` per client and round; batches of one sample, four of them accumulated per step;
each picture is read, processed and passed through the vision tower whenever its sample is used; logits at every position;
`adamw_torch`; state dicts copied for each client; evaluation generates the answer to one question at a time.
Changed, so that the numbers are comparable: only LoRA is trained (not the embeddings and the resampler), without dropout,
weight decay and warm-up; the order of the samples is given; answers are greedy and short; FedAvg is the weighted mean
(the original adds most tensors to the old ones). Gradient checkpointing, logging and saving, which would only cost time
here, are off.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from contenders.hf import answer_lengths, arguments, evaluate, load, process, warm_up
from contenders.workload import BATCH, Item, Outcome, Workload, average, peak_memory_mb


class SupervisedDataset(Dataset[dict[str, Any]]):
    """Samples that are read, processed and tokenised on every access."""

    def __init__(self, items: Sequence[Item], processor: Any) -> None:
        self._items, self._processor = items, processor

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self._items[index]
        inputs = process(self._processor, [item.prompt + item.answer], [item])
        labels = torch.full_like(inputs["input_ids"], -100)
        count = answer_lengths(self._processor, [item])[0]
        labels[:, -count:] = inputs["input_ids"][:, -count:]
        return {**inputs, "labels": labels}


def only(batch: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The collator for batches of one."""
    return batch[0]


class PublishedTrainer(Trainer):
    """Computes the loss as the original does: the mean over the answer tokens of the batch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The original predates the division by the tokens of all accumulated batches; it divides by the number of batches.
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs, use_cache=False)
        logits = outputs.logits[:, :-1].flatten(0, 1)
        loss = nn.CrossEntropyLoss()(logits, labels[:, 1:].flatten())
        return (loss, outputs) if return_outputs else loss


def train_client(model: Any, processor: Any, items: Sequence[Item], training: TrainingArguments) -> float:
    """Train the model's current adapter on one client's samples with a new Trainer; the mean loss."""
    data = SupervisedDataset(items, processor)
    trainer = PublishedTrainer(model=model, args=training, train_dataset=data, data_collator=only)
    return float(trainer.train().training_loss)


def run(workload: Workload) -> Outcome:
    model, processor = load(workload)
    warm_up(model, processor, workload.train[:1])
    losses = []
    with tempfile.TemporaryDirectory() as folder:
        training = arguments(folder, optim="adamw_torch", per_device_train_batch_size=1, gradient_accumulation_steps=BATCH)
        began = time.perf_counter()
        shared = copy.deepcopy(get_peft_model_state_dict(model))
        for number in range(workload.size.rounds):
            trained, sizes, means = [], [], []
            for client in range(workload.size.clients):
                set_peft_model_state_dict(model, shared)
                items = workload.order(number, client)
                means.append(train_client(model, processor, items, training))
                trained.append(copy.deepcopy(get_peft_model_state_dict(model)))
                sizes.append(len(items))
            shared = average(trained, sizes)
            losses.append(sum(m * n for m, n in zip(means, sizes, strict=True)) / sum(sizes))
        set_peft_model_state_dict(model, shared)
        seconds = time.perf_counter() - began
    eval_seconds, accuracy = evaluate(model, processor, workload.test, batch=1)
    return Outcome(losses, shared, seconds, eval_seconds, accuracy, torch.get_num_threads(), peak_memory_mb())
