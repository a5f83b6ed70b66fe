"""A client's half of a secure round. It answers four requests, each once and in this order, and then forgets everything.

    keys     receives the name of this attempt at the round; sends two public keys, one for sealing shares, one for masks
    shares   receives the peers' public keys; sends each peer a sealed share of its own mask's seed and of its mask key's seed
    masked   receives the shares that peers sealed for it; sends the update under its own mask and one mask per peer
    unmask   receives which clients sent a masked update and which did not; sends shares of the own masks of the former and of
             the mask keys of the latter

In a second attempt at a round, `keys` also sends which clients were in the sum of the first, and no other sum is unmasked
(`attempts`).

The own mask protects an update if its pairwise masks are reconstructed after all, as for a client that was presumed gone but
was only late. Nobody may therefore learn both secrets of a client: `unmask` is answered once, and never if a client is in both
lists.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fedmllm.algorithms import RoundInfo
from fedmllm.secure import primitives as crypto
from fedmllm.secure.attempts import Attempts
from fedmllm.secure.fixed import FixedPoint, Vector
from fedmllm.secure.settings import PHASES, Pairwise, Phase
from fedmllm.tensors import State, Tensors


class Refusal(ValueError):  # noqa: N818 (it says what happened)
    """Why a client refuses a request, in one sentence that the server may see."""


@dataclass(frozen=True)
class MaskGroup:
    """What everyone knows about a round in advance: its name (run, round, attempt), and which clients share masks."""

    name: tuple[str, int, str]
    peers: Mapping[int, tuple[int, ...]]
    settings: Pairwise

    @classmethod
    def of(cls, settings: Pairwise, run: str, info: RoundInfo, attempt: bytes) -> MaskGroup:
        return cls((run, info.round, attempt.hex()), settings.peers(info.sampled, info.seed, info.round), settings)

    def holders(self, client: int) -> list[int]:
        """The clients that hold a share of the client's secrets, itself included, in the order of the shares."""
        return sorted((client, *self.peers[client]))

    def required(self, client: int) -> int:
        """How many of the holders are needed to reconstruct one of the client's secrets."""
        return self.settings.required(len(self.holders(client)))

    def pair_mask(self, secret: bytes, client: int, peer: int) -> Callable[[int], bytes]:
        """The mask of a pair of clients, from the secret on which they agreed."""
        return crypto.keystream(crypto.derive(secret, "pair", *self.name, *sorted((client, peer))))

    def own_mask(self, seed: bytes, client: int) -> Callable[[int], bytes]:
        return crypto.keystream(crypto.derive(seed, "own", *self.name, client))

    def check(self, seed: bytes, client: int) -> bytes:
        """A commitment to a seed: it identifies the seed without revealing it."""
        return crypto.derive(seed, "check", *self.name, client, length=crypto.SECRET)

    def sealing_key(self, secret: bytes, sender: int, receiver: int) -> bytes:
        """The key for one direction, so that only the receiver can open a share and knows who sealed it."""
        return crypto.derive(secret, "seal", *self.name, sender, receiver)


def to_tensor(content: bytes | Vector) -> torch.Tensor:
    """Bytes as a tensor, the form in which they are sent."""
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def to_bytes(tensors: Tensors, name: str, length: int) -> bytes:
    """Raises ValueError if the tensor is missing or does not have this many bytes."""
    tensor = tensors.get(name)
    if tensor is None or tensor.dtype != torch.uint8 or tensor.shape != (length,):
        raise ValueError(f"{name!r} is not {length} bytes")
    return tensor.numpy().tobytes()


class SecureClient:
    """One client in one round. Raises Refusal for a request out of order, and for a request that it must not answer.

    `records` are the files that say which clients were in the sum of an earlier attempt; empty if nothing is remembered.
    """

    def __init__(self, group: MaskGroup, client: int, records: Collection[Path] = ()) -> None:
        self._group, self._client, self._records = group, client, [*records]
        self._pending: list[Phase] = list(PHASES)
        self._own_seed, self._mask_seed = crypto.new_seed(), crypto.new_seed()
        self._seal, self._mask = crypto.KeyPair.of(crypto.new_seed()), crypto.KeyPair.of(self._mask_seed)
        self._keys: dict[int, tuple[bytes, bytes]] = {}
        self._shares: dict[int, tuple[bytes, bytes]] = {}

    def _enter(self, phase: Phase) -> None:
        if not self._pending or self._pending[0] != phase:
            reason = "was already answered in this round" if phase not in self._pending else "was requested too early"
            raise Refusal(f"secure aggregation: {phase!r} {reason}")
        self._pending.pop(0)

    def keys(self) -> State:
        self._enter("keys")
        check = self._group.check(self._own_seed, self._client)
        keys = {"seal": to_tensor(self._seal.public), "mask": to_tensor(self._mask.public), "check": to_tensor(check)}
        for earlier in self._earlier():
            keys["earlier"] = torch.tensor(sorted(earlier), dtype=torch.int64)
        return {"keys": keys}

    def shares(self, request: State) -> State:
        """`request["keys"]` maps each peer's number to its two public keys, concatenated."""
        self._enter("shares")
        keys: dict[int, bytes] = {}
        for name in request.get("keys", {}):
            if not name.isdecimal() or int(name) not in self._group.peers[self._client]:
                raise Refusal("secure aggregation: received the key of a client that is not a peer")
            keys[int(name)] = to_bytes(request["keys"], name, 2 * crypto.KEY)
        self._keys = {peer: (both[: crypto.KEY], both[crypto.KEY :]) for peer, both in keys.items()}
        own_keys = {self._seal.public, self._mask.public}
        if len(own_keys.union(*self._keys.values())) != 2 + 2 * len(self._keys):
            raise Refusal("secure aggregation: two clients have the same key")
        self._require(len(self._keys) + 1)
        return {"shares": self._sealed_shares()}

    def _sealed_shares(self) -> Tensors:
        holders, required = self._group.holders(self._client), self._group.required(self._client)
        own_shares = crypto.split(self._own_seed, required, len(holders))
        mask_shares = crypto.split(self._mask_seed, required, len(holders))
        sealed: Tensors = {}
        for peer, own_share, mask_share in zip(holders, own_shares, mask_shares, strict=True):
            if peer == self._client:
                self._shares[peer] = own_share, mask_share
            elif peer in self._keys:
                key = self._group.sealing_key(self._seal.agree(self._keys[peer][0]), self._client, peer)
                sealed[str(peer)] = to_tensor(crypto.seal(key, own_share + mask_share))
        return sealed

    def open(self, request: State, records: Collection[Path] = ()) -> None:
        """Open the shares that peers sealed for this client: the first part of `masked`, done before the client trains.

        `records` are further files as in `__init__`, whose names follow from what the client receives.
        """
        self._enter("masked")
        self._records += records
        for name, tensor in sorted(request.get("shares", {}).items()):
            if not name.isdecimal() or int(name) not in self._keys:
                raise Refusal("secure aggregation: received the share of a client that sent no key")
            peer = int(name)
            key = self._group.sealing_key(self._seal.agree(self._keys[peer][0]), peer, self._client)
            try:
                both = crypto.unseal(key, to_bytes({name: tensor}, name, SEALED))
            except ValueError:
                raise Refusal(f"secure aggregation: the shares of client {peer} were altered in transit") from None
            self._shares[peer] = both[: crypto.SECRET], both[crypto.SECRET :]
        self._require(len(self._shares))
        for earlier in self._earlier():
            if gone := earlier - self._shares.keys():
                raise Refusal(f"{_OTHER_SUM}: {_listed(gone)} left since; {_WAY_OUT}")

    def _earlier(self) -> list[frozenset[int]]:
        return [clients for clients in map(Attempts.earlier, self._records) if clients is not None]

    def masked(self, vector: Vector, fixed: FixedPoint) -> State:
        """The vector under all its masks. Changes `vector` in place."""
        fixed.add_mask(vector, self._group.own_mask(self._own_seed, self._client), 1)
        for peer in self._shares.keys() - {self._client}:
            mask = self._group.pair_mask(self._mask.agree(self._keys[peer][1]), self._client, peer)
            fixed.add_mask(vector, mask, sign_of(self._client, peer))
        return {"masked": {"vector": to_tensor(vector)}}

    def unmask(self, request: State) -> State:
        """`request["unmask"]` lists the numbers of the clients that are present ("here") and of those that are "gone"."""
        self._enter("unmask")
        lists = request.get("unmask", {})
        present, gone = (set(lists[name].tolist()) if name in lists else set() for name in ("here", "gone"))
        if present & gone:
            raise Refusal("secure aggregation: both secrets of one client were requested, which would reveal its update")
        if self._client not in present or present | gone != self._shares.keys():
            raise Refusal("secure aggregation: secrets were requested of clients other than those with which it shares masks")
        self._require(len(present))
        for earlier in self._earlier():
            if earlier != present:
                raise Refusal(f"{_OTHER_SUM}: that sum and this one differ by {_listed(earlier ^ present)}; {_WAY_OUT}")
        for record in self._records:
            Attempts.remember(record, present)
        shares = {str(client): to_tensor(self._shares[client][0]) for client in sorted(present)}
        shares |= {str(client): to_tensor(self._shares[client][1]) for client in sorted(gone)}
        self._shares.clear()
        return {"unmask": shares}

    def _require(self, clients: int) -> None:
        required = self._group.required(self._client)
        if clients < required:
            raise Refusal(f"secure aggregation: {clients} clients share masks with it, and {required} are needed")


_OTHER_SUM = "secure aggregation: the same updates were already summed over other clients, and two sums would reveal updates"
_WAY_OUT = "resume with the same clients, or start a run with another seed"


def _listed(clients: Collection[int]) -> str:
    return f"client{'s' * (len(clients) > 1)} {', '.join(map(str, sorted(clients)))}"


SEALED = 2 * crypto.SECRET + 16
"""Bytes of two sealed shares with their authentication tag."""


def sign_of(client: int, peer: int) -> int:
    """The sign with which the client adds the mask that it shares with the peer; the peer uses the opposite sign."""
    return 1 if client < peer else -1
