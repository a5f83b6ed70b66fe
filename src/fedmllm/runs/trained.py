"""The model that a finished run ends with, opened to answer questions or to be exported."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmllm.config import Experiment, ModelTable, read, validate
from fedmllm.data.prompts import prompts
from fedmllm.data.questions import Usual
from fedmllm.data.samples import MODALITIES, Modality, Sample, Task
from fedmllm.errors import RunError
from fedmllm.evaluation.test_set import TestSet
from fedmllm.experiment.parts import with_defaults
from fedmllm.models.mllm import MLLM
from fedmllm.models.shipped import SHIPPED
from fedmllm.progress import DETAIL, ProgressCallback, no_progress
from fedmllm.runs.machine import details
from fedmllm.storage.run_dir import RunDir

_HUB_ID = re.compile(r"[\w-][\w.-]{0,95}(/[\w-][\w.-]{0,95})?", re.ASCII)


@dataclass(frozen=True)
class Reply:
    """A model's answer to one question."""

    answer: str
    probabilities: dict[str, float]
    """Of each choice; empty for a question without choices."""
    shown: tuple[Modality, ...]
    """The modalities that the model saw."""


class TrainedModel:
    """A run's model with the adapter of one client, or with the one that all clients share."""

    def __init__(
        self, run: RunDir, client: int | None = None, *, trusted: bool = False, progress: ProgressCallback = no_progress
    ) -> None:
        """Raises RunError if the run is not complete, has no such adapter, or, unless it is `trusted`, names a model that is a
        path or brings code; ConfigError if the model cannot be loaded."""
        self.result, self.config = run.result(), config_of(run, trusted=trusted)
        self.folder = adapter_folder(run, client, self.result)
        self._strategy = prompts.build(self.config.prompt.name, self.config.prompt.options)
        progress("loading the model", 0, 0, self.config.model.name)
        self.model = MLLM.load(self.config.model, self.config.seed)
        self.model.progress = progress
        for detail in details(self.model):
            progress(DETAIL, 0, 0, detail)
        if self.folder is not None:
            self.model.adapter.load(self.folder)

    @property
    def usual(self) -> Usual:
        """What the run's task asks about every sample; nothing for a run of a version that did not record it."""
        return Usual.from_json(self.result["asks"]) if self.result.get("asks") else Usual()

    def ask(self, samples: Sequence[Sample], *, untrained: bool = False) -> list[Reply]:
        """The answers to the samples' questions, with everything shown that they have, by the trained or the untrained model.

        Their ids differ. Raises DataError for a prompt that is too long or a picture that the processor refuses.
        """
        with self._untrained() if untrained or self.folder is None else nullcontext(), self.model.forgetting_pictures():
            task = Task("questions", "accuracy", lambda split: samples)
            questions = TestSet(self.model, task, samples, ("both",), self._strategy, self.config.train)
            self.model.prepare_features()
            answers = questions.answers(self.config.eval)
        return [
            Reply(answer.text, dict(zip(sample.choices or (), answer.probabilities, strict=True)), _shown(sample))
            for sample, answer in zip(samples, answers, strict=True)
        ]

    @contextmanager
    def _untrained(self) -> Iterator[None]:
        fold = self.model.adapter.fold
        self.model.adapter.set_fold({})
        try:
            with self.model.without_adapter():
                yield
        finally:
            self.model.adapter.set_fold(fold)


def _shown(sample: Sample) -> tuple[Modality, ...]:
    return tuple(modality for modality in MODALITIES if modality in sample.modalities)


def adapters_of(run: RunDir) -> dict[int, Path]:
    """client -> the folder of its own adapter, in order; empty if all clients share one."""
    numbered = {path: re.fullmatch(r"client-([0-9]{1,9})", path.name) for path in run.adapters.glob("client-*")}
    return dict(sorted((int(match[1]), path) for path, match in numbered.items() if match))


def adapter_folder(run: RunDir, client: int | None, result: dict[str, Any]) -> Path | None:
    """The folder of the adapter; None for an untrained model. Raises RunError if there is none."""
    own = adapters_of(run)
    if client is not None and client not in own:
        have = f"only {', '.join(map(str, own))} of its clients have" if own else "no client of it has"
        raise RunError(f"{run.path}: {have} an adapter of their own; give another --client, or none.")
    if own and client is None:
        raise RunError(
            f"{run.path}: every client has an adapter of its own; choose one by --client, of {', '.join(map(str, own))}."
        )
    if client is not None:
        return own[client]
    if run.adapter.is_dir():
        return run.adapter
    if result["kind"] == "zero-shot":
        return None
    raise RunError(f"{run.path} has no adapter: its kind is {result['kind']!r}.")


def config_of(run: RunDir, *, trusted: bool) -> Experiment:
    """The experiment of a run. Raises RunError as `check_model` does, unless it is `trusted`."""
    config = with_defaults(validate(read(run.config)))
    if not trusted:
        check_model(config.model, run.config)
    return config


def check_model(model: ModelTable, file: Path) -> None:
    """Raises RunError if the model is read from a path or runs code of its own: the folder may come from elsewhere."""
    wishes = []
    if model.name not in SHIPPED and (not _HUB_ID.fullmatch(model.name) or Path(model.name).exists()):
        wishes.append(f"model.name = {model.name!r}, which is a path and not a model on the Hugging Face hub")
    if model.trust_remote_code:
        wishes.append("model.trust_remote_code = true, which runs code that comes with the model")
    if wishes:
        raise RunError(f"{file} asks for {', and for '.join(wishes)}; if you trust the folder, allow it with --trust-config.")
