"""The workload, made by fedmllm's own data path, and the experiment that is the same thing to fedmllm."""

from __future__ import annotations

from typing import Any

from contenders.workload import ALPHA, BATCH, BETAS, CLIP, LR, MAX_NEW_TOKENS, RANK, Item, Size, Workload
from fedmllm.config import Experiment, validate
from fedmllm.data.prompts import prompts, render
from fedmllm.experiment.parts import build
from fedmllm.federation import FederationPlan, sample_clients
from fedmllm.models.backbone import POCKET
from fedmllm.models.mllm import MLLM
from fedmllm.rng import stream
from fedmllm.training.batches import batch_epoch


def experiment(size: Size, cohort: int | str = 1) -> Experiment:
    """The experiment that fedmllm runs."""
    train: dict[str, Any] = {
        "rounds": size.rounds, "clients_per_round": size.clients, "batch_size": BATCH,
        "lr": LR, "schedule": "constant", "beta1": BETAS[0], "beta2": BETAS[1], "weight_decay": 0.0, "clip": CLIP,
        "cohort": cohort,
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


def make(size: Size) -> Workload:
    """The workload, from the data, the manifest and the order of samples that fedmllm draws."""
    config = experiment(size)
    data, model = build(config).prepare(), MLLM.load(config.model, config.seed)
    by_id = {sample.id: sample for sample in data.train}
    held = [(holding.client, by_id[holding.sample_id]) for holding in data.manifest]
    samples = [sample for _, sample in held] + data.test
    talks = [render(s, s.modalities, prompts.build(config.prompt.name, {})) for s in samples]
    encoded = model.encode(talks, [s.image for s in samples], config.train.max_length)
    items = [
        Item(model.backbone.prompt(talk), model.backbone.tokenizer.decode(list(one.answer)), str(s.image), s.answer)
        for s, talk, one in zip(samples, talks, encoded, strict=True)
    ]
    places = [[i for i, (owner, _) in enumerate(held) if owner == client] for client in range(size.clients)]
    steps = []
    for number in range(size.rounds):
        assert sample_clients(FederationPlan.of(config.train, range(size.clients), 0), number) == tuple(range(size.clients))
        orders = []
        for client, mine in enumerate(places):
            drawn = stream(config.seed, "batches", client, number, 0)
            planned = batch_epoch([encoded[i].length for i in mine], BATCH, 1, drawn).steps
            orders.append([[mine[i] for batch in step for i in batch] for step in planned])
        steps.append(orders)
    folder = str(POCKET) if size.model == "pocket" else size.model
    target = model.backbone.family.target
    return Workload(size, folder, target, items[: len(held)], items[len(held) :], steps, model.adapter.get())
