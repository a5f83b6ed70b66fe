"""drift: what a client sees changes over the rounds, as when a camera breaks or a site gets one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from fedmllm.data.samples import MODALITIES
from fedmllm.data.scenarios import BOTH, IMAGE, NONE, TEXT, Change, Modalities, Scenario, count_or_share, scenarios

_NAMED: dict[str, Modalities] = {"both": BOTH, "none": NONE, "image": IMAGE, "text": TEXT}


def _change(entry: Sequence[int | str]) -> Change:
    """The entry [round, client, "text"]. Raises ValueError if it is anything else."""
    match entry:
        case [int(number), int(client), str(name)] if name in _NAMED:
            return Change(client, number, _NAMED[name])
    raise ValueError(f"changes: {list(entry)} must be [round, client, and one of {', '.join(map(repr, _NAMED))}]")


@scenarios.register("drift")
def drift(
    *,
    how: Literal["step", "markov", "schedule"] = "step",
    modality: Literal["image", "text", "either"] = "image",
    clients: int | float = 0.5,
    at: int | float = 0.5,
    direction: Literal["lose", "gain"] = "lose",
    lose: float = 0.1,
    regain: float = 0.3,
    changes: list[list[int | str]] | None = None,
) -> Scenario:
    """The modalities that a client sees change over the rounds: in one step, at random, or by a given schedule.

    - "step": `clients` of them, a count or a share, lose `modality` in round `at`, a number or a share of all rounds; with
      `direction = "gain"` they lack it until then. "either" draws for each of them which one it is.
    - "markov": on every client, `modality` (both of them under "either") is lost before a round with probability `lose` and
      comes back with probability `regain`. A modality begins as it is in the long run, present with probability regain /
      (lose + regain). A client never loses its last one this way.
    - "schedule": `changes` lists [round, client, "both" | "image" | "text" | "none"]: what the client may see from then on.

    Nothing is added to what a scenario before this one left, and samples stay with their clients. A sample of which nothing is
    left keeps its question.
    """
    for name, probability in (("lose", lose), ("regain", regain)):
        if not 0 <= probability <= 1:
            raise ValueError(f"{name} = {probability} must be between 0 and 1")
    if how == "markov" and lose + regain == 0:
        raise ValueError("lose and regain are both 0, so that nothing would change; raise one of them")
    if (how == "schedule") != (changes is not None):
        raise ValueError('how = "schedule" and changes = [[round, client, "text"], …] belong together; give both or neither')
    listed_changes = [_change(entry) for entry in changes or ()]
    affected, when = count_or_share("clients", clients), count_or_share("at", at)
    drifting = MODALITIES if modality == "either" else (modality,)

    def steps(number: int, rounds: int, rng: np.random.Generator) -> Sequence[Change]:
        if isinstance(at, int) and at > rounds:
            raise ValueError(f"at = {at} is after the last of {rounds} rounds")
        listed = []
        order = rng.permutation(number)[: affected(number)].tolist()
        lost = {client: drifting[int(rng.integers(len(drifting)))] for client in order}
        for client in sorted(order):
            without = BOTH - {lost[client]}
            before, after = (BOTH, without) if direction == "lose" else (without, BOTH)
            listed += [Change(client, 0, before), Change(client, when(rounds), after)]
        return listed

    def chains(number: int, rounds: int, rng: np.random.Generator) -> Sequence[Change]:
        listed = []
        for client in range(number):
            own = rng.spawn(1)[0]
            present = {m for m in MODALITIES if m not in drifting or own.random() < regain / (lose + regain)}
            present = present or {MODALITIES[int(own.integers(2))]}
            for round_number in range(rounds):
                if round_number:
                    draws = dict(zip(drifting, own.random(len(drifting)).tolist(), strict=True))
                    for m, draw in draws.items():
                        if m not in present and draw < regain:
                            present.add(m)
                        elif m in present and len(present) > 1 and draw < lose:
                            present.remove(m)
                listed.append(Change(client, round_number, frozenset(present)))
        return listed

    def schedule(number: int, rounds: int, rng: np.random.Generator) -> Sequence[Change]:
        for change in listed_changes:
            if not 0 <= change.client < number:
                raise ValueError(f"changes names client {change.client}, and the clients are 0 to {number - 1}")
            if not 0 <= change.round < rounds:
                raise ValueError(f"changes names round {change.round}, and the rounds are 0 to {rounds - 1}")
        if len({change[:2] for change in listed_changes}) < len(listed_changes):
            raise ValueError("changes names a client twice in one round")
        return listed_changes

    plan = {"step": steps, "markov": chains, "schedule": schedule}[how]

    def everything(number: int, rng: np.random.Generator) -> Sequence[Modalities]:
        return [BOTH] * number

    return Scenario(clients=everything, changes=plan, expected=(lambda kind, number: {kind: 1.0}))
