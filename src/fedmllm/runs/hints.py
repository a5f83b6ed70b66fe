"""What is allowed and rarely meant: settings before a federated run, scores after a run. Each is a note of one sentence."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from fedmllm.config import Experiment
from fedmllm.federation import FederationPlan, participants
from fedmllm.runs.session import Session

_USUAL_LR = (1e-6, 0.03)
"""Outside of it, AdamW hardly moves an adapter, or tears it apart; published LoRA runs lie between 1e-5 and 1e-2."""
_COARSE = 0.1
_Z = 1.96


def of_federation(session: Session, plan: FederationPlan) -> list[str]:
    """The notes on a federation that was planned."""
    sizes, tested = session.dataset.manifest.sizes(), len(session.dataset.test)
    return list(of_settings(session.config, sizes, participants(plan), session.excluded, tested))


def of_settings(
    config: Experiment, sizes: Sequence[int], participants: Collection[int], excluded: Collection[int], tested: int
) -> Iterator[str]:
    """The notes on a federation of clients with so many samples each, of which `participants` are ever sampled and `excluded`
    cannot take part, and on a test with `tested` samples."""
    train, clients = config.train, len(sizes)
    if train.optimizer == "adamw" and not _USUAL_LR[0] <= train.lr <= _USUAL_LR[1]:
        far, low_high = ("below", "little is learned") if train.lr < _USUAL_LR[0] else ("above", "training may diverge")
        yield f"train.lr = {train.lr:g} is far {far} the usual 1e-5 to 1e-2 of AdamW on adapters, so that {low_high}"
    unused = clients - len(excluded) - len(participants)
    if 5 * unused >= clients:
        yield (
            f"{unused} of {clients} clients are never sampled in {train.rounds} rounds with {train.clients_per_round} clients "
            "each, so that nobody learns from their data; raise train.rounds or train.clients_per_round if that is not meant"
        )
    small = sum(size < config.train_of(client).batch_size for client, size in enumerate(sizes))
    if 2 * small >= clients:
        yield (
            f"{small} of {clients} clients hold fewer samples than a batch, so that they make one step per epoch; lower "
            f"train.batch_size = {train.batch_size} or partition.clients = {clients}, or raise train.epochs"
        )
    half = _Z * math.sqrt(0.25 / max(tested, 1))
    if half > _COARSE:
        yield (
            f"with {tested} test samples, the 95 % interval of an accuracy reaches up to {100 * half:.0f} points to either "
            "side; more samples narrow it"
        )


def of_result(result: Mapping[str, Any]) -> Iterator[str]:
    """The notes on the scores of a trained model."""
    metric = result["primary_metric"]
    for pattern, metrics in result["metrics"].items():
        score, majority = metrics.get(metric), metrics.get("majority")
        if score is not None and majority is not None and result["kind"] != "zero-shot" and score <= majority:
            always = f"the {100 * majority:.1f} % of always giving the most frequent answer"
            yield f"{metric} {100 * score:.1f} % under {pattern!r} is not above {always}"
