"""The names of modality patterns, kinds of runs and rules of matching, as experiment files and the command line spell them."""

from __future__ import annotations

from typing import Literal

Pattern = Literal["both", "image", "text"]
BaselineKind = Literal["zero-shot", "local", "centralised"]
RunKind = Literal["federated", BaselineKind]
Match = Literal["exact", "squad"]
"""When two answers are the same (`evaluation.matching`)."""

TrackerName = Literal["aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"]
"""The trackers of Accelerate, named as the modules that they import."""
