"""Counts of the samples of a data set, of its problems, and of the samples of each client."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import entr  # scipy.stats takes forty megabytes more

from fedmllm.data.differences import difference_lines, noise_shares, presence, rounds_shown, schedule_counts
from fedmllm.data.manifest import Manifest
from fedmllm.data.samples import Loaded, Problem, Sample, Split
from fedmllm.data.scenarios import BOTH, IMAGE, NONE, TEXT, Modalities, Scenario
from fedmllm.data.stored import Samples

MAX_CLASSES_SHOWN = 5
"""The text names no more classes than this; a question-answering set can have hundreds."""
PATTERNS: dict[str, Modalities] = {"both": BOTH, "image": IMAGE, "text": TEXT, "none": NONE}
"""The patterns in the order of `Manifest.patterns`."""
_WORDS = {"both": "with image and text", "image": "with image only", "text": "with text only", "none": "with neither"}


def summarise(loaded_splits: Sequence[tuple[Split, Loaded]]) -> dict[str, dict[str, Any]]:
    """{split: {"samples": number of usable samples, "classes": {label: samples}, "modalities": {both, image, text, none:
    samples}, "bad_samples": {kind: number}, "majority": {"answer": the most frequent one, "share": of the samples},
    "stretched": number of pictures whose 16-bit grey is stretched}}, the largest class and kind first. A split that occurs
    twice, because the task has a companion, is added up.
    """
    splits: dict[str, dict[str, Any]] = {}
    for split in dict.fromkeys(split for split, _ in loaded_splits):
        problems = [p for name, loaded in loaded_splits if name == split for p in loaded.problems]
        labels, said, patterns = Counter[str](), Counter[str](), Counter[Modalities]()
        for sample in (s for name, loaded in loaded_splits if name == split for s in loaded.samples):
            labels[sample.label] += 1
            said[sample.answer] += 1
            patterns[sample.modalities] += 1
        answers, samples = _largest_first(said), said.total()
        answer = next(iter(answers), "")
        splits[split] = {
            "samples": samples,
            "classes": _largest_first(labels),
            "modalities": {name: patterns[visible] for name, visible in PATTERNS.items()},
            "bad_samples": _largest_first(Counter(p.kind for p in problems)),
            "majority": {"answer": answer, "share": round(answers[answer] / samples, 6) if samples else 0.0},
            "stretched": sum(loaded.stretched for name, loaded in loaded_splits if name == split),
        }
    return splits


def _largest_first(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def summary_lines(splits: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The summary as lines of text."""
    for split, counts in splits.items():
        patterns = [f"{count} {_WORDS[name]}" for name, count in counts["modalities"].items() if count]
        yield f"{split}: {counts['samples']} samples" + (f", {', '.join(patterns)}" if patterns else "")
        classes = counts["classes"]
        shown = [f"{label or '(none)'} {count}" for label, count in list(classes.items())[:MAX_CLASSES_SHOWN]]
        rest = [f"and {len(classes) - MAX_CLASSES_SHOWN} more"] if len(classes) > MAX_CLASSES_SHOWN else []
        yield f"  classes ({len(classes)}): {', '.join(shown + rest)}" if classes else "  no classes"
        if counts["samples"]:
            answer, share = counts["majority"]["answer"], counts["majority"]["share"]
            yield f"  most frequent answer: {answer[:60]!r}, that of {100 * share:.1f} % of the samples"
        if counts["stretched"]:
            yield f"  pictures of 16-bit grey, each stretched by its own range: {counts['stretched']}"
        if counts["bad_samples"]:
            yield f"  bad samples {count_line(counts['bad_samples'])}"


def add_problems(splits: dict[str, dict[str, Any]], problems: Mapping[Split, Sequence[Problem]]) -> dict[Split, dict[str, int]]:
    """Count further problems among the bad samples of `splits`, a summary; {split: {kind: number}} of these alone."""
    added = {split: _largest_first(Counter(p.kind for p in found)) for split, found in problems.items() if found}
    for split, kinds in added.items():
        counts = splits.get(split, splits["train"])  # questions may be held out of the training data
        counts["bad_samples"] = _largest_first(Counter(counts["bad_samples"]) + Counter(kinds))
    return added


def count_line(counts: Mapping[str, int]) -> str:
    """ "(3): missing picture 2, duplicate id 1"."""
    return f"({sum(counts.values())}): {', '.join(f'{kind} {count}' for kind, count in counts.items())}"


def gaps(manifest: Manifest) -> list[float]:
    """For each client, the share of its (sample, modality) slots that are empty; 1 if it holds nothing."""
    return [round(1 - (image + text) / (2 * n), 6) if n else 1.0 for n, image, text in manifest.counts().tolist()]


def client_rows(manifest: Manifest) -> list[dict[str, Any]]:
    """One row per client: its number of `samples`, how many have a visible `image` and `text`, and its `gap`."""
    rows = zip(manifest.counts().tolist(), gaps(manifest), strict=True)
    return [
        {"client": client, "samples": n, "image": image, "text": text, "gap": gap}
        for client, ((n, image, text), gap) in enumerate(rows)
    ]


def modality_shares(manifest: Manifest, samples: Sequence[Sample], scenario: Scenario) -> dict[str, Any]:
    """How often the clients' samples show both modalities, the image only, the text only, and none: the effective rates, over
    all rounds if they change.

    {"drawn": {both, image, text, none: share of the manifest's samples}, "expected": the same over all draws of the scenario
    for these samples, None if it is not known, "dropped": the number of `samples` that no client holds, "absence": what these
    four patterns say about the class (`absence`), "presence": how much the clients differ (`presence`), "changes": what the
    schedule does, or None (`schedule_counts`), "noise": what is corrupted (`noise_shares`)}. `samples` is empty if they are
    elsewhere.
    """
    shown = rounds_shown(manifest)
    drawn = dict(zip(PATTERNS, shown.sum(axis=0).tolist(), strict=True))
    dropped = len(samples) - len(manifest) if samples else 0
    expected = None
    if samples and scenario.expected is not None and not manifest.schedule.changes:
        totals = dict.fromkeys(PATTERNS.values(), 0.0)
        for kind, count in Counter(Samples.of(samples).modalities()).items():
            for visible, probability in scenario.expected(kind, manifest.clients).items():
                totals[visible] += count * probability
        expected = _shares(dict(zip(PATTERNS, totals.values(), strict=True)))
    return {
        "drawn": _shares(drawn),
        "expected": expected,
        "dropped": dropped,
        "absence": absence(manifest, samples, shown),
        "presence": presence(manifest, shown),
        "changes": schedule_counts(manifest),
        "noise": noise_shares(manifest, shown),
    }


def absence(manifest: Manifest, samples: Sequence[Sample], shown: NDArray[np.int32] | None = None) -> dict[str, float] | None:
    """How well the visible modalities of a sample alone predict its class, over the rounds: {"majority": share of the largest
    class, "accuracy": share of the samples in the largest class of their pattern, "information": mutual information of pattern
    and class as a share of the entropy of the class}. All are of the samples at hand, so the last two are slightly optimistic.
    None for fewer than two classes. `shown` is `rounds_shown(manifest)`, if it is at hand.
    """
    stored, numbers = Samples.of(samples).ordered(), dict[str, int]()
    labels = np.fromiter((numbers.setdefault(s.label, len(numbers)) for s in stored), np.int32, len(stored))
    classes = sorted(numbers)
    if len(classes) < 2:
        return None
    sorted_place = np.argsort([numbers[label] for label in classes])
    columns = sorted_place[labels][stored.places(manifest.ids)]
    shown = rounds_shown(manifest) if shown is None else shown
    counts = np.stack([np.bincount(columns, weights=rounds, minlength=len(classes)) for rounds in shown.T])
    joint = counts / counts.sum()
    by_pattern, by_class = (float(entr(joint.sum(axis=axis)).sum()) for axis in (1, 0))
    information = (by_pattern + by_class - float(entr(joint).sum())) / by_class if by_class else 0.0
    figures = {"majority": joint.sum(axis=0).max(), "accuracy": joint.max(axis=1).sum(), "information": max(information, 0.0)}
    return {name: round(float(value), 6) for name, value in figures.items()}


def _shares(counts: Mapping[str, float]) -> dict[str, float]:
    total = sum(counts.values()) or 1
    return {name: round(count / total, 6) for name, count in counts.items()}


def shares_lines(shares: Mapping[str, Any]) -> Iterator[str]:
    """The outcome of `modality_shares` as lines of text."""
    for when, what in (("drawn", "as drawn"), ("expected", "expected")):
        if shares[when]:
            parts = [f"{100 * share:.1f} % {_WORDS[name]}" for name, share in shares[when].items()]
            yield f"clients' samples, {what}: {', '.join(parts)}"
    if shares["dropped"]:
        yield f"{shares['dropped']} samples that lost all they had are dropped"
    yield from difference_lines(shares)
    if (told := shares["absence"]) and told["information"] >= 0.01:
        yield (
            f"which modalities are there predicts the class of {100 * told['accuracy']:.1f} % of the clients' samples "
            f"(the largest class: {100 * told['majority']:.1f} %), {100 * told['information']:.1f} % of what there is to know"
        )
