"""The names of modality patterns and of kinds of runs, as the experiment file and the command line spell them."""

from __future__ import annotations

from typing import Literal

Pattern = Literal["both", "image", "text"]
BaselineKind = Literal["zero-shot", "local", "centralised"]
RunKind = Literal["federated", BaselineKind]
