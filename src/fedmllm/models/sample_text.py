"""Texts of samples in a prompt: they are tokenised as text, and only the chat template and the processor write control tokens.

A text may contain the string of a control token: the image token, the end of a turn, or a whole forged turn. A tokenizer
cannot tell such a string from the template's own. It is therefore cut out of the text, a stand-in takes its place while the
template and the processor do their work, and its tokens as ordinary text are put where the stand-in is. A text without such a
string takes none of these steps.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from tokenizers import AddedToken

_STAND_IN = "<|fedmllm text|>"
Ids = Sequence[int]


class SampleText:
    """Cuts the strings of control tokens out of texts and puts their tokens as ordinary text back.

    `processor` is the model's processor, or a tokenizer alone. Its control tokens are those that the tokenizer calls special,
    those that the processor names, and the other added tokens in the chat template. White space is none of them, nor are
    words that a vocabulary was extended by, such as the places `<loc0001>` of PaliGemma.
    """

    def __init__(self, processor: Any, template: str) -> None:
        self._original, self._tokenizer = processor, getattr(processor, "tokenizer", processor)
        added = self._tokenizer.added_tokens_decoder.values()
        strings = {token.content for token in added if token.special or token.content in template}
        named = (value for key, value in vars(processor).items() if key.endswith("_token"))
        strings |= {str(value) for value in named if isinstance(value, str | AddedToken)}
        strings |= set(map(str, self._tokenizer.all_special_tokens))
        self._strings = sorted((s for s in strings if s.strip()), key=lambda s: (-len(s), s))  # the longest match comes first
        ids = self._tokenizer.convert_tokens_to_ids(self._strings)
        self._unknown = self._tokenizer.unk_token_id  # which an unknown character also gives
        self._ids = set(ids) - {None, self._unknown}

    @cached_property
    def processor(self) -> Any:
        """A copy of the processor that knows the stand-in, and to which all control tokens are special."""
        processor = copy.deepcopy(self._original)
        tokenizer = getattr(processor, "tokenizer", processor)
        known = {token.content: token.normalized for token in tokenizer.added_tokens_decoder.values()}
        marks = [AddedToken(s, normalized=known.get(s, False), special=True) for s in (*self._strings, _STAND_IN)]
        tokenizer.add_tokens(marks, special_tokens=True)
        return processor

    @property
    def _copied(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    @cached_property
    def _control(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, [_STAND_IN, *self._strings])), re.IGNORECASE)

    def has_control(self, text: str) -> bool:
        """Whether the text contains the string of a control token, in capital or small letters."""
        return self._control.search(text) is not None

    def cut(self, text: str) -> tuple[str, list[list[int]]]:
        """The text with a stand-in for each string of a control token, and the tokens of these strings as ordinary text.

        An ordinary text is returned as it is, with an empty list.
        """
        if not any(string in text for string in self._strings) and self._harmless(self._tokenizer, text):
            return text, []
        pieces = re.split(f"({'|'.join(map(re.escape, [_STAND_IN, *self._strings]))})", text)
        cut = _STAND_IN.join(pieces[::2])
        if len(pieces) == 1 or not self._harmless(self._copied, cut):
            # A control token arises from other letters, as the tokenizer normalises them: the whole text is cut out.
            pieces, cut = ["", text, ""], _STAND_IN
        return cut, [self._as_text(piece) for piece in pieces[1::2]]

    def restore(self, ids: Ids, cut: Sequence[Ids]) -> Iterator[tuple[int, int]]:
        """(position in `ids`, token) of the tokens with those of `cut` in place of the stand-ins, in their order."""
        stand_in, rest = self._copied.convert_tokens_to_ids(_STAND_IN) if cut else None, iter(cut)
        for position, token in enumerate(ids):
            yield from ((position, t) for t in (next(rest) if token == stand_in else (token,)))

    def _harmless(self, tokenizer: Any, text: str) -> bool:
        return self._ids.isdisjoint(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _as_text(self, text: str) -> list[int]:
        def encode(text: str) -> list[int]:
            ids: list[int] = self._copied(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
            return ids

        # After a line break, so that no space is added as at the beginning of a whole text.
        start, ids = encode("\n"), encode("\n" + text)
        ids = ids[len(start) :] if ids[: len(start)] == start and len(ids) > len(start) else encode(text)
        if {self._unknown, *self._ids}.isdisjoint(ids):
            return ids
        # The vocabulary holds the string as a word too, so its letters are written one by one.
        return [token for letter in text for token in encode(letter) if token not in self._ids]
