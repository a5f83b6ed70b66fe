"""cross-modal: do the answers combine picture and text, which of the two do they follow if they contradict each other, and does
something irrelevant beside a question change them?"""

from __future__ import annotations

import io
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from fedmllm.data.images import image_key
from fedmllm.data.samples import Sample
from fedmllm.evaluation.matching import normal_form
from fedmllm.evaluation.predictions import Prediction
from fedmllm.evaluation.suites import Exam, Findings, Replies, Suite, suites
from fedmllm.kinds import Match
from fedmllm.rng import stream

Key = Callable[[Sample], Hashable]


@suites.register("cross-modal")
def cross_modal() -> Suite:
    """Contrast pairs, of which both must be right; contradicting modalities; an irrelevant picture or text."""
    return examine


def examine(exam: Exam) -> Findings:
    """Each part is left out, with a sentence, if the task has no samples for it."""
    findings, plain = Findings(), exam.ask(exam.samples, ("both", "image", "text"))
    samples = [sample for sample in exam.samples if sample.id in plain["both"][0]]
    paired = [sample for sample in samples if len(sample.modalities) == 2]
    _contrast(exam, paired, plain["both"], findings)
    _contradiction(exam, paired, plain["image"], plain["text"], findings)
    _irrelevant(exam, samples, plain["both"], findings)
    return findings


def _answer(sample: Sample, match: Match) -> str:
    """The reference, equal for two answers to a question that are the same."""
    return sample.answer if sample.choices else normal_form(sample.answer, match)


def _given(reply: Prediction, sample: Sample, match: Match) -> str:
    """The answer that was given, comparable with `_answer`."""
    return normal_form(reply.predicted, match) if reply.option is None else (sample.choices or ())[reply.option]


def _question(sample: Sample) -> Hashable:
    return sample.question, sample.choices


def _text(sample: Sample) -> Hashable:
    return sample.text


def _picture(sample: Sample) -> Hashable:
    return tuple(map(image_key, sample.pictures))


def contrast_pairs(samples: Sequence[Sample], same: Key, other: Key, match: Match) -> list[tuple[Sample, Sample]]:
    """Pairs of samples with the same question, in which `same` is equal, `other` and the answer differ; a sample is in one pair
    at most. The two most frequent answers that are left in a group are paired first."""
    groups: dict[Hashable, dict[Hashable, Sample]] = {}
    for sample in sorted(samples, key=lambda s: s.id):
        groups.setdefault((same(sample), _question(sample)), {}).setdefault(other(sample), sample)
    pairs = []
    for group in groups.values():
        by_answer: dict[str, list[Sample]] = {}
        for sample in group.values():
            by_answer.setdefault(_answer(sample, match), []).append(sample)
        while len(by_answer) > 1:
            first, second = sorted(by_answer, key=lambda answer: (-len(by_answer[answer]), answer))[:2]
            pairs.append((by_answer[first].pop(0), by_answer[second].pop(0)))
            by_answer = {answer: left for answer, left in by_answer.items() if left}
    return pairs


def _contrast(exam: Exam, paired: Sequence[Sample], models: Sequence[Replies], findings: Findings) -> None:
    """How often both answers of a pair are right, how often one of the halves is, and how often both get the same answer, which
    what differs then has not changed."""
    rows: dict[str, dict[str, float | int]] = {}
    for row, same, other, missing in (
        ("same_text", _text, _picture, "a text and differ in picture and answer"),
        ("same_picture", _picture, _text, "a picture and differ in text and answer"),
    ):
        pairs = contrast_pairs(paired, same, other, exam.match)
        if not pairs:
            findings.unavailable.append(f"No two test samples share a question and {missing}, so that there are no such pairs.")
            continue
        right = np.array([[(r[a.id].correct, r[b.id].correct) for a, b in pairs] for r in models])  # (models, pairs, 2)
        equal = [[_given(r[a.id], a, exam.match) == _given(r[b.id], b, exam.match) for a, b in pairs] for r in models]
        rows[row] = {
            "pairs": len(pairs),
            "both_right": float(right.all(axis=2).mean()),
            "half_right": float(right.mean()),
            "same_answer": float(np.mean(equal)),
        }
    findings.tables["contrast"] = rows


def _contradiction(
    exam: Exam, paired: Sequence[Sample], by_image: Sequence[Replies], by_text: Sequence[Replies], findings: Findings
) -> None:
    """Each picture with the text of a sample that has the same question and another answer: whose answer is given?

    The second row has only pairs whose picture alone and whose text alone the model answers right, each for its own sample.
    """
    donors: dict[Hashable, dict[str, list[Sample]]] = {}
    for sample in sorted(paired, key=lambda s: s.id):
        donors.setdefault(_question(sample), {}).setdefault(_answer(sample, exam.match), []).append(sample)
    others = {  # of every question and answer, the samples with another answer
        (question, answer): [s for name, members in by_answer.items() if name != answer for s in members]
        for question, by_answer in donors.items() for answer in by_answer
    }  # fmt: skip
    mixed: dict[str, tuple[Sample, Sample]] = {}
    for sample in paired:
        if candidates := others[_question(sample), _answer(sample, exam.match)]:
            donor = candidates[int(stream(exam.seed, "contradiction", sample.id).integers(len(candidates)))]
            mixed[sample.id] = replace(sample, text=donor.text), donor
    if not mixed:
        what = "share a question, have both modalities and differ in the answer"
        findings.unavailable.append(f"No two test samples {what}, so that no text contradicts a picture.")
        return
    models = exam.ask([sample for sample, _ in mixed.values()], ("both",))["both"]
    outcomes, known = [], []
    for replies, image, text in zip(models, by_image, by_text, strict=True):
        for sample_id, reply in replies.items():
            sample, donor = mixed[sample_id]
            given = _given(reply, sample, exam.match)
            outcomes.append((reply.correct, given == _answer(donor, exam.match)))
            known.append(image[sample_id].correct and text[donor.id].correct)
    rows = {"all": np.array(outcomes), "each_right_alone": np.array(outcomes)[np.array(known)]}
    findings.tables["contradiction"] = {
        name: {
            "n": round(len(of_row) / len(models)),
            "follows_picture": float(of_row[:, 0].mean()) if len(of_row) else float("nan"),
            "follows_text": float(of_row[:, 1].mean()) if len(of_row) else float("nan"),
        }
        for name, of_row in rows.items()
    }


def _irrelevant(exam: Exam, samples: Sequence[Sample], plain: Sequence[Replies], findings: Findings) -> None:
    """A picture drawn at random beside questions without one, and a text beside questions about a picture alone: the share of
    answers that change, and how far the probabilities of closed questions move (total variation, ½ Σ |p − q|)."""
    rows: dict[str, dict[str, float | int]] = {}
    pictures = [s.image for s in samples if s.image is not None] or [noise_picture(exam.seed)]
    texts = [s.text for s in samples if s.text is not None]
    without_picture = {s.id: s for s in samples if s.image is None}
    without_text = {s.id: s for s in samples if s.modalities == {"image"}} if texts else {}
    for row, alone, missing in (
        ("picture_beside_text", without_picture, "is without a picture, so that none is irrelevant to it"),
        (
            "text_beside_picture",
            without_text,
            "has a picture alone while others have a text, so that no text is irrelevant to it",
        ),
    ):
        if not alone:
            findings.unavailable.append(f"No test sample {missing}.")
            continue
        beside = []
        for sample in alone.values():
            rng = stream(exam.seed, "irrelevant", sample.id)
            if row == "picture_beside_text":
                beside.append(replace(sample, image=pictures[int(rng.integers(len(pictures)))]))
            else:
                beside.append(replace(sample, text=texts[int(rng.integers(len(texts)))]))
        moved, changed = [], []
        for before, after in zip(plain, exam.ask(beside, ("both",))["both"], strict=True):
            for sample_id, reply in after.items():
                earlier, sample = before[sample_id], alone[sample_id]
                changed.append(_given(reply, sample, exam.match) != _given(earlier, sample, exam.match))
                if reply.probabilities:
                    moved.append(np.abs(np.subtract(reply.probabilities, earlier.probabilities)).sum() / 2)
        total = float(np.mean(moved)) if moved else float("nan")
        rows[row] = {"n": len(alone), "changed": float(np.mean(changed)), "total_variation": total}
    findings.tables["irrelevant"] = rows


def noise_picture(seed: int, side: int = 64) -> bytes:
    """A picture of nothing, for tasks without pictures, with edges of `side` pixels; a PNG."""
    pixels = stream(seed, "noise picture").integers(0, 256, (side, side, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()
