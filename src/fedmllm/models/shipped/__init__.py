"""The models that ship with the package, each in the folder of its name. Nothing here needs torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ShippedModel:
    """A model in this package: `folder` holds its weights and processor as Hugging Face's `save_pretrained` writes them."""

    folder: Path
    description: str


SHIPPED = {
    name: ShippedModel(Path(__file__).parent / name, description)
    for name, description in (
        ("pocket", "The small model that ships with the package: Idefics3 with a Llama text model."),
        ("pocket-qwen", "A second one by the same recipe: Qwen2-VL."),
    )
}
"""name -> the model that `model.name` selects by it."""


def source_of(name: str) -> str:
    """What `from_pretrained` takes for `model.name`: the folder of a shipped model, otherwise the name itself."""
    return str(SHIPPED[name].folder) if name in SHIPPED else name
