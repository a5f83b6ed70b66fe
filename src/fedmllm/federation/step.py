"""The server's step: refuse invalid updates, aggregate the others, and record what happened."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from fedmllm.algorithms import Algorithm, RoundInfo, Update
from fedmllm.algorithms.combining import Combined
from fedmllm.algorithms.screening import screen
from fedmllm.errors import RunError
from fedmllm.federation.plan import FederationPlan, Fleet, RoundRecord, TooFewUpdates, sum_groups
from fedmllm.tensors import State, bytes_by_group, not_finite


def aggregate_valid(
    updates: Sequence[Update], algorithm: Algorithm, fleet: Fleet, plan: FederationPlan, state: State, info: RoundInfo
) -> tuple[State, list[Update], list[dict[str, str | int]], Combined]:
    """The state after a round with these updates, the valid ones, why the others were refused, and what was aggregated. Raises
    TooFewUpdates, or RunError if the server's step overflows."""
    valid, refused = screen(updates, algorithm, state, info, plan.max_norm_ratio, plan.declared, plan.per_step)
    for refusal in refused:
        if "NaN or infinity" in str(refusal["why"]):
            refusal["why"] = f"{refusal['why']}; its training diverged: lower train.lr, which was {plan.lr:g}"
    # Before the round is recorded: a client must not remember a control variate whose update was not used, nor a NaN.
    fleet.forget(info.round, sorted(set(info.sampled) - {u.client for u in valid}))
    if len(valid) < plan.min_updates:
        reasons = "; ".join(f"client {r['client']}: {r['why']}" for r in refused) or "no client answered"
        raise TooFewUpdates(
            f"round {info.round}: {len(valid)} usable updates, train.min_updates = {plan.min_updates} ({reasons})"
        )
    combined = plan.combine(valid, algorithm, state, info) if plan.combine else Combined(valid)
    after = {**algorithm.aggregate(state, combined.updates, info), **combined.state}
    if name := not_finite(after):
        kept = f"the state after round {info.round - 1} is kept" if info.round else "nothing was trained before"
        raise RunError(
            f"round {info.round}: the server's step overflowed (NaN or infinity in {name!r}, from finite updates); "
            f"{plan.remedy or f'lower train.lr = {plan.lr}'}, and start a new run ({kept})."
        )
    return after, valid, refused, combined


def record_of(
    info: RoundInfo,
    messages: Mapping[int, State],
    updates: Sequence[Update],
    valid: Sequence[Update],
    refused: list[dict[str, str | int]],
    combined: Combined,
    seconds: float,
) -> RoundRecord:
    examples = sum(u.examples for u in valid)

    def mean(metric: str) -> float:
        return sum(u.metrics.get(metric, 0.0) * u.examples for u in valid) / examples if examples else math.nan

    reported = {update.client: update.travelled for update in updates if update.travelled}
    down = sum_groups(reported[c][0] if c in reported else bytes_by_group(state) for c, state in messages.items())
    up = sum_groups(update.travelled[1] if update.travelled else bytes_by_group(update.groups) for update in updates)
    return RoundRecord(
        round=info.round,
        lr=info.lr,
        sampled=list(info.sampled),
        examples=examples,
        steps=sum(u.steps for u in valid),
        loss=mean("loss"),
        bytes_down=down,
        bytes_up=up,
        parts_down=_by_part([state for c, state in messages.items() if c not in reported], info, sum(down.values())),
        parts_up=_by_part([update.groups for update in updates if not update.travelled], info, sum(up.values())),
        refused=refused,
        seconds=seconds,
        padding=mean("padding") if examples else 0.0,
        kept=dict(combined.kept),
        privacy=dict(combined.privacy),
    )


def _by_part(states: Iterable[State], info: RoundInfo, total: int) -> dict[str, int]:
    """The bytes of the tensors of each part of the model, and as "other" those of the `total` that belong to none."""
    named = (pair for state in states for tensors in state.values() for pair in tensors.items())
    parts = sum_groups({info.adapter.part(name): tensor.nbytes} for name, tensor in named)
    rest = total - sum(parts.values())
    return {**parts, "other": rest} if rest else parts
