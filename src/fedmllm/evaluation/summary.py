"""The metrics of one or more models' predictions, with bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmllm.data.samples import Task
from fedmllm.evaluation.intervals import interval, mean_interval, resamples
from fedmllm.evaluation.metrics import auc, macro_f1, token_f1
from fedmllm.evaluation.predictions import Prediction


def primary_metric(task: Task) -> str:
    """The key of the task's metric in a summary."""
    return task.metric.replace("-", "_")


def summarise(
    task: Task, models: Sequence[Sequence[Prediction]], seed: int, bootstrap: int, judged: bool = False
) -> dict[str, dict[str, Any]]:
    """{pattern: {metric: value, metric_ci: [low, high], "n", "parse_failures"}}; metrics are shares of 1.

    `metric_n` is the number of samples that a metric covers, given only if it is less than `n`. `ceiling` is the best score
    of the task's metric that any model can reach, if the task knows it. `judged` adds the accuracy according to the judge's
    verdicts on open answers; closed answers count as without a judge.

    With several models (clients that trained alone or have personal models), each metric is the mean over models and the
    interval is that of the mean. The task's metric then also has a `…_worst_decile`: the mean over the lowest tenth of the
    models, rounded up.
    """
    patterns = list(dict.fromkeys(p.pattern for p in models[0]))
    return {
        name: _summarise_pattern(task, [[p for p in m if p.pattern == name] for m in models], seed, bootstrap, judged)
        | ({"ceiling": round(task.ceiling[name], 6)} if name in task.ceiling else {})
        for name in patterns
    }


def _summarise_pattern(task: Task, models: list[list[Prediction]], seed: int, bootstrap: int, judged: bool) -> dict[str, Any]:
    n = len(models[0])
    summary: dict[str, Any] = {"n": n, "parse_failures": round(sum(p.failed for m in models for p in m) / len(models))}
    for name, values in _sample_scores(models, judged).items():
        summary[name] = round(float(values.mean()), 6)
        summary[f"{name}_ci"] = [round(v, 6) for v in mean_interval(values, resamples(len(values), bootstrap, seed))]
    if judged and not all(p.closed for p in models[0]):
        failures = sum(p.judged is None for m in models for p in m if not p.closed)
        summary["judge_failures"] = round(failures / len(models))
    for name, (statistic, count) in _set_statistics(task, models).items():
        summary[name] = round(statistic(np.arange(count)), 6)
        summary[f"{name}_ci"] = [round(v, 6) for v in interval(statistic, resamples(count, bootstrap, seed))]
        if count < n:
            summary[f"{name}_n"] = count
    if len(models) > 1:
        scores = sorted(_score(task, m) for m in models)
        worst = scores[: math.ceil(len(scores) / 10)]
        summary[f"{primary_metric(task)}_worst_decile"] = round(float(np.mean(worst)), 6)
    return summary


def _sample_scores(models: list[list[Prediction]], judged: bool) -> dict[str, NDArray[np.float64]]:
    """The metrics that are means over samples: metric -> the score of each sample, averaged over the models."""
    correct = np.array([[p.correct for p in m] for m in models], dtype=np.float64).mean(axis=0)
    closed = np.array([p.closed for p in models[0]], dtype=bool)
    scores = {"accuracy": correct}
    if closed.any() and not closed.all():
        scores |= {"accuracy_closed": correct[closed], "accuracy_open": correct[~closed]}
    if not closed.all():
        overlap = [[token_f1(p.predicted, p.answer) for p in m if not p.closed] for m in models]
        scores["token_f1_open"] = np.array(overlap).mean(axis=0)
        if judged:
            verdicts = [[p.correct if p.closed else p.judged is True for p in m] for m in models]
            accepted = np.array(verdicts, dtype=np.float64).mean(axis=0)
            scores |= {"judged_accuracy": accepted, "judged_accuracy_open": accepted[~closed]}
    return {name: values for name, values in scores.items() if len(values)}


def _score(task: Task, model: list[Prediction]) -> float:
    """The task's metric for one model."""
    if task.metric == "accuracy":
        return float(np.mean([p.correct for p in model]))
    statistic, count = _set_statistics(task, [model])[primary_metric(task)]
    return statistic(np.arange(count))


Statistic = Callable[[NDArray[np.int64]], float]


def _set_statistics(task: Task, models: list[list[Prediction]]) -> dict[str, tuple[Statistic, int]]:
    """The metrics that are not means over samples: metric -> (a function of the drawn indices, the number of samples)."""
    if task.metric == "accuracy":
        return {}
    truth = np.array([p.answer for p in models[0]])
    # A correct answer belongs to its class however it is spelled.
    predicted = [np.array([p.answer if p.correct else p.predicted for p in m]) for m in models]

    def mean_f1(draw: NDArray[np.int64]) -> float:
        return float(np.mean([macro_f1(truth[draw], labels[draw]) for labels in predicted]))

    statistics: dict[str, tuple[Statistic, int]] = {"macro_f1": (mean_f1, len(truth))}
    if task.metric == "auc":
        # A sample whose choices do not include the positive answer has no score to be ranked by.
        ranked = np.array([i for i, p in enumerate(models[0]) if p.score is not None], dtype=np.int64)
        positive = truth[ranked] == task.positive
        scores = [np.array([m[i].score for i in ranked], dtype=np.float64) for m in models]
        hard_scores = [labels[ranked] == task.positive for labels in predicted]

        def mean_auc(models_scores: list[NDArray[Any]], draw: NDArray[np.int64]) -> float:
            return float(np.mean([auc(positive[draw], values[draw]) for values in models_scores]))

        statistics["auc"] = partial(mean_auc, scores), len(ranked)
        statistics["auc_hard"] = partial(mean_auc, hard_scores), len(ranked)
    return statistics
