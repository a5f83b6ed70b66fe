"""The hours that the paper's sweeps take, counted without data, weights or a GPU."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

import paper_hours
from fedmllm.config import ModelTable
from fedmllm.models.outline import config_of, outline
from harness import counted_operations
from paper_hours import BOTH, DATA, PAPER, PEAKS, Costs, Model, Pictures, Source, Work, distinct_runs, measured_rates, work_of

SWEEP = """
name = "some"
base = "{base}"

[[axes]]
name = "method"
cells = [
    {{ name = "zero-shot", kind = "zero-shot" }},
    {{ name = "local", kind = "local" }},
    {{ name = "missing", set = {{ "scenario.name" = "missing", "scenario.rate" = 0.5 }} }},
    {{ name = "FedAdam", set = {{ "algorithm.name" = "fedadam" }} }},
]

[[axes]]
name = "regularisation"
cells = [
    {{ name = "none", set = {{ "regularization.name" = "none" }} }},
    {{ name = "adaptive", set = {{ "regularization.name" = "adaptive" }} }},
]
"""


@cache
def pocket() -> Costs:
    """Of the pocket model with two layers."""
    settings = ModelTable(name="pocket")
    config = config_of(settings)
    config.text_config.num_hidden_layers = 2
    return Costs(outline(settings, config, torch.bfloat16))


class OneEach(Costs):
    """An operation for each token, ten for each picture."""

    def __init__(self) -> None:
        pass

    def train(self, prompt: int, answer: int) -> float:
        return prompt + answer

    def answer(self, prompt: int, answer: int) -> float:
        return prompt + answer

    def encode(self, patches: int) -> float:
        return 10.0


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    file = tmp_path / "some.sweep.toml"
    file.write_text(SWEEP.format(base=PAPER / "hateful-memes.toml"), encoding="utf-8")
    return file


def test_attention_is_counted_on_a_cpu_too() -> None:
    """Two products of 8 × 16 × 8 for each head, and five of them backward, since one is computed again."""
    q = torch.zeros(1, 2, 8, 16, requires_grad=True)
    with counted_operations() as counter:
        functional.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
    assert counter.get_total_flops() == 7 * 2 * (2 * 8 * 16 * 8)


@pytest.mark.parametrize("training", [True, False])
def test_operations_are_those_that_are_counted_by_hand(training: bool) -> None:
    """Two operations for each weight and token forward; backward, two more for a frozen weight and four for a trained one."""
    prompt, answer = 300, 6
    length, model = prompt + answer, pocket()._model
    decoder, head = model.backbone.model.get_decoder(), model.backbone.model.get_output_embeddings()
    trained = sum(p.numel() for p in model.adapter.parameters.values())
    weights = sum(m.weight.numel() for m in decoder.layers.modules() if type(m) is nn.Linear) - trained
    first = sum(
        m.base_layer.weight.numel() for n, m in decoder.layers[0].named_modules() if n.endswith(("q_proj", "k_proj", "v_proj"))
    )
    attention = len(decoder.layers) * length**2 * decoder.config.hidden_size
    expected = 2 * (weights + trained) * length + 4 * attention + 2 * head.weight.numel() * (answer + 1)
    if training:
        # Nothing before the first layer's q, k and v is trained, so that their inputs need no gradient.
        expected += (2 * (weights - first) + 4 * trained) * length + 10 * attention + 2 * head.weight.numel() * (answer + 1)
    assert pocket().count(prompt, answer, training) == pytest.approx(expected, rel=0.01)


def test_four_passes_tell_the_operations_of_any_sample() -> None:
    for prompt, answer in ((50, 2), (700, 85)):
        assert pocket().train(prompt, answer) == pytest.approx(pocket().count(prompt, answer, True), rel=1e-6)
        assert pocket().answer(prompt, answer) == pytest.approx(pocket().count(prompt, answer, False), rel=1e-6)


def test_a_picture_passes_through_every_weight_of_the_vision_tower() -> None:
    vision = config_of(ModelTable(name="pocket")).vision_config
    weights = vision.num_hidden_layers * (4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size)
    assert pocket().encode(64) == 2 * 64 * weights


def test_runs_are_counted_once_and_train_on_what_their_clients_hold(sweep: Path) -> None:
    runs = distinct_runs(sweep)
    assert sorted(run.kind for run in runs) == ["federated"] * 4 + ["local", "zero-shot"]
    source = Source(BOTH, train=1000, test=10, pictures=7, question=100, text=20, answer=5)
    work = work_of(runs, OneEach(), Pictures(300, 1), {"hateful-memes": source})
    # 25 rounds of 2 clients of 10 are 5 epochs; a client alone trains in as many rounds, on its tenth of the data.
    whole, half = 100 + 20 + 300 + 5, 100 + 10 + 150 + 5
    assert work.tokens == work.training == pytest.approx(5 * 1000 * (3 * whole + 2 * half))
    # Every model answers under three patterns, and the ten clients that train alone have a model each.
    assert work.answering == (4 + 1 + 10) * 10 * ((420 + 1) + (400 + 1) + (120 + 1))
    assert work.encoding == 7 * 10


def test_texts_of_a_companion_are_trained_on_and_not_asked_about() -> None:
    runs = [run for run in distinct_runs(PAPER / "vqa-rad.sweep.toml") if run.kind == "federated"][:1]
    work = work_of(runs, OneEach(), Pictures(400, 1))
    assert work.tokens == pytest.approx(10 * (3064 * (27 + 400 + 4) + 33955 * (25 + 25 + 85)))
    assert work.answering == pytest.approx(2 * 451 * (0.44 * (427 + 16) + 0.56 * (427 + 1)))


def test_the_papers_data_are_all_known() -> None:
    for file in sorted(PAPER.glob("*.sweep.toml")):
        assert file.name.removesuffix(".sweep.toml") in DATA


CONTENT = {
    "device": "Some GPU",
    "shapes": {
        "one": {
            "operations_per_token": 50.0,
            "parts": {"training": {"fedmllm, 2 clients in one pass": {"rates": [1.0, 2.0, 6.0]}}},
        },
        "two": {"operations_per_token": 50.0, "parts": {}},
    },
}


def test_a_measured_rate_is_the_median_in_operations() -> None:
    assert measured_rates(CONTENT) == {"one": 100.0}


def test_the_table_has_hours_for_each_device_and_share(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def counted(*_: object) -> Work:
        return Work(6, training=3.6e18, answering=0.0, encoding=0.0, tokens=2e9)

    models: Mapping[str, Model] = {
        name: Model("", shape, Pictures(9, 1), Pictures(25, 1)) for name, shape in (("A", "one"), ("B", ""))
    }
    monkeypatch.setattr(paper_hours, "MODELS", models)
    monkeypatch.setattr(paper_hours, "costs_of", lambda name: None)
    monkeypatch.setattr(paper_hours, "work_of", counted)
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(CONTENT))
    monkeypatch.setattr(
        sys, "argv", ["paper_hours.py", str(sweep), "--models", "A,B", "--utilisation", "0.5", "--measured", str(file)]
    )
    paper_hours.main()
    head, rule, *lines = capsys.readouterr().out.splitlines()
    assert head.endswith("| RTX 4090, 24 GB: 50 % | A100, 80 GB: 50 % | Some GPU, measured |")
    assert head.count("|") == rule.count("|") == lines[0].count("|")
    first, second = (f"{3.6e18 / (0.5 * peak) / 3600:.1f}" for peak in PEAKS.values())
    assert lines[0] == f"| A | 9 | some | 6 | 2.00 | 3.60 | 0 % | {first} | {second} | 10,000,000,000,000.0 |"
    assert [line.split(" | ")[0] for line in lines] == ["| A", "| A", "| B", "| B"]
    assert lines[-1].endswith(f"| {second} | – |")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--models", "Z"], "'Z' is not one of SmolVLM-500M"), (["--utilisation", "50"], "must be shares above 0 and up to 1")],
)
def test_bad_arguments_are_refused(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["paper_hours.py", *arguments])
    with pytest.raises(SystemExit):
        paper_hours.main()
    assert message in capsys.readouterr().err
