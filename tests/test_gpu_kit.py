"""The GPU benchmark, as far as a CPU can tell: models of toy size, and the measuring of whatever succeeds or fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import gpu
from fedmllm.algorithms import LocalResult
from fedmllm.config import ModelTable, TrainTable
from fedmllm.models import backbone
from fedmllm.models.mllm import MLLM
from fedmllm.training.cohort import Work, train_cohort
from gpu_kit import report, ways
from gpu_kit.measuring import Measured, measure
from gpu_kit.shapes import PICTURE_SIZE, SHAPES, make
from gpu_kit.ways import BATCH, STEPS, Bench, Done, make_bench, quantized

CPU = torch.device("cpu")
pytestmark = [
    # PEFT uses an old name of a property of transformers.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]


@pytest.fixture(scope="module", params=SHAPES)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setenv("FEDMLLM_CACHE", str(folder))
        torch.manual_seed(0)
        yield make_bench(make(request.param, CPU, torch.float32, tiny=True), folder, PICTURE_SIZE[True])


@pytest.mark.parametrize(("shape", "billions"), [("smolvlm-500m", 0.51), ("smolvlm-2.2b", 2.25), ("qwen2.5-vl-3b", 3.75)])
def test_shapes_have_the_published_number_of_parameters(shape: str, billions: float) -> None:
    model_class, config, _ = SHAPES[shape](False)
    with torch.device("meta"):
        model = model_class._from_config(config, dtype=torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)


def test_pictures_have_as_many_tokens_as_the_docstrings_say(tmp_path: Path) -> None:
    for shape, tokens in {"smolvlm-500m": 320, "smolvlm-2.2b": 405, "qwen2.5-vl-3b": 400}.items():
        _, config, processor = SHAPES[shape](False)
        picture = ways._picture(tmp_path / "picture.jpg", PICTURE_SIZE[False], 0)
        with ways.Image.open(picture) as image:
            messages = [{"role": "user", "content": [{"type": "image"}]}]
            prompt = processor.apply_chat_template(messages, tokenize=False)
            ids = processor(text=[prompt], images=[[image]], return_tensors="pt")["input_ids"]
        assert int((ids == config.image_token_id).sum()) == tokens


def test_all_ways_train_on_the_same_samples_to_the_same_loss(bench: Bench) -> None:
    with torch.random.fork_rng():  # because a Trainer seeds the global generator
        published = bench.published()
    assert published.amount == bench.length * BATCH * STEPS
    others = [bench.bare(bench.prepared()), bench.ours(1), bench.ours(2), bench.checkpointed(1)]
    assert [done.loss for done in others] == pytest.approx([published.loss] * 4, rel=1e-5)
    assert others[2].amount == 2 * published.amount
    assert not any(module.training for module in bench.model.model.modules())
    # The loss depends on the order of the samples and on the adapter, so that equal losses mean equal work.
    first = bench.model.loss(bench.encoded[:BATCH]).item() / BATCH
    assert abs(first - (published.loss or 0)) > 1e-3


def test_questions_are_answered_in_all_ways(bench: Bench) -> None:
    assert bench.model.backbone.answer_frame == backbone._answer_frame(bench.model.backbone.processor)
    assert bench.generated_singly().amount == ways.QUESTIONS // 4
    assert bench.generated_together().amount == bench.scored().amount == ways.QUESTIONS


def test_operations_are_those_that_pytorch_counts(bench: Bench) -> None:
    bench.model.fused = False
    with FlopCounterMode(display=False) as counter:
        done = bench.ours(2)
    # PyTorch does not count attention on a CPU, and the first of the two layers needs no gradients of its inputs.
    attention = 6 * 32 * bench.length * 2
    assert counter.get_total_flops() / done.amount == pytest.approx(bench.operations_per_token() - attention, rel=0.1)


def test_weights_in_4_bits_are_loaded_as_by_the_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[ModelTable] = []

    def without_bitsandbytes(settings: ModelTable, device: torch.device) -> dict[str, Any]:
        wanted.append(settings)
        return {}

    monkeypatch.setattr(ways, "quantization", without_bitsandbytes)
    model = make("smolvlm-2.2b", CPU, torch.float32, tiny=True)
    weights = {name: p.detach().clone() for name, p in model.backbone.model.named_parameters() if "lora" not in name}
    loaded = dict(quantized(model, tmp_path).backbone.model.named_parameters())
    assert wanted[0].quantize == "4bit"
    assert next(model.backbone.model.parameters()).is_meta
    assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())


def test_a_cohort_that_does_not_fit_is_not_measured_as_a_smaller_one(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def train_in_halves(model: MLLM, works: list[Work], table: TrainTable) -> list[LocalResult]:
        model.limits.clients.halve(len(works))
        return train_cohort(model, works, table)

    with monkeypatch.context() as patch:
        patch.setattr(ways, "train_cohort", train_in_halves)
        with pytest.raises(torch.OutOfMemoryError):
            bench.ours(2)
    assert bench.ours(2).amount == 2 * bench.ours(1).amount, "what a larger way found out does not limit the next"


# Measuring


def done(amount: int = 100, loss: float = 1.0) -> Done:
    time.sleep(0.001)
    return Done(amount, loss)


def fail(error: Exception) -> Done:
    raise error


def measured(named: dict[str, Any], seconds: float = 60.0, repeats: int = 2) -> dict[str, Measured]:
    return list(measure(named, CPU, time.monotonic() + seconds, repeats))[-1]


def test_what_does_not_fit_or_fails_is_named_and_the_rest_is_measured() -> None:
    too_large = partial(fail, torch.OutOfMemoryError("CUDA out of memory"))
    results = measured({"large": too_large, "broken": partial(fail, ValueError("a\n  b")), "good": done})
    assert results["large"].why == "not measured: it does not fit in the device's memory"
    assert results["broken"].why == "failed: ValueError: a b"
    assert results["large"].rates == results["broken"].rates == []
    assert len(results["good"].rates) == 2
    assert 0 < min(results["good"].rates) <= max(results["good"].rates) < 100 / 0.001


def test_measuring_ends_in_time() -> None:
    runs: list[str] = []

    def slow(name: str) -> Done:
        runs.append(name)
        time.sleep(0.05)
        return Done(1)

    results = measured({name: partial(slow, name) for name in "abc"}, seconds=0.12, repeats=100)
    assert "a" in runs
    assert len(runs) <= 2  # a third run would end too late
    assert results["a"].why == "only the first run, which also warms up"
    assert len(results["a"].rates) == 1
    assert results["c"].why == "not measured: the time was used up"


def test_enough_tokens_is_the_smallest_cohort_as_fast_as_any() -> None:
    rates = {1: [100.0], 2: [150.0], 4: [191.0], 8: [200.0], 16: []}
    cohorts = {clients: Measured(rates=of_cohort) for clients, of_cohort in rates.items()}
    assert report.enough_tokens(cohorts, length=10) == (4 * BATCH * 10, False)
    cohorts[8].rates = [202.0]  # 191 is less than 95 % of it
    assert report.enough_tokens(cohorts, length=10) == (8 * BATCH * 10, True)
    assert report.enough_tokens({1: Measured()}, length=10) is None


def test_failures_and_different_losses_are_reported() -> None:
    content = report.Report(None, {})
    parts = {"training": {"a": Measured(loss=1.0), "b": Measured(loss=1.01), "c": Measured(why="not measured: …")}}
    content.content["shapes"]["s"] = {"parts": parts}
    assert content.failures() == []
    for loss in (1.03, float("nan")):
        parts["training"]["b"].loss = loss
        assert content.failures() == ["s, training: the ways reach different losses, so the ratios compare different work"]
    parts["training"] = {"a": Measured(why="failed: ValueError: no")}
    content.content["shapes"]["t"] = {"failed": "failed: RuntimeError: no"}
    assert content.failures() == ["s, training, a: failed: ValueError: no", "t failed: RuntimeError: no"]


# The whole run


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    with torch.random.fork_rng():
        return gpu.main()


def test_a_run_writes_all_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu, "measure", partial(measure, repeats=0))
    monkeypatch.setattr(gpu, "COHORTS", (1, 2))
    monkeypatch.setattr(gpu, "CHECKPOINTED", (2,))
    arguments = ["--tiny", "--no-compile", "--shapes", "qwen2.5-vl-3b", "--out", str(tmp_path)]
    assert run_main(monkeypatch, *arguments) == 0
    written = json.loads((tmp_path / "gpu.json").read_text())
    shape = written["shapes"]["qwen2.5-vl-3b"]
    assert written["finished"]
    assert {name: len(ways) for name, ways in shape["parts"].items()} == {"training": 5, "answering": 3}
    assert all(way["rates"] for ways in shape["parts"].values() for way in ways.values())
    assert "requires a GPU" in shape["not_in_4_bits"]
    printed = capsys.readouterr().out
    assert written["line_for_capacity"] in printed
    assert '_ENOUGH_TOKENS = {"cpu": 4096, "cuda": ' in printed


def test_a_run_that_is_out_of_time_keeps_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, stops = threading.Timer, []

    class HeldTimer:
        def __init__(self, seconds: float, stop: Callable[..., None], arguments: tuple[Any, ...]) -> None:
            assert seconds == 60 * 9.0
            stops.append(partial(stop, *arguments))

        def start(self) -> None: ...

        def cancel(self) -> None: ...

    def stuck(*arguments: Any) -> Iterator[dict[str, Measured]]:
        yield {gpu.ONE: Measured(rates=[1.0])}
        real(0.05, stops[0]).start()
        time.sleep(60)

    monkeypatch.setattr(threading, "Timer", HeldTimer)
    monkeypatch.setattr(gpu, "measure", stuck)
    began = time.monotonic()
    run_main(monkeypatch, "--tiny", "--shapes", "smolvlm-2.2b", "--out", str(tmp_path))
    assert time.monotonic() - began < 60
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert not written["finished"]
    assert written["shapes"]["smolvlm-2.2b"]["parts"]["training"][gpu.ONE]["rates"] == [1.0]


def test_a_shape_that_cannot_be_built_leaves_the_others_their_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> Any:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(gpu, "make", broken)
    assert run_main(monkeypatch, "--tiny", "--out", str(tmp_path)) == 1
    shapes = json.loads((tmp_path / "gpu.json").read_text())["shapes"]
    assert [shape["failed"] for shape in shapes.values()] == ["failed: RuntimeError: no kernel"] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tiny", "--shapes", "x"], "'x' is not one of smolvlm-500m, smolvlm-2.2b, qwen2.5-vl-3b"),
        ([], "there is no GPU that PyTorch can use"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        run_main(monkeypatch, *arguments)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_with_the_compiled_loop(tmp_path: Path) -> None:
    command = [sys.executable, gpu.__file__, "--tiny", "--profile", "--shapes", "smolvlm-2.2b", "--out", str(tmp_path)]
    root = Path(gpu.__file__).parents[1]
    process = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)})
    assert process.returncode == 0, process.stdout + process.stderr
    compiled = json.loads((tmp_path / "gpu.json").read_text())["shapes"]["smolvlm-2.2b"]["parts"]["compiled"]
    assert compiled[f"{gpu.BARE}, compiled"]["rates"]
    assert "Self CPU" in (tmp_path / "profile-smolvlm-2.2b.txt").read_text()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_shapes_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_main(monkeypatch, "--minutes", "3", "--no-compile", "--out", str(tmp_path)) == 0
    for shape in json.loads((tmp_path / "gpu.json").read_text())["shapes"].values():
        assert shape["parts"]["training"][gpu.ONE]["memory"] > 2 * shape["parameters"]
