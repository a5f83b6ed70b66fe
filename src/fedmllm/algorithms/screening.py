"""Which updates of a round are used. Whatever a client sends, the others' round goes on without it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from fedmllm.algorithms.base import Algorithm, RoundInfo, Update
from fedmllm.errors import brief
from fedmllm.tensors import State, norm, problem_with

Refused = dict[str, str | int]
"""{"client", "why"}, as `rounds.jsonl` lists it."""
MAX_COUNT = 2**63 - 1
"""The largest number of samples or steps that is understood."""
MAX_METRIC = 1e30
"""The largest loss: far above any that means something, and small enough for sums over all samples."""
ENOUGH = 3
"""Of fewer norms, one client can move the median as far as it likes."""


def screen(
    updates: Sequence[Update],
    algorithm: Algorithm,
    state: State,
    info: RoundInfo,
    max_norm_ratio: float = 0.0,
    declared: Sequence[int] = (),
    per_step: Sequence[int] = (),
) -> tuple[list[Update], list[Refused]]:
    """The valid updates, and for each other update its client and why it was refused, both sorted by client.

    An update whose change of the adapter is more than `max_norm_ratio` times as long as the median one is refused; 0 compares
    nothing. `declared[client]` is the largest number of samples that a client may weigh, and `per_step[client]` that of one
    optimizer step; if they are empty, none is known.
    """
    valid: list[Update] = []
    refused: list[Refused] = []
    for update in sorted(updates, key=lambda u: u.client):
        why = _reason_to_refuse(update, algorithm, state, info, declared, per_step)
        if why is None and any(update.client == other.client for other in valid):
            why = "a second update in the same round"
        if why is None:
            valid.append(update)
        else:
            refused.append({"client": update.client, "why": brief(why)})
    if max_norm_ratio and len(valid) >= ENOUGH:
        beyond = _beyond(valid, algorithm, state, info, max_norm_ratio)
        valid = [update for update in valid if update.client not in beyond]
        refused = sorted(refused + [{"client": c, "why": why} for c, why in beyond.items()], key=lambda row: int(row["client"]))
    return valid, refused


def _reason_to_refuse(
    update: Update, algorithm: Algorithm, state: State, info: RoundInfo, declared: Sequence[int], per_step: Sequence[int]
) -> str | None:
    if update.client not in info.sampled:
        return "not sampled in this round"
    if update.problem:
        return update.problem
    if why := _problem_with_numbers(update, info, declared, per_step):
        return why
    reference = algorithm.uploads(state, update.client, info)
    if update.groups.keys() != reference.keys():
        return f"groups {sorted(update.groups)} instead of {sorted(reference)}"
    for group in sorted(reference):
        if why := problem_with(update.groups[group], reference[group]):
            return why
    return algorithm.refuse(update, state, info)


def _problem_with_numbers(update: Update, info: RoundInfo, declared: Sequence[int], per_step: Sequence[int]) -> str | None:
    """Why the counts or the metrics of an update cannot be right; None if they can."""
    if update.examples < 1 or update.steps < 1:
        return "no examples"
    if max(update.examples, update.steps) > MAX_COUNT:
        return "a number of samples or steps that no client has"
    if declared and update.examples > declared[update.client]:
        return f"trained on {update.examples} samples, and has {declared[update.client]} in a round"
    if update.steps > update.examples:
        return f"{update.steps} steps on {update.examples} samples"
    if per_step and update.examples > update.steps * per_step[update.client]:
        return f"{update.examples} samples in {update.steps} steps of {per_step[update.client]}"
    if update.steps > (allowed := info.steps.get(update.client, MAX_COUNT)):
        return f"{update.steps} steps, and was asked for {allowed}"
    loss, padding = update.metrics.get("loss", 0.0), update.metrics.get("padding", 0.0)
    if not abs(loss) <= MAX_METRIC:
        return "NaN or infinity in the training loss"
    return None if 0 <= padding <= 1 else f"padding = {padding:g} is not a share"


def _beyond(
    updates: Sequence[Update], algorithm: Algorithm, state: State, info: RoundInfo, max_norm_ratio: float
) -> dict[int, str]:
    """Client -> why its update is too long, for those that are.

    A change that is no longer than the adapter itself, or than 1, is never refused: most clients may have changed next to
    nothing.
    """
    lengths = {update.client: change_norms(update, algorithm, state, info) for update in updates}
    shortest = max(norm(state.get("adapter", {})), 1.0)
    beyond: dict[int, str] = {}
    for group in lengths[updates[0].client]:
        middle = median(by_group[group] for by_group in lengths.values())
        for client, by_group in lengths.items():
            if by_group[group] > max(max_norm_ratio * middle, shortest):
                what = "adapter" if group == "adapter" else f"adapter's {group!r}"
                beyond[client] = (
                    f"its change of the {what} has norm {by_group[group]:.3g}, more than train.max_norm_ratio = "
                    f"{max_norm_ratio:g} times the round's median, {middle:.3g}"
                )
    return beyond


def change_norms(update: Update, algorithm: Algorithm, state: State, info: RoundInfo) -> dict[str, float]:
    """The L2 norm of what the update would change, for each group of `algorithm.summed`."""
    return {group: norm(tensors) for group, tensors in changes_of(update, algorithm, state, info).items()}


def changes_of(update: Update, algorithm: Algorithm, state: State, info: RoundInfo) -> State:
    """What the update would change, for each group of `algorithm.summed`: of the adapter, the difference from what the client
    was sent."""
    sent = algorithm.message(state, update.client, info)
    return changes_since(sent, algorithm.restored(update, state, info).groups, algorithm.summed)


def changes_since(message: State, groups: State, summed: Sequence[str]) -> State:
    """What an uncompressed upload changes, for each of the groups `summed`: of the adapter, the difference from the one in the
    message; the others are changes already."""
    sent = message.get("adapter", {})
    changes = {group: groups[group] for group in summed if group in groups}
    if "adapter" in changes:
        # In float64, where the difference of two float32 numbers does not overflow.
        changes["adapter"] = {n: t.double() - sent[n] if n in sent else t for n, t in changes["adapter"].items()}
    return changes
