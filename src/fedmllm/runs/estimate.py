"""What memory an experiment takes on a device, part by part, and what to change if it does not fit: for `fedmllm check`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from fedmllm.config import Experiment, validate
from fedmllm.models.backbone import pick_dtype
from fedmllm.models.encoded import Encoded
from fedmllm.models.mllm import MLLM
from fedmllm.models.outline import config_of, counting, frozen_bytes, outline
from fedmllm.models.scoring import option_log_probabilities
from fedmllm.runs.memory import GB
from fedmllm.training.capacity import adapter_bytes, cohort_that_fits, device_memory, pass_bytes

_PICTURES = 32
"""How many pictures pass through the vision tower at once (`models.pictures`)."""
_OWN, _USABLE = 0.6 * GB, 0.9
"""What CUDA takes for itself, and the share of the rest that is usable, because free memory is in pieces: assumptions."""


_LABELS = {
    "weights": "frozen weights", "adapters": "training: adapters", "optimizer": "training: optimizer states",
    "activations": "training: activations", "features": "training: picture features",
    "evaluation": "or answering questions", "pictures": "or encoding pictures", "peak": "peak: weights and largest use",
}  # fmt: skip


@dataclass(frozen=True)
class Longest:
    """The samples that take the most memory: one to train on, one batch of `closed` and one of `open` questions to answer;
    `tokens` of an average sample, and bytes in float32 that the vision tower takes for the picture of one."""

    sample: Encoded
    closed: Sequence[Encoded]
    open: Sequence[Encoded]
    tokens: float
    picture: int = 0

    @classmethod
    def allowed(cls, experiment: Experiment) -> Longest:
        """As long as `train.max_length` allows, for data that cannot be encoded here."""
        most = max(experiment.train.max_length, 10)
        sample = Encoded((1,) * (most - 8), (1,) * 8, (), (0,), {}, {})
        return cls(sample, [], [replace(sample, answer=())] * experiment.eval.batch_size, most)


@dataclass(frozen=True)
class Estimate:
    """Bytes of everything that a run holds. `adapters` to `features` are those of one client in a pass; a run trains,
    evaluates and encodes pictures one after the other."""

    weights: int
    adapters: int
    optimizer: int
    activations: int
    features: int
    evaluation: int
    pictures: int
    stacks: bool
    """Whether several clients can train in one pass (`Adapter.stacks`)."""

    @property
    def client(self) -> int:
        return self.adapters + self.optimizer + self.activations + self.features

    def parts(self, cohort: int) -> dict[str, int]:
        """Those of a run that trains `cohort` clients at once, and the most that it holds at a time."""
        of_clients = {name: cohort * getattr(self, name) for name in ("adapters", "optimizer", "activations", "features")}
        peak = self.weights + max(cohort * self.client, self.evaluation, self.pictures)
        return {"weights": self.weights, **of_clients, "evaluation": self.evaluation, "pictures": self.pictures, "peak": peak}


class Estimator:
    """Estimates of one experiment, on a GPU ("cuda") or a CPU, and with settings changed."""

    def __init__(self, experiment: Experiment, longest: Longest | None = None, fused: bool = False) -> None:
        self._experiment, self._longest, self._fused = experiment, longest, fused
        self._config: Any = config_of(experiment.model)
        self._made: dict[tuple[str, str], Estimate] = {}

    @property
    def known(self) -> bool:
        """Whether the model's shapes are known here."""
        return self._config is not None

    def on(self, kind: str, experiment: Experiment | None = None) -> Estimate:
        """The estimate on a device of this kind, for the experiment or a changed one."""
        config = experiment or self._experiment
        key = (kind, config.digest())
        if key not in self._made:
            self._made[key] = self._estimate(kind, config)
        return self._made[key]

    def _estimate(self, kind: str, config: Experiment) -> Estimate:
        model, train, longest = (
            self._outline(kind, config),
            config.largest_batches(range(config.partition.clients)),
            self._longest,
        )
        longest = longest or Longest.allowed(config)
        activations, own = pass_bytes(model, [longest.sample] * train.batch_size, train)
        width, itemsize = self._config.get_text_config().hidden_size, model.backbone.dtype.itemsize
        mark = getattr(self._config, "image_token_id", None)
        shown = longest.sample.prompt.count(mark) or longest.sample.length
        features = 2 * train.batch_size * shown * width * itemsize if longest.sample.pictures else 0
        at_once = _PICTURES if config.model.cache_features else train.batch_size * len(longest.sample.pictures)
        return Estimate(
            frozen_bytes(model, quantized=kind == "cuda" and config.model.quantize != "none") + own,
            *adapter_bytes(model, train),
            activations,
            features,
            answering_bytes(model, longest, config.eval.max_new_tokens, config.eval.batch_size),
            at_once * (longest.picture * itemsize // 4 or self._tower_bytes(longest.sample, itemsize)),
            model.adapter.stacks,
        )

    def _outline(self, kind: str, config: Experiment) -> MLLM:
        width = self._config.get_text_config().hidden_size
        gpu = kind == "cuda" and config.model.precision == "auto"
        dtype = torch.bfloat16 if gpu else pick_dtype(config.model.precision, torch.device("cpu"), width)
        return outline(config.model, self._config, dtype, self._fused and kind == "cpu")

    def _tower_bytes(self, sample: Encoded, itemsize: int) -> int:
        """Of one picture as far as its prompt may have tiles of `image_size`: inputs and outputs of the widest products."""
        vision = getattr(self._config, "vision_config", None)
        sizes: list[Any] = [
            getattr(vision, name, None) for name in ("image_size", "patch_size", "hidden_size", "intermediate_size")
        ]
        if not sample.pictures or not all(isinstance(size, int) for size in sizes):
            return 0
        patches = (sizes[0] // sizes[1]) ** 2
        tiles = max(1, sample.length * getattr(self._config, "scale_factor", 1) ** 2 // patches)
        return int(tiles * patches * (3 * sizes[2] + 2 * sizes[3]) * itemsize)

    def cohort(self, estimate: Estimate, kind: str, memory: float) -> int:
        """How many clients train in one pass on a device with so many bytes."""
        train, tokens = self._experiment.train, (self._longest or Longest.allowed(self._experiment)).tokens
        if not estimate.stacks:
            return 1
        if train.cohort != "auto":
            return min(train.cohort, train.clients_per_round)
        return cohort_that_fits(kind, memory, estimate.client, train.batch_size * tokens, train.clients_per_round)

    def device(self, gigabytes: float) -> dict[str, Any]:
        """What a GPU with so many GB (10⁹ bytes) can do: {"gb", "fits", "cohort", "bytes" by part, "change": the settings that
        would make it fit, None if none of them does}."""
        estimate, usable = self.on("cuda"), _USABLE * (gigabytes * GB - _OWN)
        cohort = self.cohort(estimate, "cuda", gigabytes * GB)
        parts = estimate.parts(cohort)
        fits = parts["peak"] <= usable
        return {"gb": gigabytes, "fits": fits, "cohort": cohort, "bytes": parts, "change": [] if fits else self._change(usable)}

    def _change(self, usable: float) -> list[str] | None:
        """The first setting that makes the run fit into so many bytes, else as many of them as it takes."""

        def fits(settings: Sequence[tuple[str, Any]]) -> bool:
            return self.on("cuda", _changed(self._experiment, settings)).parts(1)["peak"] <= usable

        candidates, applied = list(self._candidates()), list[tuple[str, Any]]()
        for chosen in candidates:
            if fits(chosen):
                return list(map(_line, chosen))
        for chosen in candidates:
            applied += chosen
            if fits(applied):
                return list(map(_line, applied))
        return None

    def _candidates(self) -> Iterator[list[tuple[str, Any]]]:
        train, evaluation, model = self._experiment.train, self._experiment.eval, self._experiment.model
        yield [("train.cohort", 1)]
        if evaluation.batch_size > 8:
            yield [("eval.batch_size", 8)]
        if not train.checkpointing:
            yield [("train.checkpointing", True)]
        if train.batch_size > 1:
            yield [("train.batch_size", 1), ("train.accumulate", train.accumulate * train.batch_size)]
        if model.quantize == "none":
            yield [("model.quantize", "4bit")]
        if self._longest is None and train.max_length > 512:
            yield [("train.max_length", 512)]


def _changed(experiment: Experiment, settings: Sequence[tuple[str, Any]]) -> Experiment:
    raw = experiment.resolved()
    for key, value in settings:
        table, name = key.split(".")
        raw[table] = {**raw[table], name: value}
    if any(key == "train.batch_size" for key, _ in settings):
        raw["clients"].pop("batch_size", None)
    return validate(raw)


def _line(setting: tuple[str, Any]) -> str:
    key, value = setting
    return f"{key} = {str(value).lower() if isinstance(value, bool) else repr(value)}".replace("'", '"')


def answering_bytes(model: MLLM, longest: Longest, new_tokens: int, rows: int) -> int:
    """Bytes that answering a batch of questions takes beside the weights."""
    peaks = [0]
    start = {name: torch.zeros(p.shape) for name, p in model.adapter.parameters.items()}
    with torch.no_grad(), model.stacked([start]) if model.fused else nullcontext():
        for questions, is_open in ((longest.closed[:rows], False), (longest.open[:rows], True)):
            batch = [replace(question, pictures=(), imagewise={}) for question in questions]
            if batch:
                with counting(model) as count:
                    if is_open:  # a generation holds keys and values of the prompt and of all that it has written
                        inputs = model.collate(batch, [(1,) * new_tokens] * len(batch))
                        model.backbone.model(**inputs, use_cache=True, **model.keep_last_logits(1))
                    else:
                        option_log_probabilities(model, batch)
                peaks.append(count.peak)
    return max(peaks)


def memory_of_experiment(
    experiment: Experiment, gigabytes: Sequence[float], longest: Longest | None = None, model: MLLM | None = None
) -> dict[str, Any] | None:
    """{"longest": tokens, "gpus": [as `Estimator.device`], "cpu": bytes by part if the `model` is on a CPU, else None}; None if
    the model's shapes are not known here."""
    estimator = Estimator(experiment, longest, model is not None and model.fused)
    if not estimator.known:
        return None
    cpu = None
    if model is not None and model.backbone.device.type == "cpu":
        estimate = estimator.on("cpu")
        cpu = estimate.parts(estimator.cohort(estimate, "cpu", device_memory(model.backbone.device)))
    length = (longest or Longest.allowed(experiment)).sample.length
    return {"longest": length, "gpus": [estimator.device(size) for size in gigabytes], "cpu": cpu}


def memory_lines(experiment: Experiment, memory: dict[str, Any] | None) -> Iterator[str]:
    """The outcome of `memory_of_experiment` as lines of text."""
    name = experiment.model.name
    if memory is None:
        yield f"memory: not estimated, because the config of {name!r} is not on this machine and cannot be downloaded"
        return
    batch = experiment.largest_batches(range(experiment.partition.clients)).batch_size
    yield f"memory in GB, at batches of {batch} and at most {memory['longest']} tokens:"
    columns = {f"{gpu['gb']:g} GB GPU": gpu["bytes"] for gpu in memory["gpus"]}
    if memory["cpu"] is not None:
        columns["this CPU"] = memory["cpu"]
    yield " " * 32 + "".join(f"{device:>12}" for device in columns)
    for part, label in _LABELS.items():
        yield f"  {label:30}" + "".join(f"{parts[part] / GB:12.3f}" for parts in columns.values())
    for gpu in memory["gpus"]:
        parts, cohort = gpu["bytes"], gpu["cohort"]
        of = f"{parts['peak'] / GB:.3g} GB in cohorts of {cohort}"
        if gpu["fits"]:
            yield f"fits on {gpu['gb']:g} GB: yes, {of}"
            continue
        largest = max((part for part in parts if part != "peak"), key=lambda part: int(parts[part]))
        reason = f"no, because it takes {of}, {parts[largest] / GB:.3g} of it {largest}"
        remedy = "no setting is enough" if gpu["change"] is None else f"it would with {', '.join(gpu['change'])}"
        yield f"fits on {gpu['gb']:g} GB: {reason}; {remedy}"
