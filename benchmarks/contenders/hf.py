"""Loading, processing and generating as in the documentation of transformers and PEFT, for contenders (a) to (c)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainingArguments
from transformers.utils import logging

from contenders.workload import ALPHA, BETAS, CLIP, EPS, LR, MAX_NEW_TOKENS, RANK, Item, Workload

logging.disable_progress_bar()


def load(workload: Workload) -> tuple[Any, Any]:
    """The model with the workload's initial LoRA adapter, and the processor."""
    processor = AutoProcessor.from_pretrained(workload.model)
    model = AutoModelForImageTextToText.from_pretrained(workload.model, dtype=torch.float32)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=workload.target, lora_dropout=0.0, bias="none")
    model = get_peft_model(model, config)
    set_peft_model_state_dict(model, workload.initial)
    return model, processor


def arguments(folder: str, device: str = "cpu", **options: Any) -> TrainingArguments:
    """The workload's optimizer settings, without checkpoints, progress bars and logs, which would only cost time."""
    return TrainingArguments(
        output_dir=folder, num_train_epochs=1, learning_rate=LR, lr_scheduler_type="constant", weight_decay=0.0,
        adam_beta1=BETAS[0], adam_beta2=BETAS[1], adam_epsilon=EPS, max_grad_norm=CLIP,
        train_sampling_strategy="sequential", remove_unused_columns=False, use_cpu=device == "cpu",
        dataloader_pin_memory=device != "cpu",
        logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True, **options,
    )  # fmt: skip


def process(processor: Any, texts: Sequence[str], items: Sequence[Item], **options: Any) -> dict[str, Any]:
    """Model inputs for the texts and the items' picture files. The texts already contain the begin token."""
    pictures = []
    for item in items:
        with Image.open(item.image) as picture:
            pictures.append([picture.convert("RGB")])
    return dict(processor(text=list(texts), images=pictures, return_tensors="pt", add_special_tokens=False, **options))


def answer_lengths(processor: Any, items: Sequence[Item]) -> list[int]:
    ids = processor.tokenizer([item.answer for item in items], add_special_tokens=False)["input_ids"]
    return [len(tokens) for tokens in ids]


@torch.no_grad()
def generate(model: Any, processor: Any, items: Sequence[Item], max_new_tokens: int = MAX_NEW_TOKENS) -> list[str]:
    """Greedy answers to one batch of questions."""
    inputs = process(processor, [item.prompt for item in items], items, padding=True, padding_side="left")
    inputs = {key: value.to(model.device) for key, value in inputs.items()}
    pad = processor.tokenizer.pad_token_id
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad)
    texts = processor.tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def evaluate(model: Any, processor: Any, items: Sequence[Item], batch: int) -> tuple[float, float]:
    """(seconds, accuracy) of generating all answers."""
    model.eval()
    generate(model, processor, items[:batch])  # warm up
    began = time.perf_counter()
    answers = [text for i in range(0, len(items), batch) for text in generate(model, processor, items[i : i + batch])]
    seconds = time.perf_counter() - began
    return seconds, sum(text == item.truth for text, item in zip(answers, items, strict=True)) / len(items)


def warm_up(model: Any, processor: Any, items: Sequence[Item]) -> None:
    """One discarded step, so that PyTorch's one-time work is not counted against a contender."""
    inputs = process(processor, [item.prompt + item.answer for item in items], items, padding=True)
    model(**inputs, use_cache=False).logits.float().mean().backward()
    model.zero_grad(set_to_none=True)
