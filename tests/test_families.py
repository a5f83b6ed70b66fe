"""The contract of every model family, on tiny random checkpoints; nothing may be specific to the pocket model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText

from fedmllm.algorithms import LocalRule
from fedmllm.config import LoraTable, ModelTable, TrainTable
from fedmllm.data.prompts import Conversation
from fedmllm.models.encoded import Encoded
from fedmllm.models.mllm import MLLM
from fedmllm.models.scoring import _score_repeated, option_scores
from fedmllm.models.tokens import Tokens
from fedmllm.tensors import digest, distance
from fedmllm.training.cohort import Work, train_cohort
from naive_training import train_naively
from tiny_families import FAMILIES, save, without_torchvision_and_num2words
from tiny_models import CLOSED, OPTIONS, last_logits, perturb

pytestmark = [
    # PaliGemma's processor converts a tensor to a numpy array in a deprecated way.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]

WIDE, SMALL, TALL = (96, 48), (32, 32), (40, 80)
TALKS = [
    Conversation("which color is it?", "red", image=True),
    Conversation("name the color.", "blue", image=False),
    CLOSED,
    Conversation("Text: a blue thing\nwhich option is right?", "(B) blue", image=False, options=OPTIONS),
    Conversation("what is in it?", "a circle", image=True),
]
SHOWN = [WIDE, None, SMALL, None, TALL]
ADAMW = TrainTable(optimizer="adamw", lr=2e-2)

BATCHES = {"text": [1, 3], "image": [0, 4], "mixed": [0, 1, 2, 3, 4]}
"""Batches as indices into `TALKS`; the pictures have different sizes."""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path | None]:
    folder = tmp_path_factory.mktemp("pictures")
    for i, size in enumerate((WIDE, SMALL, TALL)):
        channels = [Image.effect_noise(size, 60 + 20 * i + 10 * c) for c in range(3)]
        Image.merge("RGB", channels).save(folder / f"{size}.png")
    return [folder / f"{size}.png" if size else None for size in SHOWN]


@pytest.fixture(scope="module", autouse=True)
def _without_torchvision_and_num2words() -> Iterator[None]:
    with without_torchvision_and_num2words():
        yield


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The name of a family and a folder with its checkpoint."""
    folder = tmp_path_factory.mktemp(request.param)
    save(request.param, folder)
    return request.param, folder


def load(folder: Path, perturbed: bool = True, caches: bool = True) -> MLLM:
    settings = ModelTable(name=str(folder), lora=LoraTable(rank=2, alpha=4.0), precision="fp32", cache_features=caches)
    model = MLLM.load(settings, seed=0)
    if perturbed:
        perturb(model)
    return model


@pytest.fixture(scope="module")
def cached(family: tuple[str, Path]) -> MLLM:
    return load(family[1])


@pytest.fixture(scope="module")
def uncached(family: tuple[str, Path]) -> MLLM:
    return load(family[1], caches=False)


@pytest.fixture(scope="module")
def fresh(family: tuple[str, Path]) -> MLLM:
    """With its first adapter; tests that set another one set it back, or set the one that they need."""
    return load(family[1], perturbed=False)


def encode(model: MLLM, pictures: list[Path | None]) -> list[Encoded]:
    encoded = model.encode(TALKS, pictures, 300)
    model.prepare_features()
    return encoded


Single = tuple[torch.Tensor, float, str, list[float] | None]
"""Of one sample: the last logits, the loss, the generated text, and the scores of its options if it has any."""


@pytest.fixture(scope="module")
def alone(family: tuple[str, Path], pictures: list[Path | None]) -> Callable[[MLLM, int], Single]:
    """What a model computes for `TALKS[index]` by itself, once for all batches with it."""
    encoded = cache(lambda model: encode(model, pictures))

    @cache
    def computed(model: MLLM, index: int) -> Single:
        batch = [encoded(model)[index]]
        scores = option_scores(model, batch)[0] if batch[0].options else None
        return last_logits(model, batch), model.loss(batch).item(), model.generate(batch, 3)[0], scores

    return computed


def test_only_the_attention_of_the_language_model_is_adapted(family: tuple[str, Path], cached: MLLM) -> None:
    adapted = FAMILIES[family[0]].adapted
    assert cached.info.layers == 2
    names = cached.adapter.parameters
    assert len(names) == len(adapted) * 4 * 2
    expected = {name: int(name.partition(".layers.")[2].partition(".")[0]) for name in names}
    assert cached.info.layer == expected
    assert set(expected.values()) == set(adapted)
    assert not any(part in name for name in names for part in ("vision", "visual", "projector", "connector", "merger"))
    assert {name.rpartition(".lora_")[0].rpartition(".")[2] for name in names} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_pictures_have_tokens_and_change_the_loss(family: tuple[str, Path], cached: MLLM, pictures: list[Path | None]) -> None:
    batch = cached.encode([TALKS[0]] * 3, [pictures[0], pictures[2], pictures[4]], 300)
    assert len({round(cached.loss([sample]).item(), 4) for sample in batch}) == 3
    assert (len({sample.length for sample in batch}) > 1) == FAMILIES[family[0]].dynamic


def test_a_blank_picture_of_equal_size_gives_the_same_prompt(
    cached: MLLM, pictures: list[Path | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compared with the prompt for the picture itself."""
    from_blank = cached.encode(TALKS, pictures, 300)
    monkeypatch.setattr(cached, "_tokens", Tokens(cached.backbone, always_decode=True))
    for sample, expected in zip(from_blank, cached.encode(TALKS, pictures, 300), strict=True):
        for field in ("prompt", "answer", "options", "pictures", "tokenwise"):
            assert getattr(sample, field) == getattr(expected, field), field
        assert sample.imagewise.keys() == expected.imagewise.keys()
        for name, tensor in expected.imagewise.items():
            assert torch.equal(sample.imagewise[name], tensor), name
            assert not tensor.is_floating_point(), "an input with floats would be computed again for every sample"


@pytest.mark.parametrize("indices", BATCHES.values(), ids=BATCHES)
def test_a_batch_gives_the_same_as_its_samples_one_by_one(
    cached: MLLM, uncached: MLLM, pictures: list[Path | None], alone: Callable[[MLLM, int], Single], indices: list[int]
) -> None:
    for model in (cached, uncached):
        assert model.caches == (model is cached)
        encoded = encode(model, pictures)
        batch = [encoded[i] for i in indices]
        assert len({sample.length for sample in batch}) > 1
        logits, losses, texts, scores = zip(*(alone(model, i) for i in indices), strict=True)
        torch.testing.assert_close(last_logits(model, batch), torch.cat(logits), rtol=1e-3, atol=1e-4)
        assert model.loss(batch).item() == pytest.approx(sum(losses), rel=1e-4)
        assert model.generate(batch, 3) == list(texts)
        closed = [sample for sample in batch if sample.options]
        expected = torch.tensor([row for row in scores if row is not None])
        torch.testing.assert_close(torch.tensor(option_scores(model, closed)), expected, rtol=1e-3, atol=1e-4)


def test_cached_equals_uncached(cached: MLLM, uncached: MLLM, pictures: list[Path | None]) -> None:
    with_cache, without_cache = encode(cached, pictures), encode(uncached, pictures)
    torch.testing.assert_close(last_logits(cached, with_cache), last_logits(uncached, without_cache), rtol=1e-3, atol=1e-4)
    assert cached.generate(with_cache, 3) == uncached.generate(without_cache, 3)


def test_the_model_gets_what_the_processor_returns(cached: MLLM, pictures: list[Path | None]) -> None:
    """The logits for a prompt with a picture, compared with those for the unchanged output of the processor."""
    for sample, talk, picture in zip(encode(cached, pictures), TALKS, pictures, strict=True):
        if picture is None:
            continue
        inputs = cached.backbone.processor(
            text=[cached.backbone.prompt(talk)], images=[[Image.open(picture)]], return_tensors="pt", add_special_tokens=False
        )
        with torch.no_grad():
            expected = cached.backbone.model(**{k: v for k, v in inputs.items() if k != "labels"}).logits[:, -1]
            actual = cached.backbone.model(**cached.collate([sample], [()])).logits[:, -1]
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_prompt_shows_several_pictures_in_their_order(cached: MLLM, uncached: MLLM, pictures: list[Path | None]) -> None:
    """Compared with the unchanged output of the processor: from the cache and without it, alone and in a batch."""
    first, second = (path for path in (pictures[0], pictures[4]) if path)
    shown, talk = [(first, second), (second, first)], replace(TALKS[0], image=2)
    expected = []
    for paths in shown:
        inputs = cached.backbone.processor(
            text=[cached.backbone.prompt(talk)], images=[list(map(Image.open, paths))], return_tensors="pt",
            add_special_tokens=False,
        )  # fmt: skip
        with torch.no_grad():
            expected.append(cached.backbone.model(**{k: v for k, v in inputs.items() if k != "labels"}).logits[:, -1])
    assert not torch.allclose(*expected, rtol=1e-2)
    for model in (cached, uncached):
        encoded = model.encode([talk, talk, TALKS[0]], [*shown, first], 600)
        assert encoded[0].pictures == encoded[1].pictures[::-1]
        model.prepare_features()
        with torch.no_grad():
            alone = [model.backbone.model(**model.collate([sample], [()])).logits[:, -1] for sample in encoded]
            together = model.backbone.model(**model.collate(encoded, [()] * 3)).logits[:, -1]
        torch.testing.assert_close(torch.cat(alone[:2]), torch.cat(expected), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-3, atol=1e-4)


def test_generation_starts_with_the_most_probable_token(cached: MLLM, pictures: list[Path | None]) -> None:
    """Training, scoring and generation use the same prompt: the same mask, positions and token types."""
    for sample in encode(cached, pictures):
        with torch.no_grad():
            token = int(cached.backbone.model(**cached.collate([sample], [()])).logits[0, -1].argmax())
        expected = cached.backbone.tokenizer.decode([token], skip_special_tokens=True).strip()
        assert cached.generate([sample], 1) == [expected]


def test_generation_equals_full_forward_passes(cached: MLLM, pictures: list[Path | None]) -> None:
    """Compared with a naive loop, token by token and without a cache of keys and values."""
    for sample in encode(cached, pictures):
        ids: list[int] = []
        for _ in range(3):
            with torch.no_grad():
                ids.append(int(cached.backbone.model(**cached.collate([sample], [ids])).logits[0, -1].argmax()))
            if ids[-1] in cached.backbone.end_ids:
                break
        assert cached.generate([sample], 3) == [cached.backbone.tokenizer.decode(ids, skip_special_tokens=True).strip()]


def test_answers_are_causal(cached: MLLM, pictures: list[Path | None]) -> None:
    """Even if a prompt attends in both directions, an answer must not attend to its later tokens: training would copy them."""
    for sample in encode(cached, pictures):
        answers = [(*sample.answer[:1], 50, 60), (*sample.answer[:1], 70, 80)]
        first, second = (last_logits(cached, [replace(sample, answer=answer)], last=4)[0] for answer in answers)
        torch.testing.assert_close(first[:2], second[:2], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(first[2:], second[2:], rtol=1e-2)


def test_training_decreases_the_loss(fresh: MLLM, pictures: list[Path | None]) -> None:
    model, batch = fresh, encode(fresh, pictures)
    start = model.adapter.get()
    result = train_cohort(model, [Work([[batch]] * 12, start, LocalRule(), 0)], ADAMW)[0]
    model.adapter.set(result.trained)
    with torch.no_grad():
        after = model.loss(batch).item()
        model.adapter.set(start)
        before = model.loss(batch).item()
    assert after < 0.9 * before
    assert all(not torch.equal(result.trained[name], start[name]) for name in start)
    assert not any(p.requires_grad for name, p in model.model.named_parameters() if "lora" not in name)


def test_vision_tower_and_text_model_train_beside_the_whole_connector(
    family: tuple[str, Path], pictures: list[Path | None]
) -> None:
    """In bfloat16, with what is trained in float32; before training, the model is unchanged but for rounding."""
    lora = LoraTable(rank=2, alpha=4.0, target="vision+all-linear", whole="projector")
    model = MLLM.load(ModelTable(name=str(family[1]), lora=lora, precision="bf16"), seed=0)
    batch = encode(model, pictures)
    assert (model.caches, model.adapter.stacks, set(model.adapter.sizes)) == (False, False, {"text", "vision", "projector"})
    assert {parameter.dtype for parameter in model.adapter.parameters.values()} == {torch.float32}
    adapted = last_logits(model, batch)
    with model.without_adapter():
        torch.testing.assert_close(adapted, last_logits(model, batch), rtol=0.1, atol=0.1)
    start = model.adapter.get()
    trained = train_cohort(model, [Work([[batch]] * 2, start, LocalRule(), 0)], ADAMW)[0].trained
    # LLaVA reads the tower's last layer but one. What Qwen3-VL adds after the text model's last layer reaches no answer.
    unused = {"llava": "vision_tower.encoder.layers.1.", "llava_next": "vision_tower.encoder.layers.1.", "qwen3_vl": "_list.1."}
    still = [name for name in start if torch.equal(trained[name], start[name])]
    assert all(unused.get(family[0], "none") in name for name in still), still


def test_scoring_from_a_cached_prompt_equals_repeating_the_prompt(cached: MLLM, pictures: list[Path | None]) -> None:
    """Options have one to four tokens, and some are the beginning of others."""
    batch = encode(cached, pictures)
    tokens = [token for sample in batch for token in sample.answer][:2] * 2
    options = [tuple(tokens[:n]) for n in (1, 2, 4)]
    questions = [replace(sample, options=tuple(options[i % 2 :])) for i, sample in enumerate(batch)]
    together, alone = option_scores(cached, questions), [option_scores(cached, [question])[0] for question in questions]
    with torch.no_grad():
        repeated = [_score_repeated(cached, [question]).log_softmax(-1).tolist() for question in questions]
    for results in (together, alone):
        for scores, expected in zip(results, repeated, strict=True):
            torch.testing.assert_close(torch.tensor(scores), torch.tensor(expected), rtol=1e-3, atol=1e-4)


def test_clients_in_one_pass_train_as_if_alone(fresh: MLLM, pictures: list[Path | None]) -> None:
    """The clients differ in the number of samples and the lengths of prompts; some rows of each have pictures."""
    model, batch = fresh, encode(fresh, pictures)
    parts = (batch[:1], batch[1:])
    works = [Work([[[sample] for sample in part]] * 2, model.adapter.get(), LocalRule(), 0) for part in parts]
    for work, result in zip(works, train_cohort(model, works, ADAMW), strict=True):
        alone = train_naively(model, work, ADAMW)
        assert distance(result.trained, alone.trained) < 1e-3 * distance(alone.trained, work.received)
        assert result.metrics["loss"] == pytest.approx(alone.metrics["loss"], rel=1e-4)
    again = train_cohort(model, works, ADAMW.model_copy(update={"checkpointing": True}))
    assert [distance(a.trained, b.trained) for a, b in zip(again, train_cohort(model, works, ADAMW), strict=True)] == [0, 0]


# PEFT uses a deprecated property of transformers.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_an_exported_adapter_can_be_loaded(
    family: tuple[str, Path], cached: MLLM, fresh: MLLM, pictures: list[Path | None], tmp_path: Path
) -> None:
    batch = encode(cached, pictures)
    expected = last_logits(cached, batch)
    cached.adapter.export(tmp_path, "tiny")
    first = fresh.adapter.get()
    assert digest(first) != digest(cached.adapter.get())
    fresh.adapter.load(tmp_path)
    assert digest(fresh.adapter.get()) == digest(cached.adapter.get())
    assert torch.equal(last_logits(fresh, encode(fresh, pictures)), expected)
    fresh.adapter.set(first)
    base = AutoModelForImageTextToText.from_pretrained(family[1], dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        actual = loaded(**cached.collate(batch, [sample.answer for sample in batch])).logits[:, -1:]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
