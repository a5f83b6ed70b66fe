"""The model wrapper on a tiny random checkpoint: every optimisation gives the same result as the direct computation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from fedmllm.config import LoraTable, ModelTable
from fedmllm.data.prompts import Conversation
from fedmllm.errors import ConfigError, DataError
from fedmllm.models.backbone import pick_dtype
from fedmllm.models.encoded import Encoded
from fedmllm.models.mllm import MLLM
from fedmllm.models.scoring import _distinguishing_position, option_scores
from fedmllm.models.stack import Stack
from tiny_models import OPEN, OPTIONS, perturb

TALKS = [
    *OPEN,
    Conversation("Text: a red thing\nwhich option is right?", "(A) red", image=True, options=OPTIONS),
    Conversation("Text: a blue thing\nwhich option is right?", "(B) blue", image=False, options=OPTIONS),
]


@pytest.fixture
def pictures(dataset: Path) -> list[Path | None]:
    return [dataset / "red.png", None, dataset / "blue.png", None]


def encoded(model: MLLM, pictures: list[Path | None]) -> list[Encoded]:
    return model.encode(TALKS, pictures, max_length=200)


def test_the_prompt_is_the_output_of_the_processor(model: MLLM, pictures: list[Path | None]) -> None:
    first, second = encoded(model, pictures)[:2]
    text = model.backbone.tokenizer.decode(first.prompt)
    image_part = "<fake_token_around_image><global-img>" + "<image>" * 16 + "<fake_token_around_image>"
    assert text == f"<begin>User:{image_part} which color is it?<end_of_utterance>\nAssistant:"
    assert model.backbone.tokenizer.decode(first.answer) == " red<end_of_utterance>"
    assert model.backbone.tokenizer.decode(second.prompt).count("<begin>") == 1
    assert not second.pictures


def test_cached_features_give_the_same_loss_scores_and_answers(settings: ModelTable, pictures: list[Path | None]) -> None:
    cached = MLLM.load(settings, seed=0)
    plain = MLLM.load(settings.model_copy(update={"cache_features": False}), seed=0)
    results = []
    for model in (cached, plain):
        perturb(model)
        batch = encoded(model, pictures)
        model.prepare_features()
        results.append((model.loss(batch).item(), option_scores(model, batch[2:]), model.generate(batch, 4)))
    assert cached.caches
    assert not plain.caches
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    torch.testing.assert_close(torch.tensor(results[0][1]), torch.tensor(results[1][1]), rtol=1e-5, atol=1e-6)
    assert results[0][2] == results[1][2]


def test_features_are_reused(settings: ModelTable, pictures: list[Path | None], monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDMLLM_CACHE", str(tmp_path))
    computed = []
    for _ in range(2):
        model = MLLM.load(settings, seed=0)
        encoded(model, pictures)
        computed.append(model.prepare_features())
    assert computed == [2, 0]


def test_a_truncated_feature_file_is_computed_again(
    settings: ModelTable, pictures: list[Path | None], monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FEDMLLM_CACHE", str(tmp_path))
    model = MLLM.load(settings, seed=0)
    encoded(model, pictures)
    model.prepare_features()
    (file,) = tmp_path.rglob("*.bin")
    file.write_bytes(file.read_bytes()[:-8])
    again = MLLM.load(settings, seed=0)
    encoded(again, pictures)
    assert again.prepare_features() == 2


def test_an_adapter_on_the_vision_tower_disables_the_cache(settings: ModelTable) -> None:
    lora = LoraTable(rank=2, target=r".*vision_model.*\.(q_proj|v_proj)")
    assert not MLLM.load(settings.model_copy(update={"lora": lora}), seed=0).caches


def test_padding_and_other_samples_change_nothing(model: MLLM, pictures: list[Path | None]) -> None:
    perturb(model)
    batch = encoded(model, pictures)
    together = model.loss(batch).item()
    assert together == pytest.approx(sum(model.loss([sample]).item() for sample in batch), rel=1e-5)
    assert model.generate(batch, 4) == [model.generate([sample], 4)[0] for sample in batch]


def test_loss_is_the_mean_over_answer_tokens(model: MLLM, pictures: list[Path | None]) -> None:
    """Compared with the logits of the whole sequence."""
    perturb(model)
    sample = encoded(model, pictures)[0]
    inputs = model.collate([sample], [sample.answer])
    logits = model.model(**inputs).logits[0]
    start = len(sample.prompt)
    expected = torch.nn.functional.cross_entropy(logits[start - 1 : -1], torch.tensor(sample.answer))
    assert model.loss([sample]).item() == pytest.approx(expected.item(), rel=1e-5)


def test_options_with_a_distinguishing_token_are_scored_by_it(model: MLLM, pictures: list[Path | None]) -> None:
    perturb(model)
    batch = encoded(model, pictures)[2:]
    for sample, scores in zip(batch, option_scores(model, batch), strict=True):
        position = _distinguishing_position(sample.options)
        assert position is not None
        logits = model.model(**model.collate([sample], [sample.options[0][:position]])).logits[0, -1]
        expected = torch.log_softmax(logits[[option[position] for option in sample.options]], dim=0)
        torch.testing.assert_close(torch.tensor(scores), expected, rtol=1e-5, atol=1e-6)


def test_options_without_a_distinguishing_token_are_scored_whole(model: MLLM) -> None:
    talk = Conversation("name it.", "red", image=False, options=("red", "red red", "blue"))
    (sample,) = model.encode([talk], [None], 100)
    assert _distinguishing_position(sample.options) is None
    (scores,) = option_scores(model, [sample])
    assert sum(torch.tensor(scores).exp()) == pytest.approx(1.0, rel=1e-5)
    totals = []
    for option in sample.options:
        logits = model.model(**model.collate([sample], [option])).logits[0].log_softmax(-1)
        start = len(sample.prompt)
        totals.append(sum(logits[start - 1 + i, token] for i, token in enumerate(option)))
    expected = torch.log_softmax(torch.stack(totals), dim=0)
    torch.testing.assert_close(torch.tensor(scores), expected, rtol=1e-4, atol=1e-5)


def test_the_initial_adapter_depends_only_on_the_seed(settings: ModelTable) -> None:
    torch.manual_seed(11)
    first = MLLM.load(settings, seed=0).adapter.get()
    torch.manual_seed(12)
    before = torch.get_rng_state()
    same, other = MLLM.load(settings, seed=0).adapter.get(), MLLM.load(settings, seed=1).adapter.get()
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert torch.equal(before, torch.get_rng_state())


def test_the_adapter_rejects_tensors_that_do_not_fit(model: MLLM) -> None:
    tensors = model.adapter.get()
    name = next(iter(tensors))
    with pytest.raises(ValueError, match="only one of the two has"):
        model.adapter.set({k: v for k, v in tensors.items() if k != name})
    with pytest.raises(ValueError, match="shape"):
        model.adapter.set({**tensors, name: torch.zeros(1)})


def test_setting_a_fold_twice_changes_nothing(model: MLLM, pictures: list[Path | None]) -> None:
    batch = encoded(model, pictures)
    before = model.loss(batch).item()
    module = "base_model.model.model.text_model.layers.0.self_attn.q_proj"
    generator = torch.Generator().manual_seed(0)
    fold = {
        f"{module}.fold_A": torch.randn(3, 32, generator=generator),
        f"{module}.fold_B": torch.randn(32, 3, generator=generator),
    }
    model.adapter.set_fold(fold)
    folded = model.loss(batch).item()
    model.adapter.set_fold(dict(fold))
    assert model.loss(batch).item() == folded != pytest.approx(before, rel=1e-4)
    model.adapter.set_fold({})
    assert model.loss(batch).item() == before


# PEFT uses a deprecated property of transformers.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_an_exported_adapter_loads_in_plain_peft(model: MLLM, tiny: Path, pictures: list[Path | None], tmp_path: Path) -> None:
    perturb(model)
    batch = encoded(model, pictures)
    model.adapter.export(tmp_path / "adapter", "tiny")
    base = AutoModelForImageTextToText.from_pretrained(tiny, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    inputs = model.collate(batch, [sample.answer for sample in batch])
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model.model(**inputs).logits, rtol=1e-5, atol=1e-5)


def test_a_prompt_that_is_too_long_is_rejected(model: MLLM) -> None:
    with pytest.raises(DataError, match=r"more than train.max_length = 10 .*raise the limit"):
        model.encode([TALKS[1]], [None], max_length=10)


@pytest.mark.parametrize("name", ["no/such-model", "nowhere"])
def test_an_unknown_model_is_reported_in_one_sentence(name: str) -> None:
    with pytest.raises(ConfigError, match=f"model.name = '{name}' cannot be loaded"):
        MLLM.load(ModelTable(name=name), seed=0)


def test_a_target_that_matches_nothing_is_reported_in_one_sentence(settings: ModelTable) -> None:
    with pytest.raises(ConfigError, match=r"model.lora.target = 'nothing' matches no module"):
        MLLM.load(settings.model_copy(update={"lora": LoraTable(target="nothing")}), seed=0)


def test_automatic_precision_depends_on_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert pick_dtype("auto", cpu, width=2048) is torch.bfloat16
    assert pick_dtype("auto", cpu, width=160) is torch.float32
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert pick_dtype("auto", cpu, width=2048) is torch.float32
    assert pick_dtype("bf16", cpu, width=160) is torch.bfloat16


def test_bfloat16_gives_nearly_the_same_loss(settings: ModelTable, pictures: list[Path | None]) -> None:
    losses = []
    for precision in ("fp32", "bf16"):
        model = MLLM.load(settings.model_copy(update={"precision": precision}), seed=0)
        losses.append(model.loss(encoded(model, pictures)).item())
        assert all(t.dtype is torch.float32 for t in model.adapter.parameters.values())
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_in_bfloat16_the_gradients_of_stacked_adapters_are_those_of_float32_but_for_rounding(
    settings: ModelTable, pictures: list[Path | None]
) -> None:
    """The error is the frozen layers' own rounding: 0.7 to 0.9 %, with products of the factors in float32 as in bfloat16."""
    grads = []
    for precision in ("fp32", "bf16"):
        model = MLLM.load(settings.model_copy(update={"precision": precision}), seed=0)
        draw = torch.Generator().manual_seed(0)
        start = {name: 0.02 * torch.randn(t.shape, generator=draw) for name, t in model.adapter.get().items()}
        stack = Stack(model.adapter, [start, {name: 1.5 * t for name, t in start.items()}], list(start))
        batch = encoded(model, pictures)
        with model.using(stack, 2):
            stack.begin([(len(batch), 0)] * 2)
            model.losses([*batch, *batch]).sum().backward()  # type: ignore[no-untyped-call]
        grads.append(stack.grads)
    assert grads[1].dtype is torch.float32
    for exact, rounded in zip(*grads, strict=True):
        assert torch.linalg.vector_norm(rounded - exact) < 0.02 * torch.linalg.vector_norm(exact)
