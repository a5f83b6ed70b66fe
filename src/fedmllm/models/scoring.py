"""Closed questions answered by scoring: the log-probability of each option, in far less than it takes to generate one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from fedmllm.models.encoded import Encoded
    from fedmllm.models.mllm import MLLM


def option_scores(model: MLLM, batch: Sequence[Encoded], clients: int = 1) -> list[list[float]]:
    """For each closed question the log-probability of each option, normalised over the options.

    One forward pass: after what all options begin with, the next token tells them apart. Options of which one begins
    another, or that no one token tells apart, are scored whole. Under a stack of adapters the batch holds the same questions
    for each of its `clients`, one client after the other.
    """
    heads = [_telling_token(one.options) for one in batch]
    scores: list[list[float]] = [[] for _ in batch]
    single = [(i, n) for i, n in enumerate(heads) if n is not None]
    if single:
        asked = [batch[i] for i, _ in single]
        logits = model.last_logits(asked, [batch[i].options[0][:n] for i, n in single], 1)[:, 0]
        for row, (i, n) in enumerate(single):
            picked = logits[row, [option[n] for option in batch[i].options]]
            scores[i] = functional.log_softmax(picked, dim=-1).tolist()
    family = model.backbone.family
    whole = _continued if family.continues and family.first_position is not None else _repeated
    each = len(batch) // clients
    for first in _groups([i for i, n in enumerate(heads[:each]) if n is None], batch[:each]):
        group = [client * each + i for client in range(clients) for i in first]
        questions = [batch[i] for i in group]
        totals = torch.split(whole(model, questions), [len(one.options) for one in questions])
        for i, total in zip(group, totals, strict=True):
            scores[i] = functional.log_softmax(total, dim=-1).tolist()
    return scores


def _telling_token(options: Sequence[Sequence[int]]) -> int | None:
    """How many tokens all options share before the one that tells them apart; None where none does for all."""
    shared = 0
    while all(len(option) > shared for option in options):
        column = [option[shared] for option in options]
        if len(set(column)) == len(column):
            return shared
        if len(set(column)) > 1:
            return None
        shared += 1
    return None


def _groups(indices: Sequence[int], batch: Sequence[Encoded]) -> Iterator[list[int]]:
    """Runs of questions that together have no more options than `batch` has rows, or one question with more."""
    group: list[int] = []
    for i in indices:
        if group and sum(len(batch[k].options) for k in [*group, i]) > len(batch):
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def _log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """(rows): the sum of the log-probabilities of `labels` (rows, tokens), of which −100 do not count."""
    losses = functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
    return -losses.view(labels.shape).sum(1)


def _continued(model: MLLM, batch: Sequence[Encoded]) -> Tensor:
    """(options of all questions): log-probabilities. A prompt is computed once, whatever the number of its options: they go on
    from copies of its keys and values."""
    inputs = model.collate(batch, [()] * len(batch))
    made = model.backbone.model(**inputs, use_cache=True, **model.only_last(1))
    device = made.logits.device
    owner = torch.tensor([i for i, one in enumerate(batch) for _ in one.options], device=device)
    options = [option for one in batch for option in one.options]
    totals = _log_likelihood(made.logits[owner, -1:], torch.tensor([option[:1] for option in options], device=device))
    more = max(map(len, options)) - 1
    if not more:
        return totals
    made.past_key_values.batch_select_indices(owner)
    ids = torch.tensor([[*o[:-1], *[model.backbone.pad_id] * (more + 1 - len(o))] for o in options], device=device)
    labels = torch.tensor([[*o[1:], *[-100] * (more + 1 - len(o))] for o in options], device=device)
    logits = model.backbone.model(
        input_ids=ids,
        attention_mask=torch.cat([inputs["attention_mask"][owner], (labels != -100).long()], dim=1),
        position_ids=inputs["position_ids"][owner, -1:] + 1 + torch.arange(more, device=device),
        past_key_values=made.past_key_values,
        use_cache=True,
    ).logits
    return totals + _log_likelihood(logits, labels)


def _repeated(model: MLLM, batch: Sequence[Encoded]) -> Tensor:
    """As `_continued`, with the prompt beside each option: for families whose positions or caches do not allow the other."""
    rows = [one for one in batch for _ in one.options]
    options = [option for one in batch for option in one.options]
    longest = max(map(len, options))
    logits = model.last_logits(rows, options, longest + 1)[:, :-1]
    return _log_likelihood(logits, torch.tensor([[-100] * (longest - len(o)) + list(o) for o in options], device=logits.device))


__all__ = ["option_scores"]
