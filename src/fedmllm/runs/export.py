"""Write a run's model as a folder that loads with PEFT or transformers alone."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi
from peft import PeftModel
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig, AutoModelForImageTextToText

from fedmllm.config import Experiment
from fedmllm.errors import RunError
from fedmllm.models.adapter import read_adapter
from fedmllm.models.processors import NoVideos, load_processor
from fedmllm.models.shipped import SHIPPED, source_of
from fedmllm.storage.atomic import check_folder, write_atomically

BASE = "base"
"""The folder inside an exported adapter that holds the base model, if this comes with fedmllm and is not on the Hub."""


def export_adapter(adapter: Path, config: Experiment, to: Path) -> None:
    """Copy the adapter of a finished run to the new folder `to`, with what AutoPeftModel and AutoProcessor look for.

    The base model is named by its Hub id, or by the absolute path of its folder; a shipped model is copied into `to`. Raises
    RunError if the adapter is unreadable or `to` is not an empty folder.
    """
    with _new_folder(to) as folder:
        _write_adapter(adapter, config, folder, to)
        _save_processor(config, folder)


def export_merged(adapter: Path, config: Experiment, to: Path) -> None:
    """Merge the adapter of a finished run into its base model, and write both as one model to the new folder `to`.

    The weights have the precision in which the base model is stored. Raises RunError as `export_adapter` does, and for prompt
    tuning, whose vectors are in no weight.
    """
    if config.model.adapter.kind == "prompt-tuning":
        raise RunError("the vectors of prompt tuning cannot be merged into weights; export without --merged.")
    with _new_folder(to) as folder, TemporaryDirectory() as plain:
        _write_adapter(adapter, config, Path(plain), Path(plain))
        trust = config.model.trust_remote_code
        with warnings.catch_warnings():  # a deprecation inside PEFT
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            model = AutoModelForImageTextToText.from_pretrained(_base(config), dtype="auto", trust_remote_code=trust)
            merged: Any = PeftModel.from_pretrained(model, plain).merge_and_unload()
        merged.save_pretrained(folder)
        for weights in folder.glob("*.safetensors"):  # safetensors lets only their owner read what it writes
            weights.chmod((folder / "config.json").stat().st_mode)
        _save_processor(config, folder)


def _write_adapter(adapter: Path, config: Experiment, folder: Path, to: Path) -> None:
    """Write to `folder` what will lie in `to`."""
    read_adapter(adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    base = _base(config)
    if settings.get("task_type") is None:  # AutoPeftModel finds the base model's class by either of the two
        model_config = AutoConfig.from_pretrained(base, trust_remote_code=config.model.trust_remote_code)
        base_class = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(model_config)]
        settings["auto_mapping"] = {"base_model_class": base_class.__name__, "parent_library": base_class.__module__}
    if config.model.name in SHIPPED:
        shutil.copytree(base, folder / BASE)
        base = str((to / BASE).resolve())
    settings["base_model_name_or_path"] = base
    shutil.copyfile(adapter / "adapter_model.safetensors", folder / "adapter_model.safetensors")
    write_atomically(folder / "adapter_config.json", (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode())


def _base(config: Experiment) -> str:
    name = config.model.name
    return str(Path(name).resolve()) if name not in SHIPPED and Path(name).is_dir() else source_of(name)


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that takes its name when the block ends without an error, so that no half of an export is left.
    Raises RunError if `folder` holds anything or cannot be created."""
    check_folder(folder.parent)
    try:
        if folder.exists() and any(folder.iterdir()):
            raise RunError(f"{folder} is not empty; give a new folder with --to.")
        with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
            content = Path(scratch) / "content"
            content.mkdir()
            yield content
            content.replace(folder)
    except OSError as error:
        raise RunError(f"{folder} cannot be written ({error.strerror or error}); give another folder with --to.") from None


def _save_processor(config: Experiment, to: Path) -> None:
    """The base model's processor and chat template. One without its part for videos is left out, because it would not load
    where that part is available: there, the base model's own is used."""
    base, trust = _base(config), config.model.trust_remote_code
    processor = load_processor(base, AutoConfig.from_pretrained(base, trust_remote_code=trust), trust)
    if not isinstance(getattr(processor, "video_processor", None), NoVideos):
        processor.save_pretrained(to)


def on_hub(model: str) -> bool:
    """Whether a model's name is an id on the Hugging Face hub, rather than that of a folder or of a shipped model."""
    return model not in SHIPPED and not Path(model).exists()


def push(folder: Path, name: str) -> str:
    """Upload an exported folder to the private repository `name` on the Hugging Face hub, which is created if it does not
    exist; its address. Raises RunError if the hub refuses or cannot be reached."""
    hub = HfApi()
    try:
        address = hub.create_repo(name, private=True, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=folder, commit_message="Export of fedmllm")
    except (OSError, ValueError) as error:  # what the hub's client raises is one of the two
        reason = " ".join(str(error).split())[:200]
        raise RunError(
            f"{folder} is complete, but the Hub does not take it as {name!r} ({reason}); log in, or upload it later."
        ) from None
    return str(address)
