"""What the server, or whoever reads a round's result, learns about single samples from LoRA updates of the pocket model.

    python benchmarks/leakage.py [--repeats 12]

It attacks updates of clients that train on easy-VQA, one question a picture, and prints the tables of docs/privacy.md in
Markdown. A repetition draws new clients, new samples, and 99 further samples of nobody; intervals are over repetitions.

- Membership, of one update in the clear, by the number of a client's samples and by how it trains.
- Membership, of the sum of the updates of K clients, without noise (a masked sum) and with the noise of user-level
  differential privacy.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

import torch
from transformers.utils import logging

from leaks.membership import ALONE, ATTACKS, SUMS, Figures, Setting, repetition
from leaks.statistics import ceiling, epsilon, interval
from leaks.victim import Victim
from leaks.words import FIGURES, read_words


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


def words_table(results: Mapping[Setting, Mapping[str, Sequence[float]]]) -> str:
    """The table in Markdown: means over targets with 95 % intervals."""
    rows = []
    for s, figures in results.items():
        seen = [str(s.samples), str(s.clients), f"{s.noise:g}", s.optimizer, "first" if s.first else "fifth"]
        rows.append([*seen, *(interval(figures[name]) for name in FIGURES)])
    return table(["samples", "clients K", "noise z", "optimizer", "round", *FIGURES], rows)


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
    print(words_table(read_words(victim, warm)), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
