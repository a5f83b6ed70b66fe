"""The estimate of memory against the bytes of tensors that training and evaluation hold, and what `fedmllm check` prints."""

from __future__ import annotations

import gc
import tomllib
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from commands import call
from fedmllm.algorithms import LocalRule
from fedmllm.config import Experiment, validate
from fedmllm.data.prompts import Conversation
from fedmllm.models.live_bytes import LiveBytes
from fedmllm.models.mllm import MLLM
from fedmllm.models.outline import META, SHAPES
from fedmllm.models.scoring import option_log_probabilities
from fedmllm.runs.estimate import Estimate, Estimator, Longest, memory_lines, memory_of_experiment
from fedmllm.training.cohort import Work, train_cohort
from tiny_families import FAMILIES, save, without_torchvision_and_num2words

PAPER = Path(__file__).parent.parent / "experiments" / "paper"
USUAL = ("llava", "qwen2_vl")
"""The families of every test run; the others take minutes."""
TALK = Conversation("name the color of the picture, please. " * 3, "red blue", image=True)


def experiment(name: str, checkpointing: bool) -> Experiment:
    model: dict[str, Any] = {"name": name, "precision": "fp32"}
    if name != "pocket":
        model["lora"] = {"rank": 4, "alpha": 4.0}
    train = {"batch_size": 4, "optimizer": "adamw", "checkpointing": checkpointing}
    evaluation = {"batch_size": 4, "max_new_tokens": 8}
    return validate({"task": {"name": "shapes-qa"}, "model": model, "train": train, "eval": evaluation})


def weights_of(model: MLLM) -> int:
    """Bytes of what the model holds beside its adapter."""
    own = {id(parameter) for parameter in model.adapter.parameters.values()}
    frozen = [t for t in [*model.model.parameters(), *model.model.buffers()] if id(t) not in own]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in frozen}.values())


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.parametrize(
    "name", ["pocket", *(pytest.param(name, marks=() if name in USUAL else pytest.mark.slow) for name in FAMILIES)]
)
def test_the_estimate_is_within_a_fifth_of_what_a_run_holds(name: str, dataset: Path, tmp_path: Path) -> None:
    """Two steps of training with AdamW, with and without checkpointing; scoring of options; written answers.

    The pocket model is an Idefics3.
    """
    if name != "pocket":
        with without_torchvision_and_num2words():
            save(name, tmp_path / name)
    source, picture = "pocket" if name == "pocket" else str(tmp_path / name), dataset / "red.png"
    with without_torchvision_and_num2words():
        model = MLLM.load(experiment(source, False).model, seed=0)
        # The last is shorter, as some are in most batches: equal lengths need no mask, and the estimate counts on one.
        samples = model.encode([TALK] * 3 + [replace(TALK, answer="red")], [picture] * 4, 300)
        closed = [model.encode_one(replace(TALK, options=("red", "blue")), picture, 300, asks=True)] * 4
        free = [model.encode_one(TALK, picture, 300, asks=True)] * 4

        def estimated(checkpointing: bool = False, **questions: Any) -> Estimate:
            longest = Longest(samples[0], questions.get("closed", []), questions.get("open", []), samples[0].length)
            return Estimator(experiment(source, checkpointing), longest, model.fused).on("cpu")

        ratios = {}
        start = {name: tensor.clone() for name, tensor in model.adapter.get().items()}
        for checkpointing in (False, True):
            model._fused_text = None  # which a run makes in its first pass and keeps
            gc.collect()
            with LiveBytes() as count:
                work = Work([[samples], [samples]], start, LocalRule(), 0)
                train_cohort(model, [work], experiment(source, checkpointing).train)
                trained, count.peak = count.peak, count.live
                with torch.no_grad(), model.stacked([start]) if model.fused else nullcontext():
                    option_log_probabilities(model, closed)
                scored, count.peak = count.peak, count.live
                model.generate(free, 8)
            estimate = estimated(checkpointing)
            ratios[f"{checkpointing=}"] = (estimate.weights + estimate.client) / (weights_of(model) + trained)
        for what, questions, peak in (("scoring", {"closed": closed}, scored), ("writing", {"open": free}, count.peak)):
            estimate = estimated(**questions)
            ratios[what] = (estimate.weights + estimate.evaluation) / (weights_of(model) + peak)
    print(name, {what: round(ratio, 2) for what, ratio in ratios.items()})
    assert all(1 / 1.2 <= ratio <= 1.2 for ratio in ratios.values()), ratios


@pytest.mark.parametrize("name", SHAPES)
def test_built_in_shapes_have_as_many_parameters_as_their_models(name: str) -> None:
    """SmolVLM-500M is SmolLM2-360M after SigLIP base at 512 pixels, with a head of its own: 507 million by count."""
    billions = {
        "HuggingFaceTB/SmolVLM-500M-Instruct": 0.507,
        "HuggingFaceTB/SmolVLM-Instruct": 2.246,
        "Qwen/Qwen2.5-VL-3B-Instruct": 3.755,
    }
    model_type, table = SHAPES[name]
    with META:
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(model_type, **table), dtype=torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions[name], abs=0.001)


def test_a_view_is_nothing_new() -> None:
    made_before = torch.zeros(1000)
    with LiveBytes() as count:
        rows = made_before.view(10, 100).t()
        assert count.live == 0
        doubled = rows * 2
        assert count.live == count.peak == 4000
        del doubled
        assert (count.live, count.peak) == (0, 4000)


def test_check_says_what_gpus_can_do_without_data_and_weights() -> None:
    """The four files agree in all that memory depends on, so that one of them is enough: it takes seconds."""
    files = sorted(path for path in PAPER.glob("*.toml") if not path.name.endswith(".sweep.toml"))
    configs = [validate(tomllib.loads(path.read_text(encoding="utf-8"))) for path in files]
    train = {(c.train.batch_size, c.train.max_length, c.train.optimizer, c.train.clients_per_round) for c in configs}
    assert (len(files), len(train), len({repr(c.model) for c in configs})) == (4, 1, 1)
    assert {(c.eval.batch_size, c.eval.max_new_tokens) for c in configs} == {(64, 16)}
    done = call("check", files[0])
    assert done.exit_code == 2
    assert "is not a readable folder" in done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "memory in GB, at batches of 1 and at most 1200 tokens:"
    assert lines[1].split() == "24 GB GPU 80 GB GPU".split()
    rows = {line[2:32].strip(): [float(figure) for figure in line[32:].split()] for line in lines[2:10]}
    for on_gpu in range(2):
        weights, *training, answering, encoding, peak = (figures[on_gpu] for figures in rows.values())
        assert 4.4 < weights < 4.6, "2.2 billion weights in bfloat16"
        assert 5 < sum(training) < 25
        assert peak == pytest.approx(weights + max(sum(training), answering, encoding), abs=0.003)
    assert lines[10].startswith(
        "fits on 24 GB: no, because it takes 24.9 GB in cohorts of 2, 20.4 of it evaluation; it would with"
    )
    assert lines[10].endswith("eval.batch_size = 8")
    assert lines[11] == "fits on 80 GB: yes, 24.9 GB in cohorts of 2"


def test_a_model_of_unknown_shape_is_not_estimated() -> None:
    unknown = validate({"task": {"name": "shapes-qa"}, "model": {"name": "./no-such-model"}})
    memory = memory_of_experiment(unknown, [24.0])
    assert memory is None
    assert list(memory_lines(unknown, memory)) == [
        "memory: not estimated, because the config of './no-such-model' is not on this machine and cannot be downloaded"
    ]
