"""attribution: what image and text contribute to the answers, per sample, class and client, and how well calibrated they are.

A modality's gain on a sample is v(all that it has) − v(all but this modality), where v is the probability of the right option
of a closed question, and for an open one 1 if the answer is right, else 0. Of samples with both modalities, the Shapley value
(Shapley 1953) shares the score out between the two:

    φ_image = ½ [v(image) − v(∅)] + ½ [v(both) − v(text)],    φ_image + φ_text = v(both) − v(∅),

where v is the task's metric on these samples and ∅ the question alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmllm.data.samples import MODALITIES, Modality, Sample
from fedmllm.evaluation.calibration import calibration
from fedmllm.evaluation.suites import Exam, Findings, Replies, Suite, suites

Values = Mapping[str, NDArray[np.float64]]
"""id of a sample -> (models,) values."""
_NAMES: dict[Modality, str] = {"image": "picture", "text": "text"}
_NOISE = 1e-6
"""Smaller gains are the rounding errors of equal answers."""
_SHOWN = 20
"""The table has no more classes than this; the details have all."""


@suites.register("attribution")
def attribution() -> Suite:
    """What image and text contribute, per sample, class and client; Shapley values; calibration."""
    return examine


def examine(exam: Exam) -> Findings:
    """Ask every sample with all that it has, with each modality alone, and with its question alone."""
    findings, nothing = Findings(), [sample.showing(frozenset()) for sample in exam.samples]
    views = {str(pattern): models for pattern, models in exam.ask(exam.samples, ("both", "image", "text")).items()}
    views["none"] = exam.ask(nothing, ("both",))["both"]
    samples = [sample for sample in exam.samples if sample.id in views["both"][0]]
    values = {view: _values(samples, models) for view, models in views.items()}
    gains = {
        m: {s.id: values["both"][s.id] - _without(values, s, m)[s.id] for s in samples if m in s.modalities} for m in MODALITIES
    }
    for modality, of_samples in gains.items():
        if not of_samples:
            findings.unavailable.append(f"No test sample has a {_NAMES[modality]}, so that it gains nothing.")
    findings.tables["gains"] = {
        m: _spread(np.stack(list(of_samples.values()))) for m, of_samples in gains.items() if of_samples
    }
    _shapley(exam, samples, views, findings)
    _by_class(samples, gains, findings)
    _by_client(exam, samples, values, gains, findings)
    _calibration(exam, samples, views, findings)
    return findings


def _values(samples: Sequence[Sample], models: Sequence[Replies]) -> Values:
    def value(sample: Sample, replies: Replies) -> float:
        reply = replies[sample.id]
        right = sample.choices.index(sample.answer) if sample.choices and reply.probabilities else None
        return float(reply.correct) if right is None else reply.probabilities[right]

    return {s.id: np.array([value(s, replies) for replies in models]) for s in samples if s.id in models[0]}


def _without(values: Mapping[str, Values], sample: Sample, modality: Modality) -> Values:
    """The values of the view that shows all of the sample but the modality."""
    (rest,) = sample.modalities - {modality} or ("none",)
    return values[rest]


def _spread(gains: NDArray[np.float64]) -> dict[str, float | int]:
    """(samples, models) gains: their mean, and the shares that are above and below 0. `n` counts samples."""
    return {
        "n": len(gains),
        "gain": float(gains.mean()),
        "helped": float((gains > _NOISE).mean()),
        "harmed": float((gains < -_NOISE).mean()),
    }


def _shapley(exam: Exam, samples: Sequence[Sample], views: Mapping[str, Sequence[Replies]], findings: Findings) -> None:
    paired = [sample.id for sample in samples if len(sample.modalities) == 2]
    if not paired:
        findings.unavailable.append("No test sample has both a picture and a text, so that there are no Shapley values.")
        return
    v = {
        view: exam.score([{i: replies[i] for i in paired} for replies in views[view]]) for view in ("none", *MODALITIES, "both")
    }
    image = (v["image"] - v["none"] + v["both"] - v["text"]) / 2
    text = (v["text"] - v["none"] + v["both"] - v["image"]) / 2
    findings.tables["shapley"] = {"score": {"n": len(paired), **v, "shapley_image": image, "shapley_text": text}}


def _mean(values: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """(models,): the mean over samples; NaN without any."""
    return np.mean(values, axis=0) if values else np.array([np.nan])


def _by_class(samples: Sequence[Sample], gains: Mapping[Modality, Values], findings: Findings) -> None:
    classes: dict[str, list[Sample]] = {}
    for sample in samples:
        classes.setdefault(sample.label or sample.answer, []).append(sample)
    rows: dict[str, dict[str, float | int]] = {}
    for name, members in sorted(classes.items(), key=lambda item: (-len(item[1]), item[0])):
        of_class: dict[str, float] = {
            m: float(_mean([gains[m][s.id] for s in members if s.id in gains[m]]).mean()) for m in MODALITIES
        }
        rows[name] = {"n": len(members), **of_class}
    findings.tables["classes"] = dict(list(rows.items())[:_SHOWN])
    findings.details["classes"] = rows


def _by_client(
    exam: Exam, samples: Sequence[Sample], values: Mapping[str, Values], gains: Mapping[Modality, Values], findings: Findings
) -> None:
    """What each client gains: the gains on samples of each kind, weighted by how many of its own samples are of this kind. A
    modality that a sample lacks gains nothing there."""
    paired = [sample.id for sample in samples if len(sample.modalities) == 2]
    both = {m: _mean([gains[m][i] for i in paired]) for m in MODALITIES}
    alone = {m: _mean([v - values["none"][i] for i, v in values[m].items()]) for m in MODALITIES}
    rows: list[dict[str, Any]] = []
    owners = exam.owners or range(len(exam.counts))
    for model, client in enumerate(owners):
        counts = exam.counts[client, :3].tolist() if client < len(exam.counts) else []
        if not sum(counts):
            continue
        row: dict[str, Any] = {"client": client}
        for number, modality in zip(counts[1:], MODALITIES, strict=True):
            of_model = [
                (n, g[model] if exam.owners and len(g) > 1 else g.mean())
                for n, g in ((counts[0], both[modality]), (number, alone[modality]))
                if n
            ]
            row[modality] = float(sum(n * g for n, g in of_model) / sum(counts))
        rows.append(row)
    findings.details["clients"] = rows
    if not rows:
        findings.unavailable.append("No client holds data of this task, so that there is no gain by client.")
        return
    by_modality = {m: np.array([row[m] for row in rows]) for m in MODALITIES}
    findings.tables["clients"] = {
        m: {"n": len(g), "mean": float(g.mean()), "sd": float(g.std()), "lowest": float(g.min()), "highest": float(g.max())}
        for m, g in by_modality.items()
    }


def _calibration(exam: Exam, samples: Sequence[Sample], views: Mapping[str, Sequence[Replies]], findings: Findings) -> None:
    """By pattern, over closed questions; the figures are means over the models, the curve is that of all their answers."""
    by_id = {sample.id: sample for sample in samples}
    rows: dict[str, dict[str, float | int]] = {}
    curves: dict[str, list[dict[str, Any]]] = {}
    for pattern in exam.patterns:
        ids = [i for i, reply in views[pattern][0].items() if reply.probabilities and i in by_id]
        right = [(by_id[i].choices or ()).index(by_id[i].answer) for i in ids]
        if not ids:
            continue
        models = [[replies[i].probabilities for i in ids] for replies in views[pattern]]
        of_models = [calibration(probabilities, right) for probabilities in models]
        pooled = calibration([p for probabilities in models for p in probabilities], right * len(models))
        means = {name: float(np.mean([getattr(c, name) for c in of_models])) for name in ("ece", "brier")}
        rows[pattern] = {"n": len(ids), **means}
        curves[pattern] = [asdict(of_bin) for of_bin in pooled.bins]
    findings.tables["calibration"] = rows
    findings.details["reliability"] = curves
    if not rows:
        findings.unavailable.append("No test question is closed, so that there are no probabilities to calibrate.")
