"""The hand-written text model computes the same as that of transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedmllm.algorithms.factors import resized
from fedmllm.config import AdapterTable, LoraTable, ModelTable
from fedmllm.data.prompts import Conversation
from fedmllm.models.encoded import Encoded
from fedmllm.models.mllm import MLLM
from fedmllm.models.scoring import option_scores
from fedmllm.models.stack import Stack
from fedmllm.tensors import Tensors

COLORS = ("red", "blue", "green")
MLPS = r".*text_model.*\.(q_proj|down_proj)"


def load(name: Path | str, kind: str = "lora", **lora: object) -> MLLM:
    table = LoraTable.model_validate({"rank": 3, "alpha": 6.0, **lora})
    adapter = AdapterTable.model_validate({"kind": kind})
    return MLLM.load(ModelTable(name=str(name), lora=table, adapter=adapter, precision="fp32"), seed=0)


@pytest.fixture(scope="module")
def model(tiny: Path) -> MLLM:
    return load(tiny)


@pytest.fixture(scope="module")
def samples(model: MLLM, dataset: Path) -> list[Encoded]:
    """Eight prompts of different lengths, with and without a picture or options; answers have one word or several."""
    talks = [
        Conversation(
            "name the color. " * (1 + i % 4), " ".join(COLORS[: 1 + i % 3]), image=i % 3 != 2, options=COLORS if i % 2 else ()
        )
        for i in range(8)
    ]
    return model.encode(talks, [dataset / f"{COLORS[i % 3]}.png" for i in range(8)], 300)


def random_adapter(model: MLLM, seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.2 * torch.randn(t.shape, generator=generator) for name, t in model.adapter.get().items()}


@contextmanager
def with_transformers(model: MLLM) -> Iterator[None]:
    """Compute with the text model of transformers."""
    fused, model.fused = model.fused, False
    try:
        yield
    finally:
        model.fused = fused


def losses_and_gradients(
    model: MLLM, samples: Sequence[Encoded], starts: Sequence[Tensors], trainable: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """The samples are divided among as many clients as there are starts."""
    stack = Stack(model.adapter, starts, trainable)
    with model.using(stack, len(starts)):
        stack.begin([(len(samples) // len(starts), 0)] * len(starts))
        losses = model.losses(samples)
        losses.sum().backward()  # type: ignore[no-untyped-call]
    return losses.detach(), stack.grads.clone()


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def assert_same_training(
    model: MLLM, samples: Sequence[Encoded], starts: Sequence[Tensors], trainable: Sequence[str]
) -> Tensor:
    """Compare losses and gradients with those of transformers. Return the gradients."""
    losses, gradients = losses_and_gradients(model, samples, starts, trainable)
    with with_transformers(model):
        expected_losses, expected_gradients = losses_and_gradients(model, samples, starts, trainable)
    assert_close(losses, expected_losses)
    assert_close(gradients, expected_gradients)
    return gradients


@pytest.mark.parametrize("clients", [1, 2, 4])
@pytest.mark.parametrize("trained", ["", "lora_A", "lora_B"])
def test_losses_and_gradients(model: MLLM, samples: list[Encoded], clients: int, trained: str) -> None:
    assert model.fused
    starts = [random_adapter(model, seed) for seed in range(clients)]
    names = [name for name in model.adapter.parameters if trained in name]
    gradients = assert_same_training(model, samples, starts, names)
    assert bool((gradients.abs().amax(1) > 0).all())


def test_rows_shorter_than_the_longest_answer(model: MLLM) -> None:
    """Some of the requested positions do not exist in these rows; the gradient of the others is complete."""
    short = [Encoded((5,), (7, 2), (), None, {}, {}), Encoded((5, 6), (9, 8, 7, 6, 5, 4, 2), (), None, {}, {})]
    assert_same_training(model, short, [random_adapter(model, 0)], list(model.adapter.parameters))


def test_clients_of_unequal_rank(model: MLLM, samples: list[Encoded]) -> None:
    adapter = random_adapter(model, 0)
    assert_same_training(model, samples, [adapter, resized(adapter, 1, model.info)], list(adapter))


def test_scores_follow_the_fold(model: MLLM, samples: list[Encoded]) -> None:
    closed = [sample for sample in samples if sample.options]
    starts = [random_adapter(model, seed) for seed in range(2)]
    module = next(iter(model.adapter.parameters)).removesuffix(".lora_A.weight")
    fold = {f"{module}.fold": 0.3 * torch.randn(model.model.get_submodule(module).base_layer.weight.shape)}
    results = []
    for change in ({}, fold, {}):
        model.adapter.set_fold(change)
        with model.stacked(starts):
            scores = option_scores(model, closed * 2, 2)
            with with_transformers(model):
                assert_close(torch.tensor(scores), torch.tensor(option_scores(model, closed * 2, 2)))
        results.append(torch.tensor(scores))
    assert (results[0] - results[1]).abs().max() > 1e-3
    assert torch.equal(results[0], results[2])


def test_dropout_is_left_to_transformers(tiny: Path, samples: list[Encoded], monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tiny, dropout=0.5)
    monkeypatch.setattr("fedmllm.models.mllm.FusedLlama.__call__", lambda *_: pytest.fail("FusedLlama has no dropout"))
    text_only = [sample for sample in samples if sample.picture is None]  # this model does not know the pictures
    stack = Stack(model.adapter, [random_adapter(model, 0)], list(model.adapter.parameters), dropout=[1])
    with model.using(stack, 1):
        stack.begin([(len(text_only), model.width(text_only))])
        model.losses(text_only).sum().backward()  # type: ignore[no-untyped-call]
    assert stack.grads.abs().sum() > 0


@pytest.mark.parametrize(
    ("kind", "lora"), [("lora", {"target": MLPS}), ("dora", {}), ("ia3", {}), ("prompt-tuning", {})], ids=str
)
def test_unsupported_adapters_are_left_to_transformers(tiny: Path, kind: str, lora: dict[str, object]) -> None:
    assert not load(tiny, kind, **lora).fused


def test_bfloat16_is_left_to_transformers(tiny: Path) -> None:
    assert not MLLM.load(ModelTable(name=str(tiny), precision="bf16"), seed=0).fused


def test_the_pocket_model_is_fused() -> None:
    assert load("pocket").fused


def test_lora_xs_is_fused(tiny: Path, samples: list[Encoded]) -> None:
    model = load(tiny, "lora-xs")
    assert model.fused
    text_only = [sample for sample in samples if sample.picture is None]  # this model does not know the pictures
    starts = [random_adapter(model, seed) for seed in range(len(text_only))]
    gradients = assert_same_training(model, text_only, starts, list(model.adapter.parameters))
    assert bool((gradients.abs().amax(1) > 0).all())
