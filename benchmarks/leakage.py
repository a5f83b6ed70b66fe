"""What the server, or whoever reads a round's result, learns about single samples from LoRA updates of the pocket model.

    python benchmarks/leakage.py [--repeats 12]

It attacks updates of clients that train on easy-VQA, one question a picture, and prints the tables of docs/privacy.md in
Markdown. A repetition draws new clients, new samples, and 99 further samples of nobody; intervals are over repetitions.

- Membership, of one update in the clear, by the number of a client's samples and by how it trains.
- Membership, of the sum of the updates of K clients, without noise (a masked sum) and with the noise of user-level
  differential privacy.
- Inversion by reading and imitation: tokens, answers and pictures of single samples, with controls in parentheses.
- Inversion of pictures by matching updates.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from transformers.utils import logging

from fedmllm.evaluation.intervals import mean_interval
from leaks.membership import ALONE, ATTACKS, SUMS, Figures, Setting, repetition
from leaks.pictures import FIGURES as MATCHING
from leaks.pictures import match_pictures
from leaks.reading import FIGURES as READING
from leaks.reading import read
from leaks.statistics import ceiling, epsilon, interval
from leaks.victim import Victim

SHARES = ("span", "copy", "answer", "question")
"""Figures between 0 and 1, which have score intervals: those of Student's t have no width where all values are equal."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def membership_tables(repeats: Sequence[Figures]) -> str:
    """Both tables in Markdown: means over repetitions with 95 % intervals."""

    def cells(setting: Setting) -> list[str]:
        return [interval([r[setting, name][which] for r in repeats]) for which in (0, 1) for name in ATTACKS]

    attacks = [f"{figure}, {name}" for figure in ("AUC", "TPR") for name in ATTACKS]
    alone = [[str(s.samples), str(s.epochs), s.optimizer, "first" if s.first else "fifth", *cells(s)] for s in ALONE]
    sums = []
    for s in SUMS:
        auc, tpr = ceiling(s.noise)
        eps = f"{epsilon(s.noise):.1f}" if s.noise else "∞"
        sums.append([str(s.clients), f"{s.noise:g}", eps, *cells(s), f"{auc:.2f}, {tpr:.2f}"])
    return "\n\n".join(
        [
            table(["samples", "epochs", "optimizer", "round", *attacks], alone),
            table(["clients K", "noise z", "ε", *attacks, "no attack exceeds"], sums),
        ]
    )


def against_control(figures: Mapping[str, Sequence[float]], name: str) -> str:
    """The figure's mean over targets with its 95 % interval, and the mean of its control in parentheses if it has one."""
    control, values = figures.get(f"{name}, control"), figures[name]
    if name in SHARES:
        low, high = mean_interval(np.array(values))
        cell = f"{np.mean(values):.2f} [{low:.2f}, {high:.2f}]"
    else:
        cell = interval(values, *((-np.inf, np.inf) if "PSNR" in name else (-1.0, 1.0)))
    return cell + (f" ({np.mean(control):.2f})" if control is not None else "")


def reading_table(results: Mapping[Setting, Mapping[str, Sequence[float]]]) -> str:
    names = [name for name in READING if "control" not in name]
    rows = []
    for s, figures in results.items():
        seen = [str(s.samples), str(s.clients), f"{s.noise:g}", s.optimizer, "first" if s.first else "fifth"]
        rows.append([*seen, *(against_control(figures, name) for name in names)])
    return table(["samples", "clients K", "noise z", "optimizer", "round", *names], rows)


def matching_table(results: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    names = [name for name in MATCHING if "control" not in name]
    rows = [[optimizer, *(against_control(figures, name) for name in names)] for optimizer, figures in results.items()]
    return table(["optimizer", *names], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what LoRA updates tell about single samples.")
    parser.add_argument("--repeats", type=int, default=12, help="repetitions of the membership attacks; 0: none")
    repeats = parser.parse_args().repeats
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    victim = Victim.on_easy_vqa()
    warm, pool = victim.warmed_up(victim.samples[:512]), victim.samples[512:]
    if repeats:
        print(membership_tables([repetition(victim, warm, pool, number) for number in range(repeats)]), end="\n\n", flush=True)
    print(reading_table(read(victim, warm)), end="\n\n", flush=True)
    print(matching_table(match_pictures(victim, warm)), flush=True)


if __name__ == "__main__":
    main()
