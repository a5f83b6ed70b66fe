"""Fixtures: a tiny model of the pocket architecture with random weights, and a small data set of generated pictures."""

from __future__ import annotations

import copy
import gc
import json
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Flower asks nobody for news and tells nobody anything.
os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}

import hypothesis
import pytest
from PIL import Image

from fedmllm.config import AdapterTable, LoraTable, ModelTable

# PyTorch and transformers are imported by the fixtures: the process that only hands tests to its workers does without them.
if TYPE_CHECKING:
    from fedmllm.models.backbone import Backbone
    from fedmllm.models.mllm import MLLM

# A shell ignores SIGINT for what it starts in the background, and what a test starts to interrupt would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Derandomised, so that a green suite stays green. The deadline, which a busy machine keeps, is for what would never end.
_PLAIN = hypothesis.settings(deadline=timedelta(seconds=20), database=None, suppress_health_check=list(hypothesis.HealthCheck))
hypothesis.settings.register_profile("tests", _PLAIN, max_examples=120, derandomize=True)
hypothesis.settings.register_profile("fuzz", _PLAIN, max_examples=4000, print_blob=True)
hypothesis.settings.load_profile("tests")
COLORS = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (30, 200, 30)}


@pytest.fixture(autouse=True, scope="session")
def _quietly_on_one_thread() -> None:
    """The tiny model gains nothing from a second thread, and loses much where another process wants the core."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Vision features go to a folder of the test session's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDMLLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables have the width that they have off a terminal, whatever the shell or a library says of one."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(autouse=True, scope="session")
def _without_fsync() -> Iterator[None]:
    """Tests kill processes, never the power: what was written is read again without waiting for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder in Hugging Face format: the pocket architecture, two narrow layers, random weights."""
    import torch

    from recipes.pocket.architecture import build_tokenizer
    from recipes.pocket.idefics3 import Idefics3

    folder = tmp_path_factory.mktemp("tiny")
    family, tokenizer = Idefics3(), build_tokenizer(documents=60, vocabulary=420)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = family.build_config(tokenizer, **small, num_key_value_heads=2)
    for key, value in {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}.items():
        setattr(config.vision_config, key, value)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = family.build_model(config)
    model.save_pretrained(folder)
    family.build_processor(tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True, scope="session")
def _backbones(tiny: Path) -> Iterator[None]:
    """The models that most tests load are read from disk once per test process; each load after that gets a copy."""
    from fedmllm.models import mllm
    from fedmllm.models.shipped import SHIPPED

    load, loaded = mllm.load_backbone, dict[str, "Backbone"]()

    def load_copy(settings: ModelTable) -> Backbone:
        if settings.name not in (*SHIPPED, str(tiny)) or settings.trust_remote_code:
            return load(settings)
        key = settings.model_copy(update={"lora": LoraTable(), "adapter": AdapterTable()}).model_dump_json()
        if key not in loaded:
            loaded[key] = load(settings)
        return copy.deepcopy(loaded[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mllm, "load_backbone", load_copy)
        yield


@pytest.fixture
def settings(tiny: Path) -> ModelTable:
    return ModelTable(name=str(tiny), lora=LoraTable(rank=2, alpha=4.0), precision="fp32")


@pytest.fixture
def model(settings: ModelTable) -> MLLM:
    from fedmllm.models.mllm import MLLM

    return MLLM.load(settings, seed=0)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train.jsonl` (30 lines) and `test.jsonl` (12): paired, picture-only and text-only samples, closed and open."""
    folder = tmp_path_factory.mktemp("data")
    for name, rgb in COLORS.items():
        Image.new("RGB", (64, 64), rgb).save(folder / f"{name}.png")
    for split, count in (("train", 30), ("test", 12)):
        lines = []
        for i in range(count):
            color = list(COLORS)[i % 3]
            line: dict[str, object] = {"id": f"{split}-{i:02d}", "answer": color, "source": f"site-{i % 4}"}
            if i % 5 != 4:
                line["image"] = f"{color}.png"
            if i % 5 != 3:
                line["text"] = f"a {color} thing"
            if i % 2:
                line |= {"question": "which color is it?", "choices": list(COLORS)}
            else:
                line |= {"question": "name the color."}
            lines.append(json.dumps(line))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def write_experiment(tiny: Path, dataset: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a small experiment file; `extra` is appended to it."""

    def write(extra: str = "", rounds: int = 3, name: str = "small") -> Path:
        path = tmp_path / f"{name}.toml"
        path.write_text(
            f'name = "{name}"\n'
            f'[task]\nname = "jsonl"\ntrain = "{dataset / "train.jsonl"}"\ntest = "{dataset / "test.jsonl"}"\n'
            '[partition]\nname = "dirichlet"\nclients = 4\nalpha = 1.0\n'
            '[scenario]\nname = "hybrid"\npresence = 0.7\n'
            f'[model]\nname = "{tiny}"\nprecision = "fp32"\n[model.lora]\nrank = 2\nalpha = 4\n'
            f"[train]\nrounds = {rounds}\nclients_per_round = 2\nbatch_size = 4\nlr = 5e-3\n"
            '[eval]\npatterns = ["both", "image", "text"]\nbootstrap = 50\nmax_new_tokens = 3\n' + extra
        )
        return path

    return write


SLOWEST = (
    "test_sites",
    "test_ray",
    "test_families",
    "test_methods_resumed",
    "test_methods",
    "test_algorithms",
    "test_plugin",
    "test_cohort",
    "test_sweep",
    "test_runs_resumed",
    "test_estimate",
)
"""The files that take longest: they come first, so that one worker does not work on its last file while the other is idle."""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported and collected stays, and to look through it for garbage takes a quarter of the time of collecting."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: SLOWEST.index(item.path.stem) if item.path.stem in SLOWEST else len(SLOWEST))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--errors-page", metavar="FILE", help="write the page of error messages, from a run of all tests")


def pytest_configure(config: pytest.Config) -> None:
    if page := config.getoption("--errors-page"):
        from errors_page import ErrorsPage

        config.pluginmanager.register(ErrorsPage(Path(page)))
