"""What VQA-RAD and SLAKE have in common: which questions are closed, and how they are answered."""

from __future__ import annotations

from fedmllm.data.files import Entry, EntryError

YES_NO = ("yes", "no")


def read_answer(entry: Entry) -> tuple[str, tuple[str, ...] | None, bool]:
    """(answer, choices, closed) of an entry with `answer` and `answer_type`, which is OPEN or CLOSED in any case.

    A closed question whose answer is yes or no in any spelling ("Yes", "no.") is scored by the probabilities of the two.
    For other closed questions ("is this a CT or an MRI?", "in what plane?", and those not in English), the published files
    do not list the options: they are answered freely, judged by exact match, and still count as closed. An open question
    whose answer happens to be yes is also answered freely.
    """
    kind = entry.text("answer_type").upper()
    if kind not in ("OPEN", "CLOSED"):
        raise EntryError(f"'answer_type' is {entry.values['answer_type']!r}, neither OPEN nor CLOSED")
    answer = entry.text("answer", required=False)
    plain = answer.lower().rstrip(" .")
    if kind == "CLOSED" and plain in YES_NO:
        return plain, YES_NO, True
    return answer, None, kind == "CLOSED"
