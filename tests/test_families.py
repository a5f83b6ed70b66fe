"""What every model family must do, on tiny random checkpoints: nothing in the package may be particular to the pocket model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText
from transformers.models.smolvlm import processing_smolvlm

from fedmllm.algorithms import LocalRule
from fedmllm.config import LoraTable, ModelTable
from fedmllm.data.prompts import Conversation
from fedmllm.models import processors
from fedmllm.models.encoded import Encoded
from fedmllm.models.families import families
from fedmllm.models.mllm import MLLM
from fedmllm.models.scoring import _repeated
from fedmllm.models.tokens import Tokens
from fedmllm.tensors import digest, distance
from fedmllm.training.cohort import train_cohort, train_local
from fedmllm.training.local import LocalSettings, Work
from naive_training import train_naively
from tiny_families import FAMILIES, save

pytestmark = [
    # PaliGemma's processor makes a numpy array of a tensor in a way that numpy 2 will refuse one day.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
    pytest.mark.xdist_group("families"),  # in one worker, so that each family is loaded once
]

OPTIONS = ("(A) red", "(B) blue")
WIDE, SMALL, TALL = (96, 48), (32, 32), (40, 80)
TALKS = [
    Conversation("which color is it?", "red", image=True),
    Conversation("name the color.", "blue", image=False),
    Conversation("Text: a red thing that is a little longer\nwhich option is right?", "(A) red", image=True, options=OPTIONS),
    Conversation("Text: a blue thing\nwhich option is right?", "(B) blue", image=False, options=OPTIONS),
    Conversation("what is in it?", "a circle", image=True),
]
SHOWN = [WIDE, None, SMALL, None, TALL]
ADAMW = LocalSettings("adamw", 2e-2, 0.0, (0.9, 0.95), 0.0, 1.0)

BATCHES = {"text": [1, 3], "image": [0, 4], "image and text": [2, 0], "mixed": [0, 1, 2, 3, 4]}
"""Which of `TALKS` are together in a batch; the pictures are of different sizes."""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path | None]:
    folder = tmp_path_factory.mktemp("pictures")
    for i, size in enumerate((WIDE, SMALL, TALL)):
        channels = [Image.effect_noise(size, 60 + 20 * i + 10 * c) for c in range(3)]
        Image.merge("RGB", channels).save(folder / f"{size}.png")
    return [folder / f"{size}.png" if size else None for size in SHOWN]


@pytest.fixture(scope="module", autouse=True)
def _without_torchvision_and_num2words() -> Iterator[None]:
    """As where neither is installed, on every machine: both serve videos alone, which the checkpoints here know nothing of."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processors, "is_torchvision_available", lambda: False)
        patch.setattr(processing_smolvlm, "num2words", str)
        yield


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A family's name and a folder with its checkpoint."""
    folder = tmp_path_factory.mktemp(request.param)
    save(request.param, folder)
    return request.param, folder


def test_every_family_known_here_is_tested() -> None:
    assert set(families.names()) <= set(FAMILIES)


def load(folder: Path, unsettled: bool = True, caches: bool = True) -> MLLM:
    settings = ModelTable(name=str(folder), lora=LoraTable(rank=2, alpha=4.0), precision="fp32", cache_features=caches)
    model = MLLM.load(settings, seed=0)
    if unsettled:  # away from the start, where B = 0 hides A
        generator = torch.Generator().manual_seed(3)
        moved = {k: t + 0.2 * torch.randn(t.shape, generator=generator) for k, t in model.adapter.get().items()}
        model.adapter.set(moved)
    return model


@pytest.fixture(scope="module")
def cached(family: tuple[str, Path]) -> MLLM:
    return load(family[1])


@pytest.fixture(scope="module")
def uncached(family: tuple[str, Path]) -> MLLM:
    return load(family[1], caches=False)


def encode(model: MLLM, pictures: list[Path | None]) -> list[Encoded]:
    encoded = model.encode(TALKS, pictures, 300)
    model.prepare_features()
    return encoded


@torch.no_grad()
def logits(model: MLLM, batch: list[Encoded], last: int = 1) -> torch.Tensor:
    """(rows, last, vocabulary): what the model says at the last positions of prompts and answers."""
    found: torch.Tensor = model.backbone.model(**model.collate(batch, [one.answer for one in batch])).logits[:, -last:]
    return found.float()


def test_the_adapter_is_on_the_language_models_attention_alone(family: tuple[str, Path], cached: MLLM) -> None:
    adapted = FAMILIES[family[0]].adapted
    assert cached.info.layers == 2
    names = cached.adapter.parameters
    assert len(names) == len(adapted) * 4 * 2
    expected = {name: int(name.partition(".layers.")[2].partition(".")[0]) for name in names}
    assert cached.info.layer == expected
    assert set(expected.values()) == set(adapted)
    assert not any(part in name for name in names for part in ("vision", "visual", "projector", "connector", "merger"))
    assert {name.rpartition(".lora_")[0].rpartition(".")[2] for name in names} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_a_picture_makes_tokens_and_matters(family: tuple[str, Path], cached: MLLM, pictures: list[Path | None]) -> None:
    batch = cached.encode([TALKS[0]] * 3, [pictures[0], pictures[2], pictures[4]], 300)
    assert len({round(cached.loss([one]).item(), 4) for one in batch}) == 3
    assert (len({one.length for one in batch}) > 1) == FAMILIES[family[0]].dynamic


def test_a_prompt_is_the_same_from_a_blank_picture_of_that_size(
    cached: MLLM, pictures: list[Path | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the long way, which gives the processor every picture itself."""
    quick = cached.encode(TALKS, pictures, 300)
    monkeypatch.setattr(cached, "_tokens", Tokens(cached.backbone, trusts=True))
    for short, long in zip(quick, cached.encode(TALKS, pictures, 300), strict=True):
        for field in ("prompt", "answer", "options", "picture", "tokenwise"):
            assert getattr(short, field) == getattr(long, field), field
        assert short.imagewise.keys() == long.imagewise.keys()
        for name, tensor in long.imagewise.items():
            assert torch.equal(short.imagewise[name], tensor), name
            assert not tensor.is_floating_point(), "such inputs are made anew for every sample"


@pytest.mark.parametrize("picked", BATCHES.values(), ids=BATCHES)
def test_a_batch_is_its_samples_one_by_one(
    cached: MLLM, uncached: MLLM, pictures: list[Path | None], picked: list[int]
) -> None:
    for model in (cached, uncached):
        assert model.caches == (model is cached)
        encoded = encode(model, pictures)
        batch = [encoded[i] for i in picked]
        assert len({one.length for one in batch}) > 1
        alone = torch.cat([logits(model, [one]) for one in batch])
        torch.testing.assert_close(logits(model, batch), alone, rtol=1e-3, atol=1e-4)
        assert model.loss(batch).item() == pytest.approx(sum(model.loss([one]).item() for one in batch), rel=1e-4)
        assert model.generate(batch, 3) == [model.generate([one], 3)[0] for one in batch]
        closed = [one for one in batch if one.options]
        scores = [model.option_scores([one])[0] for one in closed]
        torch.testing.assert_close(torch.tensor(model.option_scores(closed)), torch.tensor(scores), rtol=1e-3, atol=1e-4)


def test_cached_equals_uncached(cached: MLLM, uncached: MLLM, pictures: list[Path | None]) -> None:
    ours, theirs = encode(cached, pictures), encode(uncached, pictures)
    torch.testing.assert_close(logits(cached, ours), logits(uncached, theirs), rtol=1e-3, atol=1e-4)
    assert cached.generate(ours, 3) == uncached.generate(theirs, 3)


def test_the_model_sees_what_the_processor_makes(cached: MLLM, pictures: list[Path | None]) -> None:
    """A prompt with a picture, against the processor's own output given to the model as it is."""
    for one, talk, picture in zip(encode(cached, pictures), TALKS, pictures, strict=True):
        if picture is None:
            continue
        made = cached.backbone.processor(
            text=[cached.backbone.prompt(talk)], images=[[Image.open(picture)]], return_tensors="pt", add_special_tokens=False
        )
        with torch.no_grad():
            expected = cached.backbone.model(**{k: v for k, v in made.items() if k != "labels"}).logits[:, -1]
            found = cached.backbone.model(**cached.collate([one], [()])).logits[:, -1]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_generation_starts_with_what_scoring_finds_likeliest(cached: MLLM, pictures: list[Path | None]) -> None:
    """Training, scoring and generation see the same prompt: the same mask, positions and token types."""
    for one in encode(cached, pictures):
        with torch.no_grad():
            likeliest = int(cached.backbone.model(**cached.collate([one], [()])).logits[0, -1].argmax())
        expected = cached.backbone.tokenizer.decode([likeliest], skip_special_tokens=True).strip()
        assert cached.generate([one], 1) == [expected]


def test_generation_goes_on_as_a_forward_pass_of_all_tokens_would(cached: MLLM, pictures: list[Path | None]) -> None:
    """Without a cache of keys and values, token by token: the naive twin."""
    for one in encode(cached, pictures):
        made: list[int] = []
        for _ in range(3):
            with torch.no_grad():
                made.append(int(cached.backbone.model(**cached.collate([one], [made])).logits[0, -1].argmax()))
            if made[-1] in cached.backbone.end_ids:
                break
        assert cached.generate([one], 3) == [cached.backbone.tokenizer.decode(made, skip_special_tokens=True).strip()]


def test_an_answer_does_not_see_what_follows(cached: MLLM, pictures: list[Path | None]) -> None:
    """Where a prompt attends both ways, its answer must not, or training would copy."""
    for one in encode(cached, pictures):
        answers = [(*one.answer[:1], 50, 60), (*one.answer[:1], 70, 80)]
        first, second = (logits(cached, [replace(one, answer=answer)], last=4)[0] for answer in answers)
        torch.testing.assert_close(first[:2], second[:2], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(first[2:], second[2:], rtol=1e-2)


def test_training_lowers_the_loss(family: tuple[str, Path], pictures: list[Path | None]) -> None:
    model = load(family[1], unsettled=False)
    batch = encode(model, pictures)
    start = model.adapter.get()
    result = train_local(model, Work([[batch]] * 12, start, LocalRule(), 0), ADAMW)
    model.adapter.set(result.trained)
    with torch.no_grad():
        after = model.loss(batch).item()
        model.adapter.set(start)
        before = model.loss(batch).item()
    assert after < 0.9 * before
    assert all(not torch.equal(result.trained[name], start[name]) for name in start)
    assert not any(p.requires_grad for name, p in model.model.named_parameters() if "lora" not in name)


def test_a_prompt_computed_once_scores_its_options_the_same(cached: MLLM, pictures: list[Path | None]) -> None:
    """Options of one to four tokens, of which some begin others."""
    batch = encode(cached, pictures)
    tokens = [token for one in batch for token in one.answer][:2] * 2
    options = [tuple(tokens[:n]) for n in (1, 2, 4)]
    asked = [replace(one, options=tuple(options[i % 2 :])) for i, one in enumerate(batch)]
    together, apart = cached.option_scores(asked), [cached.option_scores([one])[0] for one in asked]
    with torch.no_grad():
        written_out = [_repeated(cached, [one]).log_softmax(-1).tolist() for one in asked]
    for found in (together, apart):
        for scores, expected in zip(found, written_out, strict=True):
            torch.testing.assert_close(torch.tensor(scores), torch.tensor(expected), rtol=1e-3, atol=1e-4)


def test_two_clients_in_one_pass_are_two_clients(family: tuple[str, Path], pictures: list[Path | None]) -> None:
    """One has a sample more, and prompts of other lengths; pictures are in some rows of each."""
    model = load(family[1], unsettled=False)
    batch = encode(model, pictures)
    works = [Work([[[one] for one in part]] * 2, model.adapter.get(), LocalRule(), 0) for part in (batch[:1], batch[1:])]
    for work, result in zip(works, train_cohort(model, works, ADAMW), strict=True):
        alone = train_naively(model, work, ADAMW)
        assert distance(result.trained, alone.trained) < 1e-3 * distance(alone.trained, work.received)
        assert result.metrics["loss"] == pytest.approx(alone.metrics["loss"], rel=1e-4)


# PEFT asks transformers for a property under its older name.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_the_adapter_comes_back_from_its_folder(
    family: tuple[str, Path], cached: MLLM, pictures: list[Path | None], tmp_path: Path
) -> None:
    batch = encode(cached, pictures)
    expected = logits(cached, batch)
    cached.adapter.export(tmp_path, "tiny")
    again = load(family[1], unsettled=False)
    again.adapter.load(tmp_path)
    assert digest(again.adapter.get()) == digest(cached.adapter.get())
    assert torch.equal(logits(again, encode(again, pictures)), expected)
    base = AutoModelForImageTextToText.from_pretrained(family[1], dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        found = loaded(**cached.collate(batch, [one.answer for one in batch])).logits[:, -1:]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_paligemma_is_asked_as_its_processor_asks(paligemma: MLLM, pictures: list[Path | None]) -> None:
    """With a picture, prompt and answer and their token types are those of the processor's own `suffix`."""
    (one,) = paligemma.encode(TALKS[:1], pictures[:1], 300)
    assert pictures[0] is not None
    expected = paligemma.backbone.processor(
        images=Image.open(pictures[0]), text="<image>" + TALKS[0].user, suffix=TALKS[0].answer, return_tensors="pt"
    )
    ours = paligemma.collate([one], [one.answer])
    assert torch.equal(ours["input_ids"], expected["input_ids"])
    assert torch.equal(ours["token_type_ids"], expected["token_type_ids"])
    assert ours["position_ids"][0].tolist() == list(range(1, one.length + 1))


def test_paligemma_is_asked_the_same_without_a_picture(paligemma: MLLM) -> None:
    (one,) = paligemma.encode(TALKS[1:2], [None], 300)
    assert paligemma.backbone.tokenizer.decode(one.prompt) == "<begin>name the color.\n"
    types = paligemma.collate([one], [one.answer])["token_type_ids"][0].tolist()
    assert types == [0] * len(one.prompt) + [1] * len(one.answer)


@pytest.fixture
def paligemma(tmp_path: Path) -> MLLM:
    save("paligemma", tmp_path)
    return load(tmp_path)
