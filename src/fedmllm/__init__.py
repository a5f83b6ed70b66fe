"""Federated fine-tuning of multimodal language models whose clients hold different modalities.

    import fedmllm
    experiment = fedmllm.load("quickstart", **{"train.rounds": 5})
    result = fedmllm.run(experiment)

Importing the package is cheap: torch and transformers are imported by the first call that needs them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedmllm.api import Model, Result, load, run

__version__ = "0.1.0"
__all__ = ["Model", "Result", "__version__", "load", "run"]


def __getattr__(name: str) -> Any:
    if name in ("Model", "Result", "load", "run"):
        from fedmllm import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
