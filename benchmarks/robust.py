"""What robust aggregation costs at the server: seconds a round, relative to the plain weighted mean.

    python benchmarks/robust.py [--repeat 3] [--json FILE]

Clients have changes of random numbers, on an adapter as small as the pocket model's and on one of 4 million numbers. Seconds
are processor time, which does not depend on other processes, of combining and aggregating under FedAvg: the best of repeats.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from fedmllm.algorithms import RoundInfo, Update, algorithms
from fedmllm.algorithms.combining import robusts
from fedmllm.algorithms.factors import A, B
from fedmllm.tensors import Tensors

ADAPTERS = {"pocket": (8, 160, 24), "4 M": (16, 2048, 64)}
"""name -> (rank, width, modules): 2 · rank · width · modules numbers."""
CLIENTS = (10, 100)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "norm-clip": ("norm-clip", {}),
    "centered-clip": ("centered-clip", {}),
    "median": ("median", {}),
    "trimmed-mean": ("trimmed-mean", {}),
    "krum": ("krum", {}),
    "krum, on products": ("krum", {"on": "product"}),
    "geometric-median": ("geometric-median", {}),
    "geometric-median, on products": ("geometric-median", {"on": "product"}),
}


def adapter_of(rank: int, width: int, modules: int, rng: torch.Generator) -> Tensors:
    shapes = {f"m{m}{suffix}": (rank, width) if suffix == A else (width, rank) for m in range(modules) for suffix in (A, B)}
    return {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}


def seconds(method: str, adapter: Tensors, updates: list[Update], info: RoundInfo, repeat: int) -> float:
    """Of combining and aggregating; of aggregating alone for the method "mean"."""
    algorithm, state, best = algorithms.build("fedavg", {}), {"adapter": adapter}, float("inf")
    robust = robusts.build(*METHODS[method]) if method in METHODS else None
    for _ in range(repeat):
        began = time.process_time()
        combined = robust.combine(updates, algorithm, state, info).updates if robust else updates
        algorithm.aggregate(state, combined, info)
        best = min(best, time.process_time() - began)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, dict[str, float]] = {}
    for size, shape in ADAPTERS.items():
        for clients in CLIENTS:
            rng = torch.Generator().manual_seed(0)
            adapter = adapter_of(*shape, rng)
            info = RoundInfo(0, 1, clients, tuple(range(clients)), 0)
            updates = [
                Update(k, {"adapter": {n: t + 0.01 * torch.randn(t.shape, generator=rng) for n, t in adapter.items()}}, 10, 1)
                for k in range(clients)
            ]
            for method in ("mean", *METHODS):
                rows.setdefault(method, {})[f"{size}, {clients}"] = seconds(method, adapter, updates, info, options.repeat)
    mean = rows.pop("mean")
    print(f"| | {' | '.join(mean)} |", f"|---|{'---:|' * len(mean)}", sep="\n")
    print(f"| mean, ms | {' | '.join(f'{1000 * value:.3g}' for value in mean.values())} |")
    for method, row in rows.items():
        print(f"| {method} | {' | '.join(f'{row[place] / mean[place]:.2g}' for place in mean)} |")
    if options.json:
        options.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
