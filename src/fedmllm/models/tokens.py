"""Conversations as token ids; each distinct prompt is tokenised once.

The tokens that a processor writes for pictures (how many, in which tiles) depend only on the pictures' sizes, and so do its
other inputs except the pixels. Blank pictures of the same sizes are therefore enough for tokenising: pixels are read only
when they are needed, and equal questions about pictures of equal size are tokenised once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image
from torch import Tensor

from fedmllm.data.images import Picture, decode
from fedmllm.data.prompts import Conversation
from fedmllm.models.backbone import Backbone
from fedmllm.models.pictures import PIXELS
from fedmllm.models.sample_text import SampleText

Size = tuple[int, int]
_KEPT = 1 << 14
"""Distinct prompts and answers that are remembered, so that looking at all samples once does not take memory for all."""
_LETTER, _AT_EDGES = "x", 16


@dataclass(frozen=True, eq=False)
class Prompt:
    """`ids` of the user's turn; `tokenwise` and `imagewise` as in `Encoded`. Shared by equal prompts, so never modified."""

    ids: tuple[int, ...]
    tokenwise: dict[str, tuple[int, ...]]
    imagewise: dict[str, Tensor]

    @property
    def has_pixels(self) -> bool:
        """Whether an input other than the known ones may contain pixels: it has floats, while counts and sizes are integers."""
        return any(tensor.is_floating_point() for tensor in self.imagewise.values())


class Tokens:
    """The tokenised prompts and answers of one model.

    With `always_decode`, the processor always gets the pictures themselves. A processor with code of its own needs that,
    because its tokens may depend on more than the picture's size.
    """

    def __init__(self, backbone: Backbone, always_decode: bool) -> None:
        self._backbone = backbone
        self._always_decode = always_decode
        self._text = SampleText(backbone.processor, str(backbone.processor.chat_template))
        self._prompts: dict[tuple[str, tuple[Size, ...]], Prompt] = {}
        self._answers: dict[str, tuple[int, ...]] = {}

    def prompt(self, conversation: Conversation, pictures: Sequence[Picture] = (), sizes: Sequence[Size] = ()) -> Prompt:
        """The user's turn about the pictures; `sizes` has the (width, height) of each."""
        key = (conversation.user, tuple(sizes))
        if pictures and self._always_decode:
            return self._process(conversation, list(map(decode, pictures)))
        if key not in self._prompts:
            _bound(self._prompts)
            prompt = self._process(conversation, [Image.new("RGB", size) for size in sizes])
            if pictures and prompt.has_pixels:
                return self._process(conversation, list(map(decode, pictures)))
            self._prompts[key] = prompt
        return self._prompts[key]

    def at_most(self, conversation: Conversation, pictures: Sequence[Picture], sizes: Sequence[Size]) -> int | None:
        """A number of tokens that the user's turn and the answer do not exceed, from their letters; None if only tokenising
        them can tell. Raises EntryError for a picture that the processor refuses.

        Every token of an ASCII text stands for at least one of its letters, because no tokenizer's normalisation makes such a
        text longer. Where it meets the template, other tokens than there may arise.
        """
        letters = conversation.user + conversation.answer
        if not letters.isascii() or self._text.has_control(letters):
            return None
        frame = self.prompt(Conversation(_LETTER, "", conversation.image), pictures, sizes)
        if pictures and (self._always_decode or frame.has_pixels):
            return None
        return len(frame.ids) + len(letters) + sum(map(len, self._backbone.answer_frame)) + _AT_EDGES

    def _process(self, conversation: Conversation, pictures: Sequence[Image.Image]) -> Prompt:
        user, cut = self._text.cut(conversation.user)
        backbone = self._knowing_stand_in if cut else self._backbone
        inputs = backbone.process(backbone.prompt(replace(conversation, user=user)), pictures)
        ids = inputs.pop("input_ids")[0].tolist()
        for unused in ("attention_mask", "labels"):
            inputs.pop(unused, None)
        tokenwise = {k: v[0].tolist() for k, v in inputs.items() if isinstance(v, Tensor) and v.shape == (1, len(ids))}
        imagewise = {k: v for k, v in inputs.items() if k not in tokenwise and k not in PIXELS and isinstance(v, Tensor)}
        positions, restored = zip(*self._text.restore(ids, cut), strict=True)
        return Prompt(restored, {k: tuple(values[i] for i in positions) for k, values in tokenwise.items()}, imagewise)

    @property
    def _knowing_stand_in(self) -> Backbone:
        return replace(self._backbone, processor=self._text.processor)

    def answer(self, text: str) -> tuple[int, ...]:
        """The assistant's turn up to and including its end token, as the chat template writes it."""
        if text not in self._answers:
            _bound(self._answers)
            before, after = self._backbone.answer_frame
            answer, cut = self._text.cut(text)
            tokenizer = (self._knowing_stand_in if cut else self._backbone).tokenizer
            ids = tokenizer(before + answer + after, add_special_tokens=False)["input_ids"]
            ends = [i for i, token in enumerate(ids) if token in self._backbone.end_ids]
            ids = ids[: ends[0] + 1] if ends else [*ids, self._backbone.end_ids[0]]
            self._answers[text] = tuple(token for _, token in self._text.restore(ids, cut))
        return self._answers[text]


def _bound(remembered: dict[Any, Any]) -> None:
    if len(remembered) >= _KEPT:
        remembered.clear()
