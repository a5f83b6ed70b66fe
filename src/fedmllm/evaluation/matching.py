"""When two answers are the same: one normal form for references, predictions and class names.

"exact" compares what answers say. Text is brought to Unicode's NFKC form and case-folded. Numbers are compared by value ("2" is
"2.0", "−5" is "-5"), with their signs, decimal points, fractions, ratios and ranges: "1.5 cm" is not "15 cm", "1/2" not "12".
Symbols and units count ("C++", "<5", "50 %", "mg/ml"). All other punctuation separates words ("x-ray" is "x ray"), except a
full stop or an apostrophe between two letters, which is dropped ("U.S." is "us"). Every character is a word of its own where
words are not written apart: Chinese, Japanese, Thai, Lao, Burmese, Khmer.

Of the articles, "the" and "an" are dropped before another word, "a" only as the first word of an answer: in "hepatitis A" and
"vitamin A deficiency" it is a name. Before "and" or "or", "a" is a name too.

"squad" is the rule of SQuAD (Rajpurkar et al. 2016, 1606.05250): ASCII punctuation and all articles are removed.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from functools import lru_cache

from fedmllm.kinds import Match

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)

# A power and a mixed fraction would run together in NFKC: 10² is not 102, and 1½ not 11/2.
_POWER = re.compile(r"(?<=\d)(?=[⁺⁻⁰¹²³⁴-⁹])")
_FRACTION = re.compile(r"(?<=\d)(?=[¼-¾⅐-⅞↉])")
_MINUS = re.compile("[‐-―−﹣]")
_EMPHASIS = re.compile(r"(?<!\w)(\*{1,3})(?=[^\W_])(.+?)(?<=[^\W_])\1(?!\w)")
_UNSPACED = re.compile(
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3041-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])"
)
_INSIDE_WORD = re.compile(r"(?<=[^\W\d_])['’.](?=[^\W\d_])")
_SPACED_OPERATOR = re.compile(r"(?<=\d)\s*([-/])\s*(?=\d)")
_NUMBER = re.compile(r"(?<![^\W_])(-?\.?\d+(?:[.,:/-]\d+)*(?:e[+-]?\d+(?!\w))?(?:-(?!\w))?)")
_DECIMAL = re.compile(r"(\d{1,3}(?:,\d{3})+|\d*)(?:\.(\d+))?")
_SIGN_AFTER_WORD = re.compile(r"(?<=[^\W_])-(?!\w)")
_KEPT_SIGN = "\ue000"
"""Stands for the sign in "Rh-" while other hyphens are removed; a character that no text holds."""


class _Separate(dict[int, str]):
    """For `str.translate`: punctuation becomes a space, a symbol a word of its own, invisible characters disappear."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)
        if category == "Cf" or "\ufe00" <= character <= "\ufe0f":  # joiners, marks of direction, variants of emoji
            separated = ""
        elif character in "%‰&#@*/°§′" or (category[0] == "S" and character != "`"):
            separated = f" {character} "
        else:
            separated = " " if category[0] in "PZ" or category == "Cc" or character == "`" else character
        self[code] = separated
        return separated


_SEPARATE = _Separate()


def folded(text: str) -> str:
    """The text in NFKC, case-folded, with single spaces: what differs only in case, width or spaces is equal."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(text.split())


def words(text: str, match: Match) -> list[str]:
    """The words of an answer that count."""
    if match == "squad":
        return _ARTICLES.sub(" ", text.lower().translate(_ASCII_PUNCTUATION)).split()
    return _without_articles(_words(text))


@lru_cache(maxsize=65536)
def normal_form(text: str, match: Match) -> str:
    """Equal for two answers that are the same. An answer without a word that counts ("the", "…") is left as it stands."""
    return " ".join(words(text, match)) or text.strip()


def token_f1(predicted: str, truth: str, match: Match) -> float:
    """The F1 of the words that two answers share."""
    a, b = words(predicted, match), words(truth, match)
    shared = sum((Counter(a) & Counter(b)).values())
    return 2 * shared / (len(a) + len(b)) if shared else float(a == b)


def _words(text: str) -> list[str]:
    text = folded(_FRACTION.sub(" ", _POWER.sub("^", text))).replace("⁄", "/")
    text = _EMPHASIS.sub(r"\2", _MINUS.sub("-", text))
    text = _INSIDE_WORD.sub("", _UNSPACED.sub(r" \1 ", text))
    pieces = _NUMBER.split(_SPACED_OPERATOR.sub(r"\1", text))
    tokens = []
    for number, piece in enumerate(pieces):
        if number % 2:
            tokens.append(_number(piece))
        else:
            tokens += _SIGN_AFTER_WORD.sub(_KEPT_SIGN, piece).translate(_SEPARATE).replace(_KEPT_SIGN, "-").split()
    return tokens


def _number(text: str) -> str:
    """ "1,000.50" → "1000.5", "007" → "7"; the parts of a ratio, fraction or range likewise. Digits become ASCII."""
    text = "".join(str(unicodedata.decimal(c, c)) for c in text)
    number = "".join(_decimal(part) for part in re.split("([:/e+-])", text))
    return "0" if number == "-0" else number


def _decimal(text: str) -> str:
    match = _DECIMAL.fullmatch(text)
    if not text or match is None:  # a separator, or a date or version such as 12.03.2020
        return text
    fraction = (match[2] or "").rstrip("0")
    return (match[1].replace(",", "").lstrip("0") or "0") + (f".{fraction}" if fraction else "")


def _without_articles(tokens: list[str]) -> list[str]:
    def before_word(i: int) -> bool:
        return i + 1 < len(tokens) and tokens[i + 1][0].isalpha()

    tokens = [word for i, word in enumerate(tokens) if not (word in ("the", "an") and before_word(i))]
    while tokens[:1] == ["a"] and before_word(0) and tokens[1] not in ("and", "or"):
        tokens = tokens[1:]
    return tokens
