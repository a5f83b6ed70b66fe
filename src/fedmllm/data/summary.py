"""What a data set holds and what is wrong with it, counted: for `fedmllm check`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedmllm.data.samples import Loaded, Sample, Split

SHOWN = 5
"""Classes that the text names; a question-answering set can have hundreds."""


def _pattern(sample: Sample) -> str:
    return "both" if len(sample.modalities) == 2 else next(iter(sample.modalities), "none")


def summarise(found: Sequence[tuple[Split, Loaded]]) -> dict[str, dict[str, Any]]:
    """{split: {"samples": usable ones, "classes": {label: samples}, "modalities": {both, image, text, none: samples},
    "bad_samples": {kind: number}}}, the largest first. A split that is in `found` twice (a companion) is added up.
    """
    splits: dict[str, dict[str, Any]] = {}
    for split in dict.fromkeys(split for split, _ in found):
        samples = [s for name, loaded in found if name == split for s in loaded.samples]
        problems = [p for name, loaded in found if name == split for p in loaded.skipped]
        patterns = Counter(map(_pattern, samples))
        splits[split] = {
            "samples": len(samples),
            "classes": _largest_first(Counter(s.label for s in samples)),
            "modalities": {name: patterns[name] for name in ("both", "image", "text", "none")},
            "bad_samples": _largest_first(Counter(p.kind for p in problems)),
        }
    return splits


def _largest_first(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def described(splits: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The summary in lines of text."""
    words = {"both": "with image and text", "image": "with image only", "text": "with text only", "none": "with neither"}
    for split, about in splits.items():
        patterns = [f"{count} {words[name]}" for name, count in about["modalities"].items() if count]
        yield f"{split}: {about['samples']} samples" + (f", {', '.join(patterns)}" if patterns else "")
        classes = about["classes"]
        named = [f"{label or '(none)'} {count}" for label, count in list(classes.items())[:SHOWN]]
        more = [f"and {len(classes) - SHOWN} more"] if len(classes) > SHOWN else []
        yield f"  classes ({len(classes)}): {', '.join(named + more)}" if classes else "  no classes"
        bad = about["bad_samples"]
        if bad:
            yield f"  bad samples ({sum(bad.values())}): {', '.join(f'{kind} {count}' for kind, count in bad.items())}"
