"""Conversations as token ids, each distinct one made once.

What a processor writes for a picture (how many image tokens, in which tiles) follows from the picture's size alone, and so
do the inputs that come beside the pixels. A blank picture of that size stands in for it here: the pixels are read where
they are needed, and equal questions about equally large pictures are tokenised once.
"""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from fedmllm.data.images import Picture, decode
from fedmllm.data.prompts import Conversation
from fedmllm.models.backbone import Backbone
from fedmllm.models.pictures import PIXELS

Size = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Prompt:
    """`ids` of the user's turn; `tokenwise` and `imagewise` as in `Encoded`. Shared by all who ask the same: not written to."""

    ids: tuple[int, ...]
    tokenwise: dict[str, tuple[int, ...]]
    imagewise: dict[str, Tensor]

    @property
    def has_pixels(self) -> bool:
        """Whether an input beside the known ones may hold what the picture shows; counts and sizes are integers."""
        return any(tensor.is_floating_point() for tensor in self.imagewise.values())


class Tokens:
    """The tokenised prompts and answers of one model. `trusts` a processor of the model's own to be unlike any other: it is
    given the pictures themselves."""

    def __init__(self, backbone: Backbone, trusts: bool) -> None:
        self._backbone = backbone
        self._trusts = trusts
        self._prompts: dict[tuple[str, Size | None], Prompt] = {}
        self._answers: dict[str, tuple[int, ...]] = {}

    def prompt(self, conversation: Conversation, image: Picture | None, size: Size | None) -> Prompt:
        """The user's turn about the picture `image` of `size` (width, height); both None where it shows none."""
        key = (conversation.user, size)
        if image is not None and self._trusts:
            return self._process(conversation, decode(image))
        if key not in self._prompts:
            made = self._process(conversation, Image.new("RGB", size) if size is not None else None)
            if image is not None and made.has_pixels:
                return self._process(conversation, decode(image))
            self._prompts[key] = made
        return self._prompts[key]

    def _process(self, conversation: Conversation, picture: Image.Image | None) -> Prompt:
        inputs = self._backbone.process(self._backbone.prompt(conversation), picture)
        ids = inputs.pop("input_ids")[0]
        for unused in ("attention_mask", "labels"):
            inputs.pop(unused, None)
        tokenwise = {k: tuple(v[0].tolist()) for k, v in inputs.items() if isinstance(v, Tensor) and v.shape == (1, len(ids))}
        imagewise = {k: v for k, v in inputs.items() if k not in tokenwise and k not in PIXELS and isinstance(v, Tensor)}
        return Prompt(tuple(ids.tolist()), tokenwise, imagewise)

    def answer(self, text: str) -> tuple[int, ...]:
        """The assistant's turn up to and with its end mark, as the chat template writes it."""
        if text not in self._answers:
            before, after = self._backbone.answer_frame
            ids = self._backbone.tokenizer(before + text + after, add_special_tokens=False)["input_ids"]
            ends = [i for i, token in enumerate(ids) if token in self._backbone.end_ids]
            self._answers[text] = tuple(ids[: ends[0] + 1] if ends else [*ids, self._backbone.end_ids[0]])
        return self._answers[text]
