"""How many GPU hours the sweeps of experiments/paper take, by arithmetic: operations divided by what a GPU is assumed to reach.

    python benchmarks/paper_hours.py [SWEEP…] [--utilisation 0.5,0.2] [--measured FOLDER/gpu.json]

The operations of a training step and of an answer are counted by PyTorch in the model's outline, for the number of tokens that
`DATA` and `MODELS` say; the sweep files say how many steps and answers there are. Hours are operations / (peak × utilisation),
where the peak is nominal and the utilisation an assumption, until `benchmarks/gpu.py` has measured it: with
`--measured`, a column has the hours at the rate that its file has for fedmllm with two clients in one pass. Needs neither the
data, nor the weights, nor a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig

from fedmllm.config import ModelTable
from fedmllm.data.samples import Modality
from fedmllm.data.scenarios import BOTH, IMAGE, TEXT, Modalities
from fedmllm.experiment.parts import build_scenario
from fedmllm.experiment.sweep import PlannedRun, plan_sweep
from fedmllm.models.encoded import Encoded
from fedmllm.models.mllm import MLLM
from fedmllm.models.outline import SHAPES, counting, outline
from fedmllm.models.stack import Stack
from harness import counted_operations

PAPER = Path(__file__).parents[1] / "experiments" / "paper"
PEAKS = {"RTX 4090, 24 GB": 165.2e12, "A100, 80 GB": 312e12}
"""Operations a second of dense bfloat16 products that are summed in float32, as others quote NVIDIA's data sheets."""


@dataclass(frozen=True)
class Source:
    """A data set: its numbers of samples and of pictures, whose origin docs/benchmark.md states, and tokens that are assumed.
    `question` includes the chat template and is in every prompt, `text` is the text modality; `free` is the share of test
    questions that are answered freely."""

    kind: Modalities
    train: int
    test: int
    pictures: int
    question: int
    text: int
    answer: int
    free: float = 0.0

    def tokens(self, shown: Modalities, picture: int) -> int:
        """Of the prompt, if the picture has so many."""
        return self.question + self.text * ("text" in shown) + picture * ("image" in shown)


DATA = {
    "hateful-memes": Source(BOTH, 8500, 1000, 9500, question=65, text=20, answer=6),
    "crisismmd": Source(BOTH, 13608, 2237, 15845, question=150, text=35, answer=10),
    "vqa-rad": Source(IMAGE, 3064, 451, 314, question=27, text=0, answer=4, free=0.44),
    "slake": Source(IMAGE, 4919, 1061, 546, question=27, text=0, answer=4, free=0.65),
    "medalpaca": Source(TEXT, 33955, 0, 0, question=25, text=25, answer=85),
}


@dataclass(frozen=True)
class Pictures:
    """Tokens of a picture in the prompt, and patches that pass through the vision tower for it."""

    tokens: int
    patches: int


@dataclass(frozen=True)
class Model:
    """`shape` is its name in `benchmarks/gpu.py`, if that measures it, whose pictures are `small`. `large` ones are of 4:3, in
    the size that the published processor makes of them (Qwen: of 1024 × 768 pixels)."""

    id: str
    shape: str
    small: Pictures
    large: Pictures


MODELS = {
    "SmolVLM-500M": Model(
        "HuggingFaceTB/SmolVLM-500M-Instruct", "smolvlm-500m", Pictures(5 * 64, 5 * 1024), Pictures(13 * 64, 13 * 1024)
    ),
    "SmolVLM-2.2B": Model("HuggingFaceTB/SmolVLM-Instruct", "smolvlm-2.2b", Pictures(405, 5 * 729), Pictures(1053, 13 * 729)),
    "Qwen2.5-VL-3B": Model("Qwen/Qwen2.5-VL-3B-Instruct", "qwen2.5-vl-3b", Pictures(400, 1600), Pictures(37 * 27, 74 * 54)),
}


class Costs:
    """Operations of one sample. They are a quadratic polynomial of its tokens, and the head runs at the answer alone, so that
    four passes of the outline tell those of every sample."""

    def __init__(self, model: MLLM) -> None:
        self._model = model
        lengths = ((100, 1), (400, 1), (1000, 1), (400, 33))
        terms = [self._terms(*length) for length in lengths]
        self._training = np.linalg.solve(terms, [self.count(*length, training=True) for length in lengths])
        self._answering = np.linalg.solve(terms, [self.count(*length, training=False) for length in lengths])

    @staticmethod
    def _terms(prompt: int, answer: int) -> list[float]:
        length = prompt + answer
        return [1.0, length, length**2, answer]

    def count(self, prompt: int, answer: int, training: bool) -> int:
        """As PyTorch counts them in a forward pass, and a backward pass if it is `training`."""
        sample, adapter = Encoded((1,) * prompt, (1,) * answer, (), (), {}, {}), self._model.adapter
        start = {name: torch.zeros(p.shape) for name, p in adapter.parameters.items()}
        stack = Stack(adapter, [start], list(start), [0])
        with self._model.using(stack, 1), counted_operations() as counter, counting(self._model):
            stack.begin([(1, prompt + answer)])
            with torch.set_grad_enabled(training):
                loss = self._model.loss([sample])
            if training:
                loss.backward()  # type: ignore[no-untyped-call]
        return counter.get_total_flops()

    def train(self, prompt: int, answer: int) -> float:
        return float(np.dot(self._training, self._terms(prompt, answer)))

    def answer(self, prompt: int, answer: int) -> float:
        """A written answer passes through the model token by token, with as many operations as all at once."""
        return float(np.dot(self._answering, self._terms(prompt, answer)))

    def encode(self, patches: int) -> float:
        """Operations of the vision tower for a picture, without its attention: two for each weight and patch."""
        backbone = self._model.backbone
        linear = [(name, module) for name, module in backbone.model.named_modules() if isinstance(module, nn.Linear)]
        weights = sum(module.weight.numel() for name, module in linear if backbone.family.part_of(name) == "vision")
        return 2.0 * weights * patches


@dataclass(frozen=True)
class Work:
    """Operations of a sweep's distinct runs, by what they are for, and the tokens that are trained on."""

    runs: int
    training: float
    answering: float
    encoding: float
    tokens: float

    @property
    def operations(self) -> float:
        return self.training + self.answering + self.encoding

    def __add__(self, other: Work) -> Work:
        return Work(*(own + its for own, its in zip(vars(self).values(), vars(other).values(), strict=True)))


def distinct_runs(file: Path) -> list[PlannedRun]:
    return list({run.id: run for run in plan_sweep(file)[1]}.values())


def work_of(runs: Sequence[PlannedRun], costs: Costs, pictures: Pictures, data: Mapping[str, Source] = DATA) -> Work:
    """What the runs take. Every picture is counted as encoded once for all of them, and clients are of equal size, as they are
    on average."""
    training = answering = tokens = 0.0
    named = {table.name for run in runs for table in (run.experiment.task, run.experiment.task.companion) if table}
    for run in runs:
        config = run.experiment
        scenario, clients = build_scenario(config.scenario), config.partition.clients
        assert scenario.expected is not None
        # How often every sample is trained on: clients that train alone, and pooled data, go through it as often.
        solo = max(1, round(config.train.rounds * config.train.clients_per_round / clients))
        epochs = config.train.epochs * {
            "federated": config.train.rounds * config.train.clients_per_round / clients,
            "local": solo, "centralised": solo, "zero-shot": 0,
        }[run.kind]  # fmt: skip
        for table in filter(None, (config.task, config.task.companion)):
            source = data[table.name]
            for shown, share in scenario.expected(source.kind, clients).items():
                prompt, times = source.tokens(shown, pictures.tokens), epochs * share * (table.train_samples or source.train)
                training += times * costs.train(prompt, source.answer)
                tokens += times * (prompt + source.answer)
        source, questions = data[config.task.name], config.task.test_samples or data[config.task.name].test
        models = clients if run.kind == "local" else 1
        for pattern in config.eval.patterns:
            prompt = source.tokens(BOTH if pattern == "both" else frozenset[Modality]((pattern,)), pictures.tokens)
            written = source.free * costs.answer(prompt, config.eval.max_new_tokens)
            answering += models * questions * (written + (1 - source.free) * costs.answer(prompt, 1))
    encoding = sum(data[name].pictures for name in named) * costs.encode(pictures.patches)
    return Work(len(runs), training, answering, encoding, tokens)


def costs_of(name: str) -> Costs:
    """Of a model of `SHAPES`."""
    model_type, table = SHAPES[name]
    return Costs(outline(ModelTable(name=name), AutoConfig.for_model(model_type, **table), torch.bfloat16))


def hours(work: Work, rates: Sequence[float]) -> list[str]:
    """At each rate in operations a second; a dash where it is not known (0)."""
    return [f"{work.operations / rate / 3600:,.1f}" if rate else "–" for rate in rates]


def rows(name: str, pictures: str, sweeps: Mapping[str, Work], rates: Sequence[float]) -> list[str]:
    """Lines of the table: one for each sweep and one for all of them."""
    total = sum(sweeps.values(), Work(0, 0.0, 0.0, 0.0, 0.0))
    parts = dict(sweeps) if len(sweeps) == 1 else {**sweeps, "**all**": total}
    return [
        "| "
        + " | ".join([
            name, pictures, sweep, str(work.runs), f"{work.tokens / 1e9:.2f}", f"{work.operations / 1e18:.2f}",
            f"{100 * work.answering / work.operations:.0f} %", *hours(work, rates),
        ])
        + " |"
        for sweep, work in parts.items()
    ]  # fmt: skip


def measured_rates(content: Mapping[str, object]) -> dict[str, float]:
    """shape -> operations a second of fedmllm with two clients in one pass, in the content of a `gpu.json`."""
    rates = {}
    shapes: Mapping[str, dict] = content["shapes"]  # type: ignore[assignment,type-arg]
    for shape, record in shapes.items():
        way = record.get("parts", {}).get("training", {}).get("fedmllm, 2 clients in one pass", {})
        if way.get("rates"):
            rates[shape] = statistics.median(way["rates"]) * record["operations_per_token"]
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description="GPU hours of the paper's sweeps, as a table in Markdown.")
    parser.add_argument("sweeps", type=Path, nargs="*", help="sweep files of published data; default: experiments/paper")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--utilisation", default="0.5,0.2", help="shares of the peak that are assumed to be reached")
    parser.add_argument("--measured", type=Path, help="gpu.json of benchmarks/gpu.py")
    options = parser.parse_args()
    names, shares = options.models.split(","), [float(share) for share in options.utilisation.split(",")]
    if unknown := set(names) - MODELS.keys():
        parser.error(f"--models: {min(unknown)!r} is not one of {', '.join(MODELS)}")
    if not all(0 < share <= 1 for share in shares):
        parser.error(f"--utilisation: {options.utilisation!r} must be shares above 0 and up to 1, separated by commas")
    content = json.loads(options.measured.read_text()) if options.measured else {}
    measured = measured_rates(content) if content else {}
    columns = [f"{gpu}: {100 * share:.0f} %" for gpu in PEAKS for share in shares]
    columns += [f"{content['device']}, measured"] if content else []
    files = options.sweeps or sorted(PAPER.glob("*.sweep.toml"))
    planned = {file.name.removesuffix(".sweep.toml"): distinct_runs(file) for file in files}
    print("| model | tokens of a picture | sweep | runs | 10⁹ tokens trained | 10¹⁸ operations | answering | "
          + " | ".join(columns) + " |")  # fmt: skip
    print("|---|--:|---|" + "--:|" * (4 + len(columns)))
    for name in names:
        model = MODELS[name]
        costs = costs_of(model.id)
        rates = [share * peak for peak in PEAKS.values() for share in shares]
        rates += [measured.get(model.shape, 0.0)] if content else []
        for pictures in (model.small, model.large):
            sweeps = {sweep: work_of(runs, costs, pictures) for sweep, runs in planned.items()}
            print("\n".join(rows(name, str(pictures.tokens), sweeps, rates)), flush=True)


if __name__ == "__main__":
    main()
