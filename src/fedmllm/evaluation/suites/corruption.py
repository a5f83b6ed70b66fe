"""corruption: the score on test samples whose pictures or texts are bad, by kind and severity."""

from __future__ import annotations

import numpy as np

from fedmllm.data.corruptions import KINDS, SEVERITIES, OtherTexts, corrupted
from fedmllm.data.samples import MODALITIES, Modality
from fedmllm.evaluation.predictions import PATTERNS
from fedmllm.evaluation.suites import Exam, Findings, Replies, Suite, suites
from fedmllm.kinds import Pattern

_NAMES: dict[Modality, str] = {"image": "picture", "text": "text"}


@suites.register("corruption")
def corruption() -> Suite:
    """How the score falls as pictures and texts become worse, by kind and severity (after 1903.12261)."""
    return examine


def examine(exam: Exam) -> Findings:
    """Every kind of `data.corruptions` at severities 0 to 5, of the modalities that a pattern shows.

    The curve is the mean score over the kinds; `robustness` is the mean over kinds and severities 1 to 5 of the score,
    divided by that of the plain test. A sample without the modality stays as it is and is still counted.
    """
    findings = Findings()
    plain = exam.ask(exam.samples, exam.patterns)
    curves: dict[Pattern, dict[str, list[float]]] = {pattern: {} for pattern in exam.patterns}
    for modality in MODALITIES:
        patterns = [pattern for pattern in exam.patterns if modality in PATTERNS[pattern]]
        if not any(modality in sample.modalities for sample in exam.samples):
            findings.unavailable.append(f"No test sample has a {_NAMES[modality]}, so that there is none to corrupt.")
        elif patterns:
            for kind in KINDS[modality]:
                by_severity = [_scores(exam, plain, patterns, modality, kind, severity) for severity in (0, *SEVERITIES)]
                for pattern in patterns:
                    curves[pattern][kind] = [scores[pattern] for scores in by_severity]
    findings.tables["robustness"] = {pattern: _row(list(kinds.values())) for pattern, kinds in curves.items() if kinds}
    findings.details["scores"] = curves
    return findings


def _scores(
    exam: Exam, plain: dict[Pattern, list[Replies]], patterns: list[Pattern], modality: Modality, kind: str, severity: int
) -> dict[Pattern, float]:
    """The score under each pattern if the modality of every sample is as bad as `severity` says."""
    texts = OtherTexts(sample.text for sample in exam.samples if sample.text)
    worse = [corrupted(sample, modality, kind, severity, exam.seed, texts) for sample in exam.samples]
    changed = [now for now, before in zip(worse, exam.samples, strict=True) if now is not before]
    replies = exam.ask(changed, patterns) if changed else plain
    return {
        pattern: exam.score([before | now for before, now in zip(plain[pattern], replies[pattern], strict=True)])
        for pattern in patterns
    }


def _row(curves: list[list[float]]) -> dict[str, float]:
    """The mean curve over the kinds, and the mean relative robustness; NaN if the plain score is 0."""
    scores = np.array(curves)  # (kinds, severities from 0)
    clean, means = float(scores[0, 0]), scores.mean(axis=0)
    row = {"clean": clean} | {f"severity_{severity}": float(means[severity]) for severity in SEVERITIES}
    return row | {"robustness": float(np.mean(scores[:, 1:])) / clean if clean else float("nan")}
