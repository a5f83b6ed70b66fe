"""The metrics of one or more models' predictions, with intervals, and what guessing would score."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmllm.data.samples import Task
from fedmllm.evaluation.answers import Answers
from fedmllm.evaluation.intervals import auc_interval, macro_f1_interval, mean_interval
from fedmllm.evaluation.matching import folded, token_f1
from fedmllm.evaluation.metrics import ones
from fedmllm.evaluation.predictions import Prediction
from fedmllm.kinds import Match

Choices = Mapping[str, Sequence[str] | None]
"""id of a sample -> the options of its question, None if it is answered freely."""


def primary_metric(task: Task) -> str:
    """The key of the task's metric in a summary."""
    return task.metric.replace("-", "_")


def summarise(
    task: Task, models: Sequence[Sequence[Prediction]], match: Match, choices: Choices, judged: bool = False
) -> dict[str, dict[str, Any]]:
    """{pattern: {metric: value, metric_ci: [low, high], "n", "parse_failures"}}; metrics are shares of 1.

    `metric_n` is the number of samples that a metric covers, given only if less than `n`. For the task's metric, `majority` is
    the score of always giving the most frequent answer, `chance` that of guessing among the options, given if all questions
    have some, and `ceiling` the best that any model can reach, if the task knows it. `judged` adds the accuracy according to
    the judge's verdicts on open answers; closed answers count as without a judge.

    With several models (clients that trained alone or have personal models), each metric is the mean over models and the
    interval is that of the mean. The task's metric then also has a `…_worst_decile`: the mean over the lowest tenth of the
    models, rounded up.
    """
    summary = {}
    for name in dict.fromkeys(p.pattern for p in models[0]):
        of_pattern = [[p for p in model if p.pattern == name] for model in models]
        answers = Answers.of(of_pattern, task.positive, match)
        metrics = _summarise_pattern(task, answers, of_pattern, match, judged)
        metrics |= _references(task, answers, [choices.get(p.id) or () for p in of_pattern[0]])
        summary[name] = metrics | ({"ceiling": round(task.ceiling[name], 6)} if name in task.ceiling else {})
    return summary


def _summarise_pattern(
    task: Task, answers: Answers, models: list[list[Prediction]], match: Match, judged: bool
) -> dict[str, Any]:
    n = len(models[0])
    summary: dict[str, Any] = {"n": n, "parse_failures": round(sum(p.failed for m in models for p in m) / len(models))}
    for name, values in _sample_scores(answers, models, match, judged).items():
        summary[name] = round(float(values.mean()), 6)
        summary[f"{name}_ci"] = _rounded(mean_interval(values))
    if judged and not answers.closed.all():
        failures = sum(p.judged is None for m in models for p in m if not p.closed)
        summary["judge_failures"] = round(failures / len(models))
    if task.metric != "accuracy":
        score = float(answers.score("macro_f1", ones(n))[0])
        summary["macro_f1"] = round(score, 6)
        summary["macro_f1_ci"] = _rounded(
            macro_f1_interval(score, answers.truth, list(answers.predicted), list(answers.correct))
        )
    for name, scores in (("auc", answers.scores), ("auc_hard", answers.hard_scores)) if task.metric == "auc" else ():
        score = float(answers.score(name, ones(n))[0])
        summary[name] = round(score, 6)
        summary[f"{name}_ci"] = _rounded(auc_interval(score, answers.is_positive, scores))
        if len(answers.ranked) < n:
            summary[f"{name}_n"] = len(answers.ranked)
    if len(models) > 1:
        each = [Answers.of([model], task.positive, match).score(primary_metric(task), ones(n))[0] for model in models]
        worst = sorted(each)[: math.ceil(len(each) / 10)]
        summary[f"{primary_metric(task)}_worst_decile"] = round(float(np.mean(worst)), 6)
    return summary


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 6) for value in values]


def _sample_scores(
    answers: Answers, models: list[list[Prediction]], match: Match, judged: bool
) -> dict[str, NDArray[np.float64]]:
    """The metrics that are means over samples: metric -> the score of each sample, averaged over the models."""
    correct, closed = answers.correct.mean(axis=0), answers.closed
    scores = {"accuracy": correct}
    if closed.any() and not closed.all():
        scores |= {"accuracy_closed": correct[closed], "accuracy_open": correct[~closed]}
    if not closed.all():
        overlap = [[token_f1(p.predicted, p.answer, match) for p in m if not p.closed] for m in models]
        scores["token_f1_open"] = np.array(overlap).mean(axis=0)
        if judged:
            verdicts = [[p.correct if p.closed else p.judged is True for p in m] for m in models]
            accepted = np.array(verdicts, dtype=np.float64).mean(axis=0)
            scores |= {"judged_accuracy": accepted, "judged_accuracy_open": accepted[~closed]}
    return scores


def _references(task: Task, answers: Answers, options: Sequence[Sequence[str]]) -> dict[str, float]:
    """`majority` and `chance`, from the references and the `options` of each question. A guess's macro-F1 is that of the
    expected counts."""
    sizes = np.bincount(answers.truth)
    share = float(sizes.max() / len(options))
    if task.metric == "auc":
        majority = chance = 0.5
    elif task.metric == "accuracy":
        majority, chance = share, float(np.mean([1 / max(len(offered), 1) for offered in options]))
    else:
        majority = 2 * share / (1 + share) / len(sizes)
        hits, guesses = dict.fromkeys(answers.classes, 0.0), dict.fromkeys(answers.classes, 0.0)
        for name, offered in zip(answers.classes, options, strict=True):
            hits[name] += 1 / max(len(offered), 1)
            for option in map(folded, offered):
                if option in guesses:
                    guesses[option] += 1 / len(offered)
        counts = dict(zip(sorted(hits), sizes.tolist(), strict=True))
        chance = float(np.mean([2 * hits[name] / (counts[name] + guesses[name]) for name in hits]))
    return {"majority": round(majority, 6)} | ({"chance": round(chance, 6)} if all(options) else {})
