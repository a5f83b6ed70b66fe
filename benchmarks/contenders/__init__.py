"""The implementations that `peers.py` compares: one module per contender, each with `run(workload) -> Outcome`.

`workload` defines the work that all of them do, `experiment` builds it, and `hf` has what the contenders that use only
transformers and PEFT share.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Contender:
    """`module` is the name of the module in this package that has its `run`."""

    module: str
    description: str


CONTENDERS = {
    "a": Contender("published", "FedMLLM's published code: a Trainer per client and round"),
    "b": Contender("flowertune", "Flower's LLM example: simulation on Ray, model loaded per call"),
    "c": Contender("bare", "a bare PyTorch and PEFT loop on prepared batches: the yardstick"),
    "d": Contender("ours", "fedmllm, one client at a time"),
    "e": Contender("ours_cohort", "fedmllm, clients in cohorts"),
}
