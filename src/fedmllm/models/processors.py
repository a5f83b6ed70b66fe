"""Load a model's processor from its files, without the requirements that only videos have.

The video processors of transformers require torchvision, and a processor that supports videos cannot be loaded without its
video processor. If torchvision is missing, the video processor is replaced by a placeholder, which pictures and text never
use.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PROCESSOR_MAPPING, AutoFeatureExtractor, AutoImageProcessor, AutoProcessor, AutoTokenizer
from transformers.utils import PushToHubMixin, is_torchvision_available


class NoVideos(PushToHubMixin):  # type: ignore[misc]
    """Replaces a video processor. It has the attributes that processors read when they are constructed or saved."""

    _auto_class = None
    slice_mode = False
    downsample_mode = "16x"
    num_frames = fps = None

    def to_dict(self) -> dict[str, Any]:
        return {}


def picture_processor(processor_class: Any) -> Any:
    """The same processor class, which also accepts `NoVideos` as its video processor."""

    def check(self: Any, name: str, argument: Any) -> Any:
        if isinstance(argument, NoVideos):
            return NoVideos
        return processor_class.check_argument_for_proper_class(self, name, argument)

    members = {"check_argument_for_proper_class": check, "__module__": processor_class.__module__}
    return type(processor_class.__name__, (processor_class,), members)


def has_processor(folder: Path) -> bool:
    """Whether a processor was saved in the folder."""
    return (folder / "tokenizer_config.json").is_file()


def load_processor(source: str, config: Any, trust: bool) -> Any:
    """The processor of the model whose config is `config`. Exceptions of transformers pass through if it cannot be loaded."""
    processor_class = PROCESSOR_MAPPING.get(type(config), None)
    if processor_class is None or "video_processor" not in processor_class.get_attributes() or is_torchvision_available():
        return AutoProcessor.from_pretrained(source, trust_remote_code=trust)
    auto = {"image_processor": AutoImageProcessor, "tokenizer": AutoTokenizer, "feature_extractor": AutoFeatureExtractor}
    parts = [
        NoVideos() if part == "video_processor" else auto[part].from_pretrained(source, trust_remote_code=trust)
        for part in processor_class.get_attributes()
    ]
    settings, _ = processor_class.get_processor_dict(source)
    return picture_processor(processor_class).from_args_and_dict(parts, settings)
