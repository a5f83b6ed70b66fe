"""A client's half of a secure round. It answers four questions, each once and in this order, and then forgets everything.

    keys     ← the name of the attempt at this round.  → a public key to seal shares with, another to agree on masks with
    shares   ← the peers' public keys.  → for each peer, sealed: a share of my own mask's seed and one of my mask key's seed
    masked   ← the shares that peers sealed for me.  → the update under my own mask and a mask with each peer
    unmask   ← who sent a masked update, and who did not.  → a share of the own mask of the first, of the mask key of the others

An own mask hides an update whose pairwise masks come to be known after all, as those of a client that was taken for gone and is
only late. So nobody may ever learn both: a party answers `unmask` once, and not at all where a client is both here and gone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fedmllm.algorithms import RoundInfo
from fedmllm.secure import primitives as crypto
from fedmllm.secure.fixed import FixedPoint, Vector
from fedmllm.secure.settings import PHASES, Pairwise, Phase
from fedmllm.tensors import State, Tensors


class Refusal(ValueError):  # noqa: N818 (it says what happened)
    """What a party does not do, in one sentence that may be told to the server."""


@dataclass(frozen=True)
class MaskGroup:
    """What all know of a round beforehand: its name (run, round, attempt), who shares masks with whom, and how many shares make
    a secret."""

    name: tuple[str, int, str]
    peers: Mapping[int, tuple[int, ...]]
    settings: Pairwise

    @classmethod
    def of(cls, settings: Pairwise, run: str, info: RoundInfo, attempt: bytes) -> MaskGroup:
        return cls((run, info.round, attempt.hex()), settings.peers(info.sampled, info.seed, info.round), settings)

    def holders(self, client: int) -> list[int]:
        """Those that hold a share of the client's secrets, itself included, in the order of the shares."""
        return sorted((client, *self.peers[client]))

    def enough(self, client: int) -> int:
        return self.settings.enough(len(self.holders(client)))

    def pair_mask(self, secret: bytes, one: int, other: int) -> Callable[[int], bytes]:
        """The mask of a pair from the secret it agreed on."""
        return crypto.keystream(crypto.derive(secret, "pair", *self.name, *sorted((one, other))))

    def own_mask(self, seed: bytes, client: int) -> Callable[[int], bytes]:
        return crypto.keystream(crypto.derive(seed, "own", *self.name, client))

    def check(self, seed: bytes, client: int) -> bytes:
        """By which a seed is known again, and which says nothing of it."""
        return crypto.derive(seed, "check", *self.name, client, length=crypto.SECRET)

    def sealing(self, secret: bytes, sender: int, receiver: int) -> bytes:
        """A key for each direction, so that what one sealed opens for the other alone and as coming from there."""
        return crypto.derive(secret, "seal", *self.name, sender, receiver)


def boxed(content: bytes | Vector) -> torch.Tensor:
    """Bytes as a tensor, which is what travels."""
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def unboxed(tensors: Tensors, name: str, length: int) -> bytes:
    """Raises ValueError where the tensor is not there or not of so many bytes."""
    found = tensors.get(name)
    if found is None or found.dtype != torch.uint8 or found.shape != (length,):
        raise ValueError(f"{name!r} is not {length} bytes")
    return found.numpy().tobytes()


class Party:
    """One client in one round. Raises Refusal for a question out of its turn, and for an answer that must not be given."""

    def __init__(self, group: MaskGroup, client: int) -> None:
        self._group, self._client = group, client
        self._next: list[Phase] = list(PHASES)
        self._own_seed, self._mask_seed = crypto.fresh(), crypto.fresh()
        self._seal, self._mask = crypto.KeyPair.of(crypto.fresh()), crypto.KeyPair.of(self._mask_seed)
        self._keys: dict[int, tuple[bytes, bytes]] = {}
        self._shares: dict[int, tuple[bytes, bytes]] = {}

    def _turn(self, phase: Phase) -> None:
        if not self._next or self._next[0] != phase:
            told = "has been answered in this round" if phase not in self._next else "comes before its turn"
            raise Refusal(f"secure aggregation: {phase!r} {told}")
        self._next.pop(0)

    @property
    def _enough(self) -> int:
        return self._group.enough(self._client)

    def keys(self) -> State:
        self._turn("keys")
        check = self._group.check(self._own_seed, self._client)
        return {"keys": {"seal": boxed(self._seal.public), "mask": boxed(self._mask.public), "check": boxed(check)}}

    def shares(self, asked: State) -> State:
        """`asked["keys"]` has under each peer's number both of its public keys, one after the other."""
        self._turn("shares")
        keys: dict[int, bytes] = {}
        for name in asked.get("keys", {}):
            if not name.isdecimal() or int(name) not in self._group.peers[self._client]:
                raise Refusal("secure aggregation: was sent the key of a client that is no peer")
            keys[int(name)] = unboxed(asked["keys"], name, 2 * crypto.KEY)
        self._keys = {peer: (both[: crypto.KEY], both[crypto.KEY :]) for peer, both in keys.items()}
        mine = {self._seal.public, self._mask.public}
        if len(mine.union(*self._keys.values())) != 2 + 2 * len(self._keys):
            raise Refusal("secure aggregation: two clients have one key")
        self._demand(len(self._keys) + 1)
        holders, sealed = self._group.holders(self._client), dict[str, torch.Tensor]()
        own = crypto.split(self._own_seed, self._enough, len(holders))
        mask = crypto.split(self._mask_seed, self._enough, len(holders))
        for peer, own_share, mask_share in zip(holders, own, mask, strict=True):
            if peer == self._client:
                self._shares[peer] = own_share, mask_share
            elif peer in self._keys:
                key = self._group.sealing(self._seal.agree(self._keys[peer][0]), self._client, peer)
                sealed[str(peer)] = boxed(crypto.seal(key, own_share + mask_share))
        return {"shares": sealed}

    def open(self, asked: State) -> None:
        """Take in the shares that peers sealed for me. What `masked` begins with, and done before the client trains."""
        self._turn("masked")
        for name, tensor in sorted(asked.get("shares", {}).items()):
            if not name.isdecimal() or int(name) not in self._keys:
                raise Refusal("secure aggregation: was sent the share of a client that gave no key")
            peer = int(name)
            key = self._group.sealing(self._seal.agree(self._keys[peer][0]), peer, self._client)
            try:
                both = crypto.unseal(key, unboxed({name: tensor}, name, SEALED))
            except ValueError:
                raise Refusal(f"secure aggregation: the shares of client {peer} were altered on the way") from None
            self._shares[peer] = both[: crypto.SECRET], both[crypto.SECRET :]
        self._demand(len(self._shares))

    def masked(self, vector: Vector, fixed: FixedPoint) -> State:
        """The vector under all its masks; changed in place."""
        fixed.add_mask(vector, self._group.own_mask(self._own_seed, self._client), 1)
        for peer in self._shares.keys() - {self._client}:
            mask = self._group.pair_mask(self._mask.agree(self._keys[peer][1]), self._client, peer)
            fixed.add_mask(vector, mask, sign_of(self._client, peer))
        return {"masked": {"vector": boxed(vector)}}

    def unmask(self, asked: State) -> State:
        """`asked["unmask"]` has the numbers of the clients that are `here` and of those that are `gone`."""
        self._turn("unmask")
        told = asked.get("unmask", {})
        here, gone = (set(told[name].tolist()) if name in told else set() for name in ("here", "gone"))
        if here & gone:
            raise Refusal("secure aggregation: was asked for both secrets of one client, which would show its update")
        if self._client not in here or here | gone != self._shares.keys():
            raise Refusal("secure aggregation: was asked for secrets of other clients than it shares masks with")
        self._demand(len(here))
        shares = {str(c): boxed(self._shares[c][0]) for c in sorted(here)}
        shares |= {str(c): boxed(self._shares[c][1]) for c in sorted(gone)}
        self._shares.clear()
        return {"unmask": shares}

    def _demand(self, there: int) -> None:
        if there < self._enough:
            raise Refusal(f"secure aggregation: {there} clients share masks with it, and {self._enough} are needed")


SEALED = 2 * crypto.SECRET + 16
"""Bytes of two shares and the tag that shows whether they were altered."""


def sign_of(client: int, peer: int) -> int:
    """With which sign the client adds the mask it has with the peer; the other way round it is the opposite."""
    return 1 if client < peer else -1


__all__ = ["SEALED", "MaskGroup", "Party", "Refusal", "boxed", "sign_of", "unboxed"]
