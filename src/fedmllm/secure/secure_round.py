"""The server's half of a secure round: it relays keys and sealed shares, sums masked vectors, and removes masks from the sum.

It learns which clients took part and the sum, and nothing about a single update. A client that does not answer, or answers
wrongly, is dropped. The sum can be unmasked as long as enough holders of every secret that is needed remain.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import torch

from fedmllm.algorithms import RoundInfo, Update
from fedmllm.secure import primitives as crypto
from fedmllm.secure.client import SEALED, MaskGroup, sign_of, to_bytes, to_tensor
from fedmllm.secure.fixed import FixedPoint, Vector, size
from fedmllm.secure.settings import Pairwise, Phase
from fedmllm.tensors import State, bytes_by_group

Request = Callable[[Phase, Mapping[int, State]], Sequence[Update]]
"""(phase, client -> what it is sent) -> the answers in any order; clients that do not answer may be left out."""


class TooFew(RuntimeError):  # noqa: N818 (it says what happened)
    """Too few clients remain to unmask the sum."""


class SecureRound:
    """One round. `problems` says for each dropped client why it was dropped; `down` and `up` count the bytes that each client
    received and sent, by group."""

    def __init__(self, settings: Pairwise, run: str, info: RoundInfo, fixed: FixedPoint, request: Request) -> None:
        # New for every attempt at a round, so that a repeated round has other keys; a repeated request has the same.
        self._attempt = crypto.new_seed()
        self._group = MaskGroup.of(settings, run, info, self._attempt)
        self._info, self._fixed, self._request = info, fixed, request
        self.problems: dict[int, str] = {}
        self.down: dict[int, Counter[str]] = {client: Counter() for client in info.sampled}
        self.up: dict[int, Counter[str]] = {client: Counter() for client in info.sampled}
        self._keys: dict[int, tuple[bytes, bytes, bytes]] = {}

    def run(self, messages: Mapping[int, State], shapes: State) -> tuple[Vector, list[int]]:
        """The unmasked sum of the vectors, and the clients that are in it. Raises TooFew."""
        self._exchange_keys(messages)
        sealed = self._exchange_shares()
        total = self._sum(messages, sealed, self._fixed.nbytes(size(shapes)))
        present = set(sealed) - self.problems.keys()
        shares = self._collect_shares(set(sealed), present)
        self._unmask(total, set(sealed), present, shares)
        return total, sorted(present)

    # Requests and drop-outs

    def _exchange(self, phase: Phase, requests: Mapping[int, State]) -> list[Update]:
        """The good answers to one request per client, with their bytes counted; all other clients are dropped."""
        for client, state in requests.items():
            self.down[client].update(bytes_by_group(state))
        missing, answers = set(requests), []
        for answer in self._request(phase, requests):
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
        self.problems[client] = f"sent something that is not part of secure aggregation: {error}"

    def _viable(self, clients: Collection[int]) -> set[int]:
        """The clients whose secrets the others among them can reconstruct; the rest is dropped. Raises TooFew if none is
        left."""
        left = set(clients)
        while unserved := [client for client in sorted(left) if self._holders(client, left) < self._group.required(client)]:
            left -= set(unserved)
            if not left:
                self._fail(unserved[0], self._holders(unserved[0], set(clients)))
            self.problems |= dict.fromkeys(unserved, "too few of the clients with which it shares masks were left")
        if not left:
            self._fail(min(self._info.sampled), 0)
        return left

    def _holders(self, client: int, left: Collection[int]) -> int:
        return len(set(self._group.holders(client)) & set(left))

    def _require_holders(self, left: Collection[int], secrets: Collection[int]) -> None:
        """Raises TooFew unless enough holders of each of these clients' secrets are left."""
        for client in sorted(secrets):
            if self._holders(client, left) < self._group.required(client):
                self._fail(client, self._holders(client, left))

    def _require_connected(self, present: set[int]) -> None:
        """Raises TooFew if the clients share masks in disjoint groups: the sum of each group would be revealed."""
        reached, new = set[int](), {min(present)}
        while new:
            reached |= new
            new = {peer for client in new for peer in self._group.peers[client] if peer in present} - reached
        if reached != present:
            raise TooFew(
                f"round {self._info.round}: secure aggregation lost so many clients that the others share masks in separate "
                "groups; raise secure.neighbours"
            )

    def _fail(self, client: int, left: int) -> None:
        holders, required = len(self._group.holders(client)), self._group.required(client)
        whose = "clients" if holders == len(self._info.sampled) else f"neighbours of client {client}"
        reasons = "; ".join(f"client {c}: {problem}" for c, problem in sorted(self.problems.items()))
        raise TooFew(
            f"round {self._info.round}: secure aggregation needs {required} of {holders} {whose} until the end, and {left} "
            f"were left, so the sum stays masked ({reasons})"
        )

    # The four phases

    def _exchange_keys(self, messages: Mapping[int, State]) -> None:
        request = {"keys": {"attempt": to_tensor(self._attempt)}}
        for answer in self._exchange("keys", dict.fromkeys(messages, request)):
            keys = answer.groups.get("keys", {})
            try:
                seal, mask = (to_bytes(keys, name, crypto.KEY) for name in ("seal", "mask"))
                self._keys[answer.client] = seal, mask, to_bytes(keys, "check", crypto.SECRET)
            except ValueError as error:
                self._drop(answer.client, error)
        self._keys = {client: self._keys[client] for client in self._viable(self._keys)}

    def _exchange_shares(self) -> dict[int, State]:
        """For each client that shared its secrets, the shares that others sealed for it."""
        requests = {}
        for client in self._keys:
            peers = [peer for peer in self._group.peers[client] if peer in self._keys]
            requests[client] = {"keys": {str(peer): to_tensor(self._keys[peer][0] + self._keys[peer][1]) for peer in peers}}
        inbox: dict[int, dict[int, torch.Tensor]] = {client: {} for client in self._keys}
        senders = []
        for answer in self._exchange("shares", requests):
            shares = answer.groups.get("shares", {})
            try:
                if shares.keys() != requests[answer.client]["keys"].keys():
                    raise ValueError("not one share per peer")
                sealed = {int(name): to_tensor(to_bytes(shares, name, SEALED)) for name in shares}
            except ValueError as error:
                self._drop(answer.client, error)
                continue
            senders.append(answer.client)
            for peer, share in sealed.items():
                inbox[peer][answer.client] = share
        viable = self._viable(senders)
        return {
            client: {"shares": {str(peer): share for peer, share in inbox[client].items() if peer in viable}}
            for client in sorted(viable)
        }

    def _sum(self, messages: Mapping[int, State], sealed: Mapping[int, State], length: int) -> Vector:
        total = np.zeros(length, dtype=np.uint8)
        present = set()
        for answer in self._exchange("masked", {client: {**messages[client], **shares} for client, shares in sealed.items()}):
            try:
                vector = to_bytes(answer.groups.get("masked", {}), "vector", length)
            except ValueError as error:
                self._drop(answer.client, error)
                continue
            self._fixed.add(total, np.frombuffer(vector, dtype=np.uint8))
            present.add(answer.client)
        self._require_holders(present, sealed)
        self._require_connected(present)
        return total

    def _collect_shares(self, senders: set[int], present: set[int]) -> dict[int, dict[int, bytes]]:
        """client -> position of a holder -> its share: of the own mask of `present` clients, of the mask key of the others."""
        requests: dict[int, State] = {}
        for client in sorted(present):
            near = senders.intersection(self._group.holders(client))
            lists = {"here": sorted(near & present), "gone": sorted(near - present)}
            requests[client] = {"unmask": {name: torch.tensor(ids, dtype=torch.int64) for name, ids in lists.items()}}
        collected: dict[int, dict[int, bytes]] = {client: {} for client in senders}
        earlier_problems = dict(self.problems)
        for answer in self._exchange("unmask", requests):
            near = senders.intersection(self._group.holders(answer.client))
            try:
                shares = {c: to_bytes(answer.groups.get("unmask", {}), str(c), crypto.SECRET) for c in near}
            except ValueError as error:
                self._drop(answer.client, error)
                continue
            for client, share in shares.items():
                collected[client][self._group.holders(client).index(answer.client)] = share
        for client in sorted(senders):
            if len(collected[client]) < self._group.required(client):
                self._fail(client, len(collected[client]))
        # A client whose masked update is in the sum took part, even if it went away before this phase.
        self.problems = earlier_problems
        return collected

    def _unmask(self, total: Vector, senders: set[int], present: set[int], shares: Mapping[int, Mapping[int, bytes]]) -> None:
        for client in sorted(senders):
            seed = crypto.combine(sorted(shares[client].items())[: self._group.required(client)])
            if client in present:
                if self._group.check(seed, client) != self._keys[client][2]:
                    raise TooFew(self._altered(client))
                self._fixed.add_mask(total, self._group.own_mask(seed, client), -1)
                continue
            pair = crypto.KeyPair.of(seed)
            if pair.public != self._keys[client][1]:
                raise TooFew(self._altered(client))
            for peer in present.intersection(self._group.peers[client]):
                mask = self._group.pair_mask(pair.agree(self._keys[peer][1]), client, peer)
                self._fixed.add_mask(total, mask, -sign_of(peer, client))

    def _altered(self, client: int) -> str:
        return (
            f"round {self._info.round}: secure aggregation cannot unmask the sum: the returned shares of client {client}'s "
            "secret do not reconstruct it, so one of them was altered"
        )
