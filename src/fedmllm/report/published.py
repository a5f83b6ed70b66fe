"""The scores that were published for the paper's settings, and the paper's notation for those settings."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FILE = Path(__file__).parent / "published.toml"


@dataclass(frozen=True)
class PublishedScore:
    """The published score of an algorithm at `cell` of the grid's first axis, `axis`."""

    algorithm: str
    axis: str
    cell: str
    percent: float
    metric: str

    def to_json(self) -> dict[str, Any]:
        return {"algorithm": self.algorithm, self.axis: self.cell, "percent": self.percent, "metric": self.metric}


def published() -> dict[str, Any]:
    """{"source": …, task: {"metric": …, algorithm: {setting: percent}}}"""
    raw = tomllib.loads(_FILE.read_text(encoding="utf-8"))
    settings = raw.pop("settings")
    for table in raw.values():
        if isinstance(table, dict):
            for algorithm, figures in table.items():
                if isinstance(figures, list):
                    table[algorithm] = dict(zip(settings, figures, strict=True))
    return raw


def setting_of(config: Mapping[str, Any]) -> str:
    """The heterogeneity of an experiment in the paper's notation, such as "β 0.3"; "" for one that the paper does not have,
    such as samples that never lose everything."""
    scenario, partition = config["scenario"], config["partition"]
    # The published code tosses it once per client where the modalities come from two sources, as in its medical data.
    published_coin = "client" if config.get("task", {}).get("companion") else "sample"
    if scenario["name"] == "aligned" and partition["name"] == "dirichlet":
        return f"α {float(partition.get('alpha', 0.5))}"
    if scenario["name"] == "missing" and scenario.get("empty", "keep") == "keep" and not scenario.get("never_empty"):
        return f"β {float(scenario.get('rate', 0.3))}"
    if scenario["name"] == "hybrid" and scenario.get("coin", published_coin) == published_coin:
        return f"p {float(scenario.get('presence', 0.7))}"
    if scenario["name"] == "cross":
        image, clients = scenario.get("image_clients", 0.5), partition["clients"]
        count = image if isinstance(image, int) else round(image * clients)
        return f"I:T {count}:{clients - count}"
    return ""
