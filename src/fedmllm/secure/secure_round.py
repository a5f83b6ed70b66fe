"""The server's half of a secure round: it relays keys and sealed shares, adds masked vectors up, and takes masks off the sum.

It learns who took part, the sum, and nothing of one client. Its `parties` are dropped where they do not answer, or not as they
should; the sum is made while more than the threshold of the holders of every secret that is needed are left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import torch

from fedmllm.algorithms import RoundInfo, Update
from fedmllm.secure import primitives as crypto
from fedmllm.secure.fixed import FixedPoint, Vector, size
from fedmllm.secure.party import SEALED, MaskGroup, boxed, sign_of, unboxed
from fedmllm.secure.settings import Pairwise, Phase
from fedmllm.tensors import State, bytes_by_group

Ask = Callable[[Phase, Mapping[int, State]], Sequence[Update]]
"""(phase, client -> what it is sent) -> what came back, in any order; who does not answer may be left out."""


class TooFew(RuntimeError):  # noqa: N818 (it says what happened)
    """Not enough clients are left to take the masks off the sum."""


class SecureRound:
    """One round. `problems` has for each client that was dropped why; `down` and `up` have the bytes that travelled to and from
    each, by group."""

    def __init__(self, settings: Pairwise, run: str, info: RoundInfo, fixed: FixedPoint, ask: Ask) -> None:
        self._attempt = crypto.fresh()  # a round that is begun anew has other keys, one that is asked twice has the same
        self._group = MaskGroup.of(settings, run, info, self._attempt)
        self._info, self._fixed, self._ask = info, fixed, ask
        self.problems: dict[int, str] = {}
        self.down: dict[int, Counter[str]] = {client: Counter() for client in info.sampled}
        self.up: dict[int, Counter[str]] = {client: Counter() for client in info.sampled}
        self._keys: dict[int, tuple[bytes, bytes, bytes]] = {}

    def run(self, messages: Mapping[int, State], shapes: State) -> tuple[Vector, list[int]]:
        """The sum of the masked vectors without the masks, and the clients it is of. Raises TooFew."""
        self._exchange_keys(messages)
        sealed = self._exchange_shares()
        total = self._sum(messages, sealed, self._fixed.nbytes(size(shapes)))
        here = set(sealed) - self.problems.keys()
        shares = self._ask_for_shares(set(sealed), here)
        self._unmask(total, set(sealed), here, shares)
        return total, sorted(here)

    # One question to many clients

    def _said(self, phase: Phase, asked: Mapping[int, State]) -> list[Update]:
        """The answers that came, each counted; who did not answer or has a problem is dropped."""
        for client, state in asked.items():
            self.down[client].update(bytes_by_group(state))
        missing, answers = set(asked), []
        for answer in self._ask(phase, asked):
            if answer.client not in missing:
                continue
            missing.discard(answer.client)
            self.up[answer.client].update(bytes_by_group(answer.groups))
            if answer.problem:
                self.problems[answer.client] = answer.problem
            else:
                answers.append(answer)
        self.problems |= dict.fromkeys(missing, "no answer")
        return answers

    def _drop(self, client: int, error: ValueError) -> None:
        self.problems[client] = f"sent what is no part of secure aggregation: {error}"

    def _viable(self, clients: Collection[int]) -> set[int]:
        """Those whose secrets can be put together by the others among them; who cannot be served is dropped. Raises TooFew
        where none is left."""
        left = set(clients)
        while few := [client for client in sorted(left) if self._holders(client, left) < self._group.enough(client)]:
            left -= set(few)
            if not left:
                self._fail(few[0], self._holders(few[0], set(clients)))
            self.problems |= dict.fromkeys(few, "too few of the clients it shares masks with were left")
        if not left:
            self._fail(min(self._info.sampled), 0)
        return left

    def _holders(self, client: int, left: Collection[int]) -> int:
        return len(set(self._group.holders(client)) & set(left))

    def _demand(self, left: Collection[int], secrets: Collection[int]) -> None:
        """Raises TooFew unless enough holders of each of these clients' secrets are left."""
        for client in sorted(secrets):
            if self._holders(client, left) < self._group.enough(client):
                self._fail(client, self._holders(client, left))

    def _demand_one_piece(self, here: set[int]) -> None:
        """Raises TooFew where clients share masks in groups apart: each group's sum could be told from the whole."""
        met, new = set[int](), {min(here)}
        while new:
            met |= new
            new = {peer for client in new for peer in self._group.peers[client] if peer in here} - met
        if met != here:
            raise TooFew(
                f"round {self._info.round}: secure aggregation lost so many clients that the others share masks in groups "
                "apart; raise secure.neighbours"
            )

    def _fail(self, client: int, there: int) -> None:
        holders, enough = len(self._group.holders(client)), self._group.enough(client)
        whose = "clients" if holders == len(self._info.sampled) else f"neighbours of client {client}"
        why = "; ".join(f"client {c}: {problem}" for c, problem in sorted(self.problems.items()))
        raise TooFew(
            f"round {self._info.round}: secure aggregation needs {enough} of {holders} {whose} to the end, and {there} were "
            f"left, so the sum stays masked ({why})"
        )

    # The four phases

    def _exchange_keys(self, messages: Mapping[int, State]) -> None:
        attempt = {"keys": {"attempt": boxed(self._attempt)}}
        for answer in self._said("keys", dict.fromkeys(messages, attempt)):
            try:
                told = answer.groups.get("keys", {})
                seal, mask = (unboxed(told, name, crypto.KEY) for name in ("seal", "mask"))
                self._keys[answer.client] = seal, mask, unboxed(told, "check", crypto.SECRET)
            except ValueError as error:
                self._drop(answer.client, error)
        self._keys = {client: self._keys[client] for client in self._viable(self._keys)}

    def _exchange_shares(self) -> dict[int, State]:
        """For each client that shared its secrets, the shares that others sealed for it."""
        asked = {}
        for client in self._keys:
            peers = [peer for peer in self._group.peers[client] if peer in self._keys]
            asked[client] = {"keys": {str(peer): boxed(self._keys[peer][0] + self._keys[peer][1]) for peer in peers}}
        box: dict[int, State] = {client: {"shares": {}} for client in self._keys}
        sharing = []
        for answer in self._said("shares", asked):
            told = answer.groups.get("shares", {})
            try:
                if told.keys() != asked[answer.client]["keys"].keys():
                    raise ValueError("not a share for each peer")
                mine = {int(name): boxed(unboxed(told, name, SEALED)) for name in told}
            except ValueError as error:
                self._drop(answer.client, error)
                continue
            sharing.append(answer.client)
            for peer, sealed in mine.items():
                box[peer]["shares"][str(answer.client)] = sealed
        viable = self._viable(sharing)
        return {
            client: {"shares": {peer: share for peer, share in box[client]["shares"].items() if int(peer) in viable}}
            for client in sorted(viable)
        }

    def _sum(self, messages: Mapping[int, State], sealed: Mapping[int, State], length: int) -> Vector:
        total = np.zeros(length, dtype=np.uint8)
        there = set()
        for answer in self._said("masked", {client: {**messages[client], **box} for client, box in sealed.items()}):
            try:
                vector = unboxed(answer.groups.get("masked", {}), "vector", length)
            except ValueError as error:
                self._drop(answer.client, error)
                continue
            self._fixed.add(total, np.frombuffer(vector, dtype=np.uint8))
            there.add(answer.client)
        self._demand(there, sealed)
        self._demand_one_piece(there)
        return total

    def _ask_for_shares(self, sharing: set[int], here: set[int]) -> dict[int, dict[int, bytes]]:
        """client -> place of a holder -> its share: of the own mask of clients that are `here`, of the mask key of others."""
        asked: dict[int, State] = {}
        for client in sorted(here):
            near = sharing.intersection(self._group.holders(client))
            lists = {"here": sorted(near & here), "gone": sorted(near - here)}
            asked[client] = {"unmask": {name: torch.tensor(ids, dtype=torch.int64) for name, ids in lists.items()}}
        found: dict[int, dict[int, bytes]] = {client: {} for client in sharing}
        late = dict(self.problems)
        for answer in self._said("unmask", asked):
            near = sharing.intersection(self._group.holders(answer.client))
            try:
                told = {c: unboxed(answer.groups.get("unmask", {}), str(c), crypto.SECRET) for c in near}
            except ValueError as error:
                self._drop(answer.client, error)
                continue
            for client, share in told.items():
                found[client][self._group.holders(client).index(answer.client)] = share
        for client in sorted(sharing):
            if len(found[client]) < self._group.enough(client):
                self._fail(client, len(found[client]))
        # Whose masked update is in the sum took part, though it went away before the last question.
        self.problems = late
        return found

    def _unmask(self, total: Vector, sharing: set[int], here: set[int], shares: Mapping[int, Mapping[int, bytes]]) -> None:
        for client in sorted(sharing):
            seed = crypto.combine(sorted(shares[client].items())[: self._group.enough(client)])
            if client in here:
                if self._group.check(seed, client) != self._keys[client][2]:
                    raise TooFew(self._wrong(client))
                self._fixed.add_mask(total, self._group.own_mask(seed, client), -1)
                continue
            pair = crypto.KeyPair.of(seed)
            if pair.public != self._keys[client][1]:
                raise TooFew(self._wrong(client))
            for peer in here.intersection(self._group.peers[client]):
                mask = self._group.pair_mask(pair.agree(self._keys[peer][1]), client, peer)
                self._fixed.add_mask(total, mask, -sign_of(peer, client))

    def _wrong(self, client: int) -> str:
        return (
            f"round {self._info.round}: secure aggregation cannot unmask the sum: the shares that came back of client "
            f"{client}'s secret do not make it, so one of them was altered"
        )


__all__ = ["Ask", "SecureRound", "TooFew"]
