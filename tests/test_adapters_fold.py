"""The fold on a real (tiny) model: it replaces the previous one, survives low precision, and is exported with the adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from fedmllm.algorithms.factors import modules
from fedmllm.config import ModelTable
from fedmllm.models.adapter import Adapter
from fedmllm.tensors import Tensors
from tiny_models import CLOSED, OPEN, last_logits, load_adapted, perturb, plain_peft

TALKS = [*OPEN, CLOSED]


@pytest.fixture
def pictures(dataset: Path) -> list[Path | None]:
    return [dataset / "red.png", None, dataset / "blue.png"]


def random_fold(adapter: Adapter, rank: int, dense: bool = False) -> Tensors:
    generator = torch.Generator().manual_seed(9)
    fold: Tensors = {}
    for m in modules(adapter.get()):
        left, right = (0.3 * torch.randn(shape, generator=generator) for shape in ((32, rank), (rank, 32)))
        fold |= {m + ".fold": left @ right} if dense else {m + ".fold_A": right, m + ".fold_B": left}
    return fold


@plain_peft
@pytest.mark.parametrize("dense", [False, True], ids=["factors", "dense"])
@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_a_fold_is_exported_as_extra_rank(
    settings: ModelTable, tiny: Path, pictures: list[Path | None], tmp_path: Path, kind: str, dense: bool
) -> None:
    model = load_adapted(settings, kind)
    perturb(model)
    batch = model.encode(TALKS, pictures, 200)
    model.adapter.set_fold(random_fold(model.adapter, 3, dense))
    expected = last_logits(model, batch)
    model.adapter.export(tmp_path, "tiny")
    loaded = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(tiny, dtype=torch.float32), tmp_path).eval()
    inputs = model.collate(batch, [sample.answer for sample in batch])
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits[:, -1:], expected, rtol=1e-4, atol=1e-4)
    reloaded = load_adapted(settings, kind)
    reloaded.adapter.load(tmp_path)
    torch.testing.assert_close(last_logits(reloaded, reloaded.encode(TALKS, pictures, 200)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_the_largest_singular_values_can_move_from_the_base_to_the_adapter(
    settings: ModelTable, pictures: list[Path | None], kind: str
) -> None:
    """FRLoRA's start: the model computes the same, and a fold that was set before changes nothing about it."""
    model = load_adapted(settings, kind)
    batch = model.encode(TALKS, pictures, 200)
    expected = last_logits(model, batch)
    model.adapter.set_fold(random_fold(model.adapter, 3))
    start = model.info.principal()
    assert start is model.info.principal()
    assert start["adapter"].keys() == model.adapter.get().keys()
    model.adapter.set(start["adapter"])
    model.adapter.set_fold(start["fold"])
    torch.testing.assert_close(last_logits(model, batch), expected, rtol=1e-4, atol=1e-4)
    fresh = load_adapted(settings, kind).info.principal()
    assert all(torch.equal(tensor, fresh["adapter"][name]) for name, tensor in start["adapter"].items())


def test_a_fold_of_some_modules_resets_the_others(settings: ModelTable, pictures: list[Path | None]) -> None:
    model = load_adapted(settings, "lora")
    batch = model.encode(TALKS, pictures, 200)
    fold = random_fold(model.adapter, 3)
    first = modules(model.adapter.get())[0]
    partial = {n: t for n, t in fold.items() if n.startswith(first + ".")}
    model.adapter.set_fold(fold)
    model.adapter.set_fold(partial)
    fresh = load_adapted(settings, "lora")
    fresh.adapter.set_fold(partial)
    torch.testing.assert_close(last_logits(model, batch), last_logits(fresh, fresh.encode(TALKS, pictures, 200)))


def test_in_low_precision_a_small_fold_is_not_rounded_away(settings: ModelTable, pictures: list[Path | None]) -> None:
    """The fold is smaller than bfloat16's step at weights of 1, so it would vanish if it were added to the weights."""
    model = load_adapted(settings, "lora", precision="bf16")
    module = modules(model.adapter.get())[0]
    layer = model.model.get_submodule(module)
    before = layer.base_layer.weight.clone()
    x = torch.ones(1, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.base_layer.weight.zero_()  # so that the output is that of the fold
        fold = {module + ".fold_A": torch.full((1, 32), 1e-3), module + ".fold_B": torch.full((32, 1), 1e-3)}
        model.adapter.set_fold(fold)
        torch.testing.assert_close(layer(x).float(), torch.full((1, 32), 32e-6), rtol=1e-2, atol=0)
        model.adapter.set_fold(dict(fold))
        torch.testing.assert_close(layer(x).float(), torch.full((1, 32), 32e-6), rtol=1e-2, atol=0)
        model.adapter.set_fold({})
        assert not bool(layer(x).any())
        layer.base_layer.weight.copy_(before)
