"""The families of which the recipe makes a pocket model."""

from __future__ import annotations

from recipes.pocket.architecture import Family
from recipes.pocket.idefics3 import Idefics3, LargeIdefics3
from recipes.pocket.qwen2_vl import Qwen2VL

FAMILIES: dict[str, Family] = {family.name: family for family in (Idefics3(), LargeIdefics3(), Qwen2VL())}
DEFAULT = Idefics3.name
"""The family of the shipped model."""
