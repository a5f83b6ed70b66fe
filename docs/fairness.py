"""Draw docs/figures/fairness.svg, the weights that `qfedavg` and `group-dro` give, by running both on made updates.

    make tables        # runs this too; the same as `python docs/fairness.py`

Client k changes entry k of the adapter by one, so that an entry of the server's step is the weight of its client.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from fedmllm.algorithms import AdapterInfo, Algorithm, RoundInfo, Update, algorithms
from fedmllm.algorithms.fair import GROUPS
from fedmllm.report.curves import Line, curves
from fedmllm.tensors import State

FIGURE = Path(__file__).parent / "figures" / "fairness.svg"
QS = (0.0, 1.0, 2.0, 5.0)
LOSSES = [0.25 * number for number in range(21)]
"""Of one client; four others have a loss of 1."""
GROUP_LOSSES = {"text": 2.0, "image": 1.0, "both": 0.5}
ROUNDS = 30


def step(algorithm: Algorithm, state: State, losses: Sequence[float], kinds: Sequence[str] = ()) -> tuple[list[float], State]:
    """Each client's share of the server's step, in percent, and the new state."""
    updates = []
    for client, loss in enumerate(losses):
        group = torch.tensor([float(name == kind) for name in GROUPS for kind in kinds[client : client + 1]])
        own = {"before": torch.tensor([loss]), **({"group": group} if kinds else {})}
        trained = state["adapter"]["w"] + torch.eye(len(losses))[client]
        updates.append(Update(client, {"adapter": {"w": trained}, "loss": own}, 1, 1))
    info = RoundInfo(0, 1, len(losses), tuple(range(len(losses))), 0, AdapterInfo(), {}, lr=1.0)
    after = algorithm.aggregate(state, updates, info)
    moved = after["adapter"]["w"] - state["adapter"]["w"]
    return (100 * moved / moved.sum()).tolist(), after


def picture() -> str:
    by_q: dict[str, Line] = {}
    for q in QS:
        algorithm = algorithms.build("qfedavg", {"q": q})
        start = algorithm.init({"w": torch.zeros(5)})
        by_q[f"q = {q:g}"] = [(loss, step(algorithm, start, [loss, 1, 1, 1, 1])[0][0]) for loss in LOSSES]
    algorithm = algorithms.build("group-dro", {})
    kinds, losses = list(GROUP_LOSSES), list(GROUP_LOSSES.values())
    state, rounds = algorithm.init({"w": torch.zeros(len(kinds))}), []
    for _ in range(ROUNDS):
        shares, state = step(algorithm, state, losses, kinds)
        rounds.append(shares)
    by_group = {
        f"{kind}, loss {GROUP_LOSSES[kind]:g}": [(float(number + 1), shares[column]) for number, shares in enumerate(rounds)]
        for column, kind in enumerate(kinds)
    }
    panels = {"": {"qfedavg: loss of one client of five": by_q, "group-dro: round": by_group}}
    return curves("Share of the server's step, %", panels)


if __name__ == "__main__":
    FIGURE.write_text(picture())
