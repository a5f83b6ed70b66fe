"""Judges of open answers, one file each: anything that replies "yes" or "no" to a prompt."""

from __future__ import annotations

from collections.abc import Callable

from fedmllm.registry import Registry

Judge = Callable[[str], str]
"""prompt -> reply. Raises RunError if there is no reply."""

judges: Registry[Judge | None] = Registry("judge", __name__)
