"""A tokenised conversation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Encoded:
    """One tokenised conversation. `options` are the closed question's answers; `picture` numbers a distinct picture.

    `tokenwise` holds further inputs of the prompt's length (token types), `imagewise` those that come one a picture.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]
    picture: int | None
    tokenwise: dict[str, tuple[int, ...]]
    imagewise: dict[str, Tensor]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.answer)
