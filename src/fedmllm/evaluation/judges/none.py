"""The absence of a judge, which is the default."""

from __future__ import annotations

from fedmllm.evaluation.judges import judges


@judges.register("none")
def none() -> None:
    """No judge: open answers are compared with the reference by `eval.match`."""
