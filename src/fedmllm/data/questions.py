"""What the two sets of medical questions have in common: how a question is closed, and how it is answered then."""

from __future__ import annotations

from fedmllm.data.files import Entry, EntryError

YES_NO = ("yes", "no")


def answer_of(entry: Entry) -> tuple[str, tuple[str, ...] | None, bool]:
    """(answer, choices, closed) of an entry with `answer` and `answer_type`, which is OPEN or CLOSED in any case.

    A closed question whose answer is yes or no, however it is written ("Yes", "no."), is scored by the probabilities of the
    two. The other closed ones ("is this a CT or an MRI?", "in what plane?") do not say in the published files what they
    choose from; they are answered freely and judged by exact match, and still count among the closed ones, as do those
    in a language other than English. An open question whose answer happens to be yes is answered freely, too.
    """
    kind = entry.text("answer_type").upper()
    if kind not in ("OPEN", "CLOSED"):
        raise EntryError(f"'answer_type' is {entry.values['answer_type']!r}, neither OPEN nor CLOSED")
    answer = entry.text("answer", required=False)
    plain = answer.lower().rstrip(" .")
    if kind == "CLOSED" and plain in YES_NO:
        return plain, YES_NO, True
    return answer, None, kind == "CLOSED"
