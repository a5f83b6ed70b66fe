"""(b) The pattern of Flower's example FlowerTune LLM (github.com/adap/flower, examples/flowertune-llm).

Kept: ClientApp and ServerApp in Flower's simulation on Ray; in each call the client loads the model, wraps it with PEFT, sets
the adapter from the message, makes a Trainer and replies with the adapter and `num-examples`; FedAvg; evaluation loads the
model once more and generates in batches, as the evaluation of Flower's LLM benchmarks does.
Changed, so that the numbers are comparable: our model and samples with pictures, processed by the collator as is usual when a
Trainer fine-tunes vision-language models; batches of 4; float32 instead of 4 bits; a constant learning rate; equal weight for
each sample; a given order of samples. TRL's SFTTrainer, which adds only the tokenising of a text data set to Trainer, is
replaced by Trainer. Gradient checkpointing and saving, which would only cost time here, and Flower's telemetry are off.

Each client trains with one thread, which is faster here than one client at a time on all threads. The simulation polls for
replies every 0.1 s, so the time of a round is a multiple of that.
"""

from __future__ import annotations

import functools
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, Result
from flwr.simulation import run_simulation
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch.nn import functional
from transformers import Trainer

from contenders.hf import answer_lengths, arguments, evaluate, load, process, warm_up
from contenders.workload import BATCH, Item, Outcome, Workload, peak_memory_mb

client_app = ClientApp()


def collate(processor: Any, items: Sequence[Item]) -> dict[str, Any]:
    """A batch with newly processed pictures and labels at the answers."""
    inputs = process(processor, [item.prompt + item.answer for item in items], items, padding=True, padding_side="right")
    labels = torch.full_like(inputs["input_ids"], -100)
    counts = answer_lengths(processor, items)
    for row, (count, length) in enumerate(zip(counts, inputs["attention_mask"].sum(1).tolist(), strict=True)):
        labels[row, length - count : length] = inputs["input_ids"][row, length - count : length]
    return {**inputs, "labels": labels}


class SampleWeightedTrainer(Trainer):
    """Weights each sample equally, however long its answer is; Trainer's own loss is the mean over all tokens."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        labels = inputs.pop("labels")[:, 1:]
        outputs = model(**inputs, use_cache=False)
        # One row per position: with the classes in the second of three dimensions, PyTorch sums over the vocabulary with ten
        # times the rounding error.
        logits = outputs.logits[:, :-1].flatten(0, 1)
        losses = functional.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="none").view(labels.shape)
        loss = (losses.sum(1) / (labels != -100).sum(1)).mean()
        return (loss, outputs) if return_outputs else loss


@functools.cache
def workload_in(folder: str) -> Workload:
    """Cached, because the example also keeps its data set in a global of the client's process."""
    return Workload.load(Path(folder))


@client_app.query()
def wake(message: Message, context: Context) -> Message:
    """Do what a client's process does only once: imports and PyTorch's first step."""
    torch.set_num_threads(1)
    workload = workload_in(message.content["config"]["workload"])
    model, processor = load(workload)
    warm_up(model, processor, workload.train[:BATCH])
    return Message(content=RecordDict(), reply_to=message)


@client_app.train()
def train(message: Message, context: Context) -> Message:
    torch.set_num_threads(1)
    config = message.content["config"]
    workload = workload_in(config["workload"])
    items = workload.order(config["server-round"] - 1, int(context.node_config["partition-id"]))
    model, processor = load(workload)
    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    with tempfile.TemporaryDirectory() as folder:
        trainer = SampleWeightedTrainer(
            model=model,
            args=arguments(folder, per_device_train_batch_size=BATCH),
            train_dataset=items,
            data_collator=functools.partial(collate, processor),
        )
        results = trainer.train()
    metrics = {"train_loss": results.training_loss, "num-examples": len(items), "pid": os.getpid(), "memory": peak_memory_mb()}
    arrays = ArrayRecord(get_peft_model_state_dict(model))
    return Message(content=RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics)}), reply_to=message)


def aggregate_metrics(replies: Sequence[RecordDict], weighted_by: str) -> MetricRecord:
    """The loss, averaged as FedAvg does, and the sum of the memory of all client processes."""
    metrics = [reply["metrics"] for reply in replies]
    loss = sum(m["train_loss"] * m[weighted_by] for m in metrics) / sum(m[weighted_by] for m in metrics)
    memory = {m["pid"]: m["memory"] for m in sorted(metrics, key=lambda m: m["memory"])}  # a process's largest is last
    return MetricRecord({"train_loss": loss, "memory": sum(memory.values())})


def wake_all(grid: Grid, clients: int, config: ConfigRecord) -> None:
    """Wait until the simulation has its clients and their processes are ready."""
    while len(nodes := list(grid.get_node_ids())) < clients:
        time.sleep(0.1)
    queries = [Message(content=RecordDict({"config": config}), message_type="query", dst_node_id=node) for node in nodes]
    for reply in grid.send_and_receive(queries):
        if reply.has_error():
            raise RuntimeError(f"a client did not start: {reply.error}")


def run(workload: Workload) -> Outcome:
    size, threads = workload.size, torch.get_num_threads()
    times: dict[str, float] = {}
    results: list[Result] = []
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        config = ConfigRecord({"workload": folder})
        wake_all(grid, size.clients, config)
        times["awake"] = time.perf_counter()
        initial = ArrayRecord(get_peft_model_state_dict(load(workload)[0]))
        strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, train_metrics_aggr_fn=aggregate_metrics)
        times["ready"] = time.perf_counter()
        results.append(strategy.start(grid, initial, num_rounds=size.rounds, train_config=config))
        times["done"] = time.perf_counter()

    backend = {
        "init_args": {"address": "local", "num_cpus": threads, "log_to_driver": False},
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
    }
    with tempfile.TemporaryDirectory() as folder:
        workload.save(Path(folder))
        began = time.perf_counter()
        run_simulation(server_app, client_app, size.clients, backend_config=backend)
    (result,) = results
    per_round = [result.train_metrics_clientapp[number + 1] for number in range(size.rounds)]
    adapter = result.arrays.to_torch_state_dict()
    model, processor = load(workload)
    set_peft_model_state_dict(model, adapter)
    eval_seconds, accuracy = evaluate(model, processor, workload.test, batch=32)
    return Outcome(
        losses=[metrics["train_loss"] for metrics in per_round],
        adapter=adapter,
        train_seconds=times["done"] - times["ready"],
        eval_seconds=eval_seconds,
        accuracy=accuracy,
        threads=threads,
        # Pages that processes share are counted once per process; Ray's own processes are not counted.
        peak_memory_mb=peak_memory_mb() + max(metrics["memory"] for metrics in per_round),
        startup_seconds=times["awake"] - began,
    )
