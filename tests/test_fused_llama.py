"""The text model that is written out gives what transformers' gives."""

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
from fedmllm.models.stack import Stack
from fedmllm.tensors import Tensors

COLORS = ("red", "blue", "green")
MLPS = r".*text_model.*\.(q_proj|down_proj)"


def load(tiny: Path | str, kind: str = "lora", **lora: object) -> MLLM:
    table = LoraTable.model_validate({"rank": 3, "alpha": 6.0, **lora})
    adapter = AdapterTable.model_validate({"kind": kind})
    return MLLM.load(ModelTable(name=str(tiny), lora=table, adapter=adapter, precision="fp32"), seed=0)


@pytest.fixture(scope="module")
def model(tiny: Path) -> MLLM:
    return load(tiny)


@pytest.fixture(scope="module")
def rows(model: MLLM, dataset: Path) -> list[Encoded]:
    """Eight prompts of unequal length, with and without a picture, answers of one word or several, closed ones too."""
    talks = [
        Conversation(
            "name the color. " * (1 + i % 4), " ".join(COLORS[: 1 + i % 3]), image=i % 3 != 2, options=COLORS if i % 2 else ()
        )
        for i in range(8)
    ]
    return model.encode(talks, [dataset / f"{COLORS[i % 3]}.png" for i in range(8)], 300)


def some(like: Tensors, seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.2 * torch.randn(tensor.shape, generator=generator) for name, tensor in like.items()}


@contextmanager
def transformers(model: MLLM) -> Iterator[None]:
    """Compute with the model as transformers has it."""
    before, model.lean = model.lean, False
    try:
        yield
    finally:
        model.lean = before


def learn(model: MLLM, rows: Sequence[Encoded], starts: Sequence[Tensors], trainable: Sequence[str]) -> tuple[Tensor, Tensor]:
    """(losses, gradients) of the rows, dealt out to as many clients as there are starts."""
    stack = Stack(model.adapter, starts, trainable)
    with stack.installed(len(starts)):
        stack.begin([(len(rows) // len(starts), 0)] * len(starts))
        losses = model.losses(rows)
        losses.sum().backward()  # type: ignore[no-untyped-call]
    return losses.detach(), stack.grads.clone()


def near(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("clients", [1, 2, 4])
@pytest.mark.parametrize("train", ["", "lora_A", "lora_B"])
def test_losses_and_gradients(model: MLLM, rows: list[Encoded], clients: int, train: str) -> None:
    assert model.lean
    starts = [some(model.adapter.get(), seed) for seed in range(clients)]
    names = [name for name in model.adapter.parameters if train in name]
    losses, grads = learn(model, rows, starts, names)
    with transformers(model):
        expected, expected_grads = learn(model, rows, starts, names)
    near(losses, expected)
    near(grads, expected_grads)
    assert bool((grads.abs().amax(1) > 0).all())


def test_rows_shorter_than_the_longest_answer(model: MLLM, rows: list[Encoded]) -> None:
    """Their first positions asked for are not there; those that are get their gradient all the same."""
    short = [Encoded((5,), (7, 2), (), None, {}, {}), Encoded((5, 6), (9, 8, 7, 6, 5, 4, 2), (), None, {}, {})]
    starts = [some(model.adapter.get(), 0)]
    losses, grads = learn(model, short, starts, list(model.adapter.parameters))
    with transformers(model):
        expected, expected_grads = learn(model, short, starts, list(model.adapter.parameters))
    near(losses, expected)
    near(grads, expected_grads)


def test_clients_of_unequal_rank(model: MLLM, rows: list[Encoded]) -> None:
    whole = some(model.adapter.get(), 0)
    starts = [whole, resized(whole, 1, model.info)]
    losses, grads = learn(model, rows, starts, list(whole))
    with transformers(model):
        expected, expected_grads = learn(model, rows, starts, list(whole))
    near(losses, expected)
    near(grads, expected_grads)


def test_scores_follow_the_fold(model: MLLM, rows: list[Encoded]) -> None:
    closed = [one for one in rows if one.options]
    starts = [some(model.adapter.get(), seed) for seed in range(2)]
    module = next(iter(model.adapter.parameters)).removesuffix(".lora_A.weight")
    fold = {f"{module}.fold": 0.3 * torch.randn(model.model.get_submodule(module).base_layer.weight.shape)}
    found = []
    for change in ({}, fold, {}):
        model.adapter.set_fold(change)
        with model.stacked(starts):
            scores = model.option_scores(closed * 2, 2)
            with transformers(model):
                near(torch.tensor(scores), torch.tensor(model.option_scores(closed * 2, 2)))
        found.append(torch.tensor(scores))
    assert (found[0] - found[1]).abs().max() > 1e-3
    assert torch.equal(found[0], found[2])


def test_dropout_is_transformers_business(tiny: Path, rows: list[Encoded], monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tiny, dropout=0.5)
    monkeypatch.setattr("fedmllm.models.mllm.FusedLlama.__call__", lambda *given: pytest.fail("no dropout there"))
    text = [one for one in rows if one.picture is None]  # this model has met no picture
    stack = Stack(model.adapter, [some(model.adapter.get(), 0)], list(model.adapter.parameters), dropout=[1])
    with stack.installed(1):
        stack.begin([(len(text), model.width(text))])
        model.losses(text).sum().backward()  # type: ignore[no-untyped-call]
    assert stack.grads.abs().sum() > 0


@pytest.mark.parametrize(
    ("kind", "lora"), [("lora", {"target": MLPS}), ("dora", {}), ("ia3", {}), ("prompt-tuning", {})], ids=str
)
def test_what_is_not_written_out_is_left_to_transformers(tiny: Path, kind: str, lora: dict[str, object]) -> None:
    assert not load(tiny, kind, **lora).lean


def test_bfloat16_is_left_to_transformers(tiny: Path) -> None:
    assert not MLLM.load(ModelTable(name=str(tiny), precision="bf16"), seed=0).lean


def test_the_pocket_model_is_written_out() -> None:
    assert load("pocket").lean
