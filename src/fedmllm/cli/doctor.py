"""What `fedmllm doctor` looks at: versions, devices, extras, the cache, and a small training run."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from packaging.requirements import Requirement

if TYPE_CHECKING:
    from fedmllm.progress import ProgressCallback

LIBRARIES = ("fedmllm", "torch", "transformers", "peft", "numpy")
_DEVELOPMENT = ("dev", "docs", "bench")
_SELF_TEST: dict[str, Any] = {
    "train.rounds": 1, "train.clients_per_round": 1, "task.train_samples": 60, "task.test_samples": 20,
    "task.companion.train_samples": 20, "task.companion.test_samples": 10, "partition.clients": 2,
}  # fmt: skip


class Row(NamedTuple):
    what: str
    value: str
    note: str = ""
    fine: bool = True


def examine(progress: ProgressCallback) -> dict[str, Any]:
    """{"works": whether fedmllm can train here, "rows": what was looked at, each with "what", "value", "note", "fine"}."""
    from fedmllm.models.devices import devices

    rows = [*_versions(), *(Row(*device) for device in devices()), *_extras(), _cache(), _hub(), _self_test(progress)]
    return {"works": all(row.fine for row in rows), "rows": [row._asdict() for row in rows]}


def _versions() -> Iterator[Row]:
    yield Row("Python", platform.python_version())
    for name in LIBRARIES:
        yield Row(name, version(name))


def _extras() -> Iterator[Row]:
    """Whether what each extra installs is there."""
    requirements = [Requirement(text) for text in requires("fedmllm") or ()]
    names = sorted({extra for r in requirements if r.marker for extra in _extras_of(r)} - set(_DEVELOPMENT))
    for extra in names:
        needed = {r.name for r in requirements if r.marker and extra in _extras_of(r) and r.name != "fedmllm"}
        missing = sorted(name for name in needed if not _installed(name))
        how = f'pip install "fedmllm[{extra}]" if you need it' if missing else ""
        yield Row(f"extra {extra}", f"without {', '.join(missing)}" if missing else "installed", how)


def _extras_of(requirement: Requirement) -> set[str]:
    """The extras that ask for a requirement; its marker is `extra == "name"`, alone or in a conjunction."""
    words = str(requirement.marker).replace('"', "'").split("extra == '")[1:]
    return {word.partition("'")[0] for word in words}


def _installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True


def _cache() -> Row:
    from fedmllm.errors import UserError
    from fedmllm.models.features import cache_folder, check_cache

    folder = cache_folder()
    try:
        check_cache()
    except UserError as error:
        return Row("cache", str(folder), str(error), fine=False)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
    return Row("cache", str(folder), f"{size / 1e6:.0f} MB of vision features")


def _hub() -> Row:
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    models = len(list(Path(HF_HUB_CACHE).glob("models--*")))
    offline = "HF_HUB_OFFLINE is set: a model that is not there cannot be downloaded" if HF_HUB_OFFLINE else ""
    return Row("Hugging Face models", f"{models} in {HF_HUB_CACHE}", offline)


def _self_test(progress: ProgressCallback) -> Row:
    """Two clients learn for one round with the pocket model."""
    from fedmllm import api

    def without_notes(stage: str, done: int, total: int, note: str) -> None:
        """A run this small has scores that mean nothing, and notes that say so."""
        if stage != "note":
            progress(stage, done, total, note)

    began = time.monotonic()
    try:
        with TemporaryDirectory() as folder:
            result = api.run(api.load(**_SELF_TEST), out=Path(folder) / "run", progress=without_notes)
    except Exception as error:  # whatever is wrong with this machine
        return Row("self-test", "failed", f"{type(error).__name__}: {' '.join(str(error).split())}", fine=False)
    seconds = time.monotonic() - began
    return Row("self-test", f"{seconds:.0f} s", f"one round, {result.metrics['both']['n']} questions answered")
