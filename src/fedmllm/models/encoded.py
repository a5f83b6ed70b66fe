"""A tokenised conversation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Encoded:
    """One tokenised conversation. `options` are the answers of a closed question; `pictures` are the numbers of its pictures
    in their order; `text` says whether it shows the text modality.

    `tokenwise` holds further inputs with one value per prompt token (token types), `imagewise` those with one per picture.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]
    pictures: tuple[int, ...]
    tokenwise: dict[str, tuple[int, ...]]
    imagewise: dict[str, Tensor]
    text: bool = False

    @property
    def pattern(self) -> tuple[bool, bool]:
        """Whether it shows an image, and whether it shows a text."""
        return bool(self.pictures), self.text

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.answer)
