"""A model's processor from its files. Videos are never shown here, so what only videos need is not asked for.

transformers' video processors exist only with torchvision, and a processor that knows videos cannot be loaded without one.
Where torchvision is missing, such a processor gets a stand-in for that part; pictures and text do not touch it.
"""

from __future__ import annotations

from typing import Any

from transformers import PROCESSOR_MAPPING, AutoImageProcessor, AutoProcessor, AutoTokenizer
from transformers.utils import PushToHubMixin, is_torchvision_available


class NoVideos(PushToHubMixin):  # type: ignore[misc]
    """In the place of a video processor. The attributes are what processors read from theirs when made or saved."""

    _auto_class = None
    slice_mode = False
    downsample_mode = "16x"
    num_frames = fps = None

    def to_dict(self) -> dict[str, Any]:
        return {}


def picture_processor(processor_class: Any) -> Any:
    """The same processor class, which takes `NoVideos` for its video processor."""

    def check(self: Any, name: str, argument: Any) -> Any:
        if isinstance(argument, NoVideos):
            return NoVideos
        return processor_class.check_argument_for_proper_class(self, name, argument)

    members = {"check_argument_for_proper_class": check, "__module__": processor_class.__module__}
    return type(processor_class.__name__, (processor_class,), members)


def load_processor(source: str, config: Any, trust: bool) -> Any:
    """The processor of the model whose config is `config`. Raises what transformers raises where it cannot be loaded."""
    known = PROCESSOR_MAPPING.get(type(config), None)
    if known is None or "video_processor" not in known.get_attributes() or is_torchvision_available():
        return AutoProcessor.from_pretrained(source, trust_remote_code=trust)
    auto = {"image_processor": AutoImageProcessor, "tokenizer": AutoTokenizer}
    parts = [
        NoVideos() if part == "video_processor" else auto[part].from_pretrained(source, trust_remote_code=trust)
        for part in known.get_attributes()
    ]
    settings, _ = known.get_processor_dict(source)
    return picture_processor(known).from_args_and_dict(parts, settings)
