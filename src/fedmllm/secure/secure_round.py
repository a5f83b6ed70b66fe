"""The server's half of a secure round: it relays keys and sealed shares, sums masked vectors, and removes masks from the sum.

It learns which clients took part and the sum, and nothing about a single update. A client that does not answer, or answers
wrongly, is dropped. The sum can be unmasked as long as enough holders of every secret that is needed remain.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch

from fedmllm.algorithms import RoundInfo, Update
from fedmllm.secure import primitives as crypto
from fedmllm.secure.client import SEALED, MaskGroup, sign_of, to_bytes, to_tensor
from fedmllm.secure.fixed import FixedPoint, Vector, size
from fedmllm.secure.settings import Pairwise, Phase
from fedmllm.tensors import State, Tensors, bytes_by_group

T = TypeVar("T")
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

    def _exchange(self, phase: Phase, requests: Mapping[int, State], read: Callable[[int, Tensors], T]) -> dict[int, T]:
        """Send one request per client and count all bytes; client -> `read(client, the tensors of its answer)`.

        Clients that do not answer, or for whose answer `read` raises ValueError, are dropped.
        """
        for client, state in requests.items():
            self.down[client].update(bytes_by_group(state))
        missing, answers = set(requests), dict[int, T]()
        for answer in self._request(phase, requests):
            if answer.client not in missing:
                continue
            missing.discard(answer.client)
            self.up[answer.client].update(bytes_by_group(answer.groups))
            if answer.problem:
                self.problems[answer.client] = answer.problem
                continue
            try:
                answers[answer.client] = read(answer.client, answer.groups.get(phase, {}))
            except ValueError as error:
                self.problems[answer.client] = f"sent something that is not part of secure aggregation: {error}"
        self.problems |= dict.fromkeys(missing, "no answer")
        return answers

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
        earlier: dict[int, set[int]] = {}

        def read(client: int, keys: Tensors) -> tuple[bytes, bytes, bytes]:
            seal, mask = (to_bytes(keys, name, crypto.KEY) for name in ("seal", "mask"))
            check = to_bytes(keys, "check", crypto.SECRET)
            if "earlier" in keys:
                earlier[client] = set(keys["earlier"].flatten().tolist())
            return seal, mask, check

        request = {"keys": {"attempt": to_tensor(self._attempt)}}
        keys = self._exchange("keys", dict.fromkeys(messages, request), read)
        for client in self._newcomers(keys, earlier):
            self.problems[client] = "was not in the sum of an earlier attempt, and a second sum with it would reveal its update"
            del keys[client]
        self._keys = {client: keys[client] for client in self._viable(keys)}

    def _newcomers(self, clients: Collection[int], earlier: Mapping[int, Collection[int]]) -> list[int]:
        """The clients that too many others will not unmask, because they were not in the sum of an earlier attempt."""

        def willing(client: int) -> int:
            return sum(client in earlier.get(holder, (client,)) for holder in self._group.holders(client))

        return [client for client in clients if willing(client) < self._group.required(client)]

    def _exchange_shares(self) -> dict[int, State]:
        """For each client that shared its secrets, the shares that others sealed for it."""
        requests = {}
        for client in self._keys:
            peers = [peer for peer in self._group.peers[client] if peer in self._keys]
            requests[client] = {"keys": {str(peer): to_tensor(self._keys[peer][0] + self._keys[peer][1]) for peer in peers}}

        def read(client: int, shares: Tensors) -> dict[int, torch.Tensor]:
            if shares.keys() != requests[client]["keys"].keys():
                raise ValueError("not one share per peer")
            return {int(name): to_tensor(to_bytes(shares, name, SEALED)) for name in shares}

        sealed = self._exchange("shares", requests, read)
        viable = self._viable(sealed)
        return {
            client: {"shares": {str(peer): sealed[peer][client] for peer in self._group.peers[client] if peer in viable}}
            for client in sorted(viable)
        }

    def _sum(self, messages: Mapping[int, State], sealed: Mapping[int, State], length: int) -> Vector:
        total = np.zeros(length, dtype=np.uint8)

        def add(client: int, masked: Tensors) -> None:
            self._fixed.add(total, np.frombuffer(to_bytes(masked, "vector", length), dtype=np.uint8))

        requests = {client: {**messages[client], **shares} for client, shares in sealed.items()}
        present = set(self._exchange("masked", requests, add))
        for client in sorted(sealed):
            if self._holders(client, present) < self._group.required(client):
                self._fail(client, self._holders(client, present))
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

        def read(holder: int, shares: Tensors) -> dict[int, bytes]:
            near = senders.intersection(self._group.holders(holder))
            return {client: to_bytes(shares, str(client), crypto.SECRET) for client in near}

        for holder, held in self._exchange("unmask", requests, read).items():
            for client, share in held.items():
                collected[client][self._group.holders(client).index(holder)] = share
        for client in sorted(senders):
            if len(collected[client]) < self._group.required(client):
                self._fail(client, len(collected[client]))
        # A client whose masked update is in the sum took part, even if it went away before this phase.
        self.problems = earlier_problems
        return collected

    def _unmask(self, total: Vector, senders: set[int], present: set[int], shares: Mapping[int, Mapping[int, bytes]]) -> None:
        for client in sorted(senders):
            seed = crypto.combine(sorted(shares[client].items())[: self._group.required(client)])
            _, public, check = self._keys[client]
            pair = None if client in present else crypto.KeyPair.of(seed)
            if pair.public != public if pair else self._group.check(seed, client) != check:
                raise TooFew(
                    f"round {self._info.round}: secure aggregation cannot unmask the sum: the returned shares of client "
                    f"{client}'s secret do not reconstruct it, so one of them was altered"
                )
            if pair is None:
                self._fixed.add_mask(total, self._group.own_mask(seed, client), -1)
                continue
            for peer in present.intersection(self._group.peers[client]):
                mask = self._group.pair_mask(pair.agree(self._keys[peer][1]), client, peer)
                self._fixed.add_mask(total, mask, -sign_of(peer, client))
