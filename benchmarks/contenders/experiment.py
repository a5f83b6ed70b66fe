"""The workload, built with fedmllm's own data path, and the fedmllm experiment that does the same work."""

from __future__ import annotations

from typing import Any

from contenders.workload import ALPHA, BATCH, BETAS, CLIP, EPS, LR, MAX_NEW_TOKENS, RANK, Item, Size, Workload
from fedmllm.config import Experiment, validate
from fedmllm.data.prompts import prompts, render
from fedmllm.experiment.parts import build
from fedmllm.federation import FederationPlan, sample_clients
from fedmllm.models.mllm import MLLM
from fedmllm.models.shipped import source_of
from fedmllm.rng import stream
from fedmllm.training.batches import batch_epoch


def experiment(size: Size, cohort: int | str = 1) -> Experiment:
    """The experiment that (d) and (e) run."""
    train: dict[str, Any] = {
        "rounds": size.rounds, "clients_per_round": size.clients, "batch_size": BATCH,
        "lr": LR, "schedule": "constant", "beta1": BETAS[0], "beta2": BETAS[1], "eps": EPS, "weight_decay": 0.0,
        "clip": CLIP, "cohort": cohort,
    }  # fmt: skip
    task = {"name": "easy-vqa", "train_samples": size.clients * size.samples, "test_samples": size.questions}
    return validate(
        {
            "name": "peers",
            "task": task,
            "partition": {"name": "iid", "clients": size.clients},
            "model": {"name": size.model, "device": "cpu", "precision": "fp32", "lora": {"rank": RANK, "alpha": ALPHA}},
            "train": train,
            "eval": {"bootstrap": 10, "max_new_tokens": MAX_NEW_TOKENS},
        }
    )


def make_workload(size: Size) -> Workload:
    """The same data, assignment of samples to clients and order of samples as in the experiment."""
    config = experiment(size)
    dataset, model = build(config).prepare(), MLLM.load(config.model, config.seed)
    by_id = {sample.id: sample for sample in dataset.train}
    train = [by_id[holding.sample_id] for holding in dataset.manifest]
    samples = [*train, *dataset.test]
    conversations = [render(s, s.modalities, prompts.build(config.prompt.name, {})) for s in samples]
    encoded = model.encode(conversations, [s.image for s in samples], config.train.max_length)
    items = [
        Item(model.backbone.prompt(conversation), model.backbone.tokenizer.decode(list(e.answer)), str(s.image), s.answer)
        for s, conversation, e in zip(samples, conversations, encoded, strict=True)
    ]
    owners = [holding.client for holding in dataset.manifest]
    held = [[i for i, owner in enumerate(owners) if owner == client] for client in range(size.clients)]
    steps = []
    for number in range(size.rounds):
        assert sample_clients(FederationPlan.of(config.train, range(size.clients), 0), number) == tuple(range(size.clients))
        by_client = []
        for client, indices in enumerate(held):
            rng = stream(config.seed, "batches", client, number, 0)
            epoch = batch_epoch([encoded[i].length for i in indices], BATCH, 1, rng).steps
            by_client.append([[indices[i] for batch in step for i in batch] for step in epoch])
        steps.append(by_client)
    folder = source_of(size.model)
    target = model.backbone.family.target
    return Workload(size, folder, target, items[: len(train)], items[len(train) :], steps, model.adapter.get())
