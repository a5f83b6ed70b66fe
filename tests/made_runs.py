"""Hand-made run folders, as a sweep would leave them, with predictions chosen by a test."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

TRUTH = "ab" * 20
"""The answers of forty test samples."""

Hits = Callable[[Mapping[str, str], int, str], float]
"""(cell of each axis, seed, pattern) -> the share of samples answered correctly."""


def make_run(folder: Path, hits: Mapping[str, float], *, kind: str = "federated", config: Mapping[str, Any] | None = None,
             cost: int = 1000, seed: int = 0) -> None:  # fmt: skip
    """Write a complete run that answers the first `hits[pattern]` of the samples under each pattern correctly."""
    folder.mkdir(parents=True)
    metrics, lines = {}, []
    for pattern, share in hits.items():
        correct = round(share * len(TRUTH))
        for i, answer in enumerate(TRUTH):
            predicted = answer if i < correct else "b" if answer == "a" else "a"
            line = {"pattern": pattern, "id": f"s{i:02d}", "answer": answer, "predicted": predicted, "correct": i < correct}
            lines.append(json.dumps(line | {"closed": True, "failed": False, "score": None, "judged": None}))
        score = correct / len(TRUTH)
        metrics[pattern] = {"accuracy": score, "accuracy_ci": [score, score], "n": len(TRUTH), "parse_failures": 0}
    result = {
        "schema": 1, "name": "made", "kind": kind, "task": "jsonl", "algorithm": "fedavg", "regularization": "none",
        "seed": seed, "compression": "none", "primary_metric": "accuracy", "positive": None, "metrics": metrics, "rounds": 2,
        "per_client": [], "clients": {"n": 10, "mean": 0.5, "sd": 0.1, "worst_decile": 0.4},
        "bytes_up": {"adapter": cost}, "bytes_down": {"adapter": cost}, "seconds": {"total": 12.0, "train": 10.0},
    }  # fmt: skip
    plain = {"task": {"name": "jsonl"}, "scenario": {"name": "aligned"}, "partition": {"name": "iid", "clients": 10}}
    (folder / "config.toml").write_text(tomli_w.dumps({**plain, **(config or {})}))
    (folder / "predictions.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "result.json").write_text(json.dumps(result))


def make_sweep(
    folder: Path, axes: Mapping[str, Sequence[str]], hits: Hits, *, seeds: Sequence[int] = (0, 1),
    kinds: Mapping[str, str] = {},
    config: Callable[[Mapping[str, str]], Mapping[str, Any]] = lambda cell: {}, cost: int = 1000, missing: str = "",
) -> Path:  # fmt: skip
    """Write a sweep's folder over two axes. Zero-shot cells share one run; cells of the method `missing` have no runs."""
    first, second = axes
    rows: list[dict[str, Any]] = []
    folder.mkdir(parents=True)
    for a in axes[first]:
        for b in axes[second]:
            cell = {first: a, second: b}
            kind = kinds.get(b, "federated")
            for seed in seeds:
                name = "zero-shot" if kind == "zero-shot" else f"{kind}-{len(rows)}"
                state = "new" if missing and b == missing else "complete"
                rows.append({"axes": cell, "seed": seed, "kind": kind, "id": name, "state": state})
                if state == "complete" and not (folder / name).exists():
                    shares = {pattern: hits(cell, seed, pattern) for pattern in ("both", "image", "text")}
                    make_run(folder / name, shares, kind=kind, config=config(cell), cost=cost if kind == "federated" else 0)
    index = {"schema": 1, "name": "made", "axes": list(axes), "cells": rows}
    (folder / "sweep.json").write_text(json.dumps(index))
    return folder


def replicated(folder: Path, scores: Callable[[str, str, int], float], *, draws: Callable[[str, str, int], int] | None = None,
               digests: Callable[[str, int], str] = lambda place, r: f"{place} {r}", replicates: int = 4,
               places: Sequence[str] = ("easy", "hard"), methods: Sequence[str] = ("base", "new"),
               margin: float | None = None, resamples: int = 200, generated: bool = False) -> Path:  # fmt: skip
    """A sweep's folder with replicates, whose runs are results alone, from `scores(place, method, replicate)`."""
    folder.mkdir(parents=True)
    cells = []
    for (number, place), method, r in itertools.product(enumerate(places), methods, range(replicates)):
        draw = draws(place, method, r) if draws else 1000 * number + r
        cells.append({"axes": {"setting": place, "method": method}, "seed": draw, "replicate": r, "draw": draw,
                      "kind": "federated", "id": f"{method}-{number}-{r}", "state": "complete"})  # fmt: skip
        score = scores(place, method, r)
        result = {
            "schema": 1, "name": "made", "kind": "federated", "algorithm": "fedavg", "primary_metric": "accuracy",
            "metrics": {"both": {"accuracy": score, "accuracy_ci": [0, 1], "n": 40, "parse_failures": 0}}, "positive": None,
            "bytes_up": {}, "bytes_down": {}, "seconds": {"total": 36.0}, "test_digest": digests(place, r), "rounds": 1,
            "bootstrap_scores": {"both": (score + np.random.default_rng(r).normal(0, 0.05, resamples)).tolist()},
        }  # fmt: skip
        run_folder = folder / str(cells[-1]["id"])
        run_folder.mkdir()
        (run_folder / "result.json").write_text(json.dumps(result))
        (run_folder / "config.toml").write_text(CONFIG + (f"task.seed = 0\ntask.draw = {draw}\n" if generated else ""))
    index = {"schema": 1, "name": "made", "axes": ["setting", "method"], "cells": cells} | (
        {"margin": margin} if margin else {}
    )
    (folder / "sweep.json").write_text(json.dumps(index))
    return folder


CONFIG = 'task.name = "jsonl"\nscenario.name = "aligned"\npartition = { name = "iid", clients = 10 }\n'


def write_archive(file: Path, contents: Mapping[str, bytes], link: str = "", special: bytes = b"") -> Path:
    """An archive that `pack` did not write."""
    with tarfile.open(file, "w:xz") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        if link:
            member = tarfile.TarInfo(link)
            member.type, member.linkname = tarfile.SYMTYPE, "sweep.json"
            tar.addfile(member)
        if special:
            member = tarfile.TarInfo("made/x")
            member.type = special
            tar.addfile(member)
    return file


def index_of(*ids: str, name: str = "made") -> bytes:
    """The content of a `sweep.json` with a cell for each of these runs."""
    cells = [{"axes": {"m": i}, "seed": 0, "kind": "local", "id": i, "state": "complete"} for i in ids]
    return json.dumps({"schema": 1, "name": name, "axes": ["m"], "cells": cells}).encode()


def rows_of(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table after a heading."""
    following = text.partition(heading)[2].splitlines()
    start = next(i for i, line in enumerate(following) if line.startswith("|"))
    lines = []
    for line in following[start:]:
        if not line.startswith("|"):
            break
        lines.append([cell.strip() for cell in line.strip("|").split("|")])
    return [lines[0], *lines[2:]]
