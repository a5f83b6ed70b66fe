"""When two answers are the same, given inputs and their right values."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmllm.evaluation.matching import folded, normal_form, token_f1, words
from helpers import quick


@pytest.mark.parametrize(
    ("left", "right"),
    [
        # Case, width, composition, space
        ("Yes.", "yes"), ("CT", "ＣＴ"), ("caf\u00e9", "cafe\u0301"), ("Straße", "STRASSE"), ("  red\tcircle ", "red circle"),
        ("µg", "μg"), ("㎝", "cm"), ("co\u200boperate", "cooperate"), ("❤\ufe0f", "❤"),
        # Numbers
        ("2", "2.0"), ("-5", "−5"), ("-5", "–5"), ("1.5cm", "1.5 cm"), ("1,000", "1000"), ("1,234.50", "1234.5"),
        ("½", "1/2"), ("1½", "1 1/2"), (".5", "0.5"), ("007", "7"), ("-0", "0"), ("٢", "2"), ("3–4", "3-4"), ("3 - 4", "3-4"),
        ("1 / 2", "1/2"), ("2.0-3.0 cm", "2-3 cm"), ("50%", "50 %"),
        ("< 5", "<5"), ("10⁻³", "10^-3"), ("m²", "m2"), ("CO₂", "CO2"),
        # Punctuation without a meaning, in any script
        ("是的", "是的。"), ("是 的", "是的"), ("«oui»", "oui"), ("¿sí?", "sí"), ("“red”", "red"), ("x-ray", "X ray"),
        ("U.S.", "us"), ("crohn’s", "crohn's"), ("left, upper", "left upper"), ("(B)", "b"),
        ("**No**", "no"), ("`no`", "no"), ("हाँ।", "हाँ"),
        # Articles
        ("the heart", "Heart"), ("The heart.", "heart"), ("an apple", "apple"), ("A red circle.", "red circle"),
        ("in the left lung", "in left lung"), ("a the dog", "dog"), ("hepatitis a", "Hepatitis A"), ("A", "a"),
    ],
)  # fmt: skip
def test_answers_that_say_the_same(left: str, right: str) -> None:
    assert normal_form(left, "exact") == normal_form(right, "exact")


@pytest.mark.parametrize(
    ("left", "right"),
    [
        # Decimal points, signs, fractions, powers
        ("1.5 cm", "15 cm"), ("-2", "2"), ("1/2", "12"), ("1/2", "1 2"), ("1.5", "1,5"), ("1,5", "15"), ("3-4", "34"),
        ("+2", "2"), ("10²", "102"), ("1½", "11/2"), ("x²", "x³"), ("1e3", "1e-3"), ("10:30", "1030"),
        ("120/80", "12080"), ("1.05", "1.5"),
        ("100", "10"), ("2.0.1", "2.1"), ("12.03.2020", "12.03.202"), ("v2.0", "v20"), ("2*3", "23"), ("共1.5个", "共15个"),
        ("약1.5", "약15"), ("10⁻³", "10³"), ("Rh-", "Rh+"), ("Rh-", "Rh"), ("1-", "1"),
        # Units and symbols
        ("1.5 mm", "1.5 cm"), ("5 m/s", "5 ms"), ("50 %", "50"), ("5°", "5"), ("5′", "5"), ("$5", "€5"), ("<5", "5"),
        ("<5", ">5"), ("≤5", "<5"), ("C++", "C"), ("C#", "C"), ("A+", "A-"), ("T2*", "T2"), ("Q&A", "Q A"), ("😀", "😢"),
        # Letters that are names
        ("hepatitis A", "hepatitis"), ("vitamin A deficiency", "vitamin deficiency"), ("Vitamin", "Vitamin A"),
        ("type a", "type"), ("A and B", "B"), ("a", "the"), ("theatre", "atre"),
        # Others
        ("是", "否"), ("yes", "no"), ("…", "—"), ("", "a"),
    ],
)  # fmt: skip
def test_answers_that_differ(left: str, right: str) -> None:
    assert normal_form(left, "exact") != normal_form(right, "exact")


TEXT = st.text(st.one_of(st.sampled_from("aA Tthe-−.,:/*+'’1205e²½é的ก%#_`\"()<>^"), st.characters()), max_size=12)


@quick
@given(TEXT)
def test_a_normal_form_is_its_own(text: str) -> None:
    form = normal_form(text, "exact")
    assert normal_form(form, "exact") == form
    assert folded(folded(text)) == folded(text)


@quick
@given(TEXT, st.sampled_from(("NFC", "NFD")))
def test_composed_and_decomposed_characters_are_the_same(text: str, form: str) -> None:
    assert normal_form(unicodedata.normalize(form, text), "exact") == normal_form(text, "exact")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes.", "yes"),
        ("  The  red\tCircle! ", "red circle"),
        ("an apple, a day", "apple day"),
        ("theatre", "theatre"),
        ("A", "A"),  # nothing is left, so it stays as it stands
        ("x-ray", "xray"),
        ("", ""),
        ("1.5 cm", "15 cm"),
        ("hepatitis A", "hepatitis"),
        ("是的。", "是的。"),
    ],
)
def test_the_rule_of_squad(text: str, expected: str) -> None:
    assert normal_form(text, "squad") == expected


@pytest.mark.parametrize(
    ("predicted", "truth", "expected"),
    [
        ("the red circle", "A red circle.", 1.0),
        ("red", "blue", 0.0),
        ("red circle", "red square", 0.5),
        ("red red red", "red", 0.5),  # 2·1 / (3 + 1)
        ("", "red", 0.0),
    ],
)
def test_token_f1(predicted: str, truth: str, expected: float) -> None:
    for match in ("exact", "squad"):
        assert token_f1(predicted, truth, match) == token_f1(truth, predicted, match) == expected  # type: ignore[arg-type]


def test_token_f1_counts_characters_where_words_are_not_written_apart() -> None:
    assert words("左肺结节。", "exact") == ["左", "肺", "结", "节"]
    assert token_f1("左肺结节", "左肺", "exact") == pytest.approx(2 * 2 / (4 + 2))
    assert token_f1("はい、そう", "そう", "exact") == pytest.approx(2 * 2 / (4 + 2))
    assert words("한국어 5개", "exact") == ["한국어", "5", "개"], "Korean words are written apart"
    assert token_f1("the", "a", "squad") == 1.0, "nothing is left of either"
    assert token_f1("1.5 cm", "15 cm", "exact") == 0.5
