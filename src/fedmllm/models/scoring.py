"""Closed questions answered by scoring: the log-probability of each option, in much less time than generating an answer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fedmllm.models.encoded import Encoded
from fedmllm.models.mllm import MLLM


@torch.no_grad()
def option_scores(model: MLLM, batch: Sequence[Encoded], clients: int = 1) -> list[list[float]]:
    """The log-probability of each option of each closed question, normalised over the question's options.

    Under a stack of adapters the batch holds the same questions once per client, client by client. Raises FloatingPointError
    if a score is NaN.
    """
    scores = [of_question.tolist() for of_question in option_log_probabilities(model, batch, clients)]
    if any(math.isnan(score) for of_question in scores for score in of_question):
        raise FloatingPointError("the scores of the options are NaN")
    return scores


def option_log_probabilities(model: MLLM, batch: Sequence[Encoded], clients: int = 1) -> list[Tensor]:
    """As `option_scores`, with (options,) and a gradient for each question, and without its check.

    This takes one forward pass if the first token after the options' common beginning distinguishes them all. Otherwise,
    for instance if one option is the beginning of another, whole options are scored.
    """
    positions = [_distinguishing_position(question.options) for question in batch]
    scores: dict[int, Tensor] = {}
    by_token = [(i, n) for i, n in enumerate(positions) if n is not None]
    if by_token:
        questions = [batch[i] for i, _ in by_token]
        logits = model.last_logits(questions, [batch[i].options[0][:n] for i, n in by_token], 1)[:, 0]
        for row, (i, n) in enumerate(by_token):
            option_logits = logits[row, [option[n] for option in batch[i].options]]
            scores[i] = functional.log_softmax(option_logits, dim=-1)
    family = model.backbone.family
    score_whole = _score_from_cache if family.continues and family.first_position is not None else _score_repeated
    per_client = len(batch) // clients
    whole = [i for i, n in enumerate(positions[:per_client]) if n is None]
    for group in _groups(whole, batch[:per_client]):
        indices = [client * per_client + i for client in range(clients) for i in group]
        questions = [batch[i] for i in indices]
        totals = torch.split(score_whole(model, questions), [len(question.options) for question in questions])
        for i, total in zip(indices, totals, strict=True):
            scores[i] = functional.log_softmax(total, dim=-1)
    return [scores[i] for i in range(len(batch))]


def _distinguishing_position(options: Sequence[Sequence[int]]) -> int | None:
    """The first position at which the options differ, if all of them have different tokens there; else None."""
    for position, tokens in enumerate(zip(*options, strict=False)):  # up to the end of the shortest option
        if len(set(tokens)) == len(tokens):
            return position
        if len(set(tokens)) > 1:
            return None
    return None


def _groups(indices: Sequence[int], batch: Sequence[Encoded]) -> Iterator[list[int]]:
    """Groups of questions that together have at most as many options as `batch` has rows, or one question with more."""
    group: list[int] = []
    for i in indices:
        if group and sum(len(batch[k].options) for k in [*group, i]) > len(batch):
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def _log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """(rows): the sum of the log-probabilities of `labels` (rows, tokens); labels of −100 are ignored."""
    losses = functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
    return -losses.view(labels.shape).sum(1)


def _score_from_cache(model: MLLM, batch: Sequence[Encoded]) -> Tensor:
    """(options of all questions): log-probabilities. Each prompt is computed once, and its options continue from copies of its
    keys and values."""
    inputs = model.collate(batch, [()] * len(batch))
    output = model.backbone.model(**inputs, use_cache=True, **model.keep_last_logits(1))
    device = output.logits.device
    owner = torch.tensor([i for i, question in enumerate(batch) for _ in question.options], device=device)
    options = [option for question in batch for option in question.options]
    totals = _log_likelihood(output.logits[owner, -1:], torch.tensor([option[:1] for option in options], device=device))
    rest = max(map(len, options)) - 1
    if not rest:
        return totals
    output.past_key_values.batch_select_indices(owner)
    ids = torch.tensor([[*o[:-1], *[model.backbone.pad_id] * (rest + 1 - len(o))] for o in options], device=device)
    labels = torch.tensor([[*o[1:], *[-100] * (rest + 1 - len(o))] for o in options], device=device)
    logits = model.backbone.model(
        input_ids=ids,
        attention_mask=torch.cat([inputs["attention_mask"][owner], (labels != -100).long()], dim=1),
        position_ids=inputs["position_ids"][owner, -1:] + 1 + torch.arange(rest, device=device),
        past_key_values=output.past_key_values,
        use_cache=True,
    ).logits
    return totals + _log_likelihood(logits, labels)


def _score_repeated(model: MLLM, batch: Sequence[Encoded]) -> Tensor:
    """As `_score_from_cache`, with the prompt repeated per option: for families whose positions or cache require it."""
    rows = [question for question in batch for _ in question.options]
    options = [option for question in batch for option in question.options]
    longest = max(map(len, options))
    logits = model.last_logits(rows, options, longest + 1)[:, :-1]
    return _log_likelihood(logits, torch.tensor([[-100] * (longest - len(o)) + list(o) for o in options], device=logits.device))
