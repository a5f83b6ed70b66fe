"""What `peers.py` compares: one module a contender, each with `run(workload) -> Outcome`.

`workload` is what all of them must do, `hf` what those written on transformers and PEFT alone share.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Contender:
    """`module` has its `run`; `evaluates` says whether its evaluation is timed too."""

    module: str
    what: str
    evaluates: bool = True


CONTENDERS = {
    "a": Contender("published", "FedMLLM's published code: a Trainer per client and round"),
    "b": Contender("flowertune", "Flower's LLM example: simulation on Ray, model loaded per call"),
    "c": Contender("bare", "a bare PyTorch and PEFT loop on ready batches: the yardstick", evaluates=False),
    "d": Contender("ours", "fedmllm, one client at a time"),
    "e": Contender("ours_cohort", "fedmllm, clients in cohorts"),
}
