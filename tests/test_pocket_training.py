"""The recipe of the pocket model: batches, losses and checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from fedmllm.data.prompts import Conversation
from recipes.pocket import architecture, batches, losses, pretrain
from recipes.pocket.recipe import Recipe
from recipes.pocket.scenes import COLORS
from recipes.pocket.wording import LETTERS

SMALL = Recipe(
    vision_steps=2,
    vision_rows=4,
    match_steps=2,
    match_rows=3,
    listing_steps=1,
    answer_steps=2,
    presence_steps=1,
    more_pictures=4,
    rows=3,
    kept_matches=2,
    questions=2,
    save_every=2,
)
"""Steps 0 and 1 are of the vision stage, 2 and 3 of matching, 4 and 5 of answers, 6 of presence."""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return architecture.build_tokenizer(documents=40, vocabulary=400)


@pytest.fixture(scope="module")
def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer in whose vocabulary the names of colours and shapes are tokens."""
    return architecture.build_tokenizer(documents=200)


def test_blocks_are_the_prompts_that_users_send(tokenizer: PreTrainedTokenizerFast) -> None:
    """Blocks of packed rows have the loss of the same conversations alone, written by the chat template."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = architecture.build_model(architecture.build_config(tokenizer, num_hidden_layers=2)).eval()
    recipe = replace(SMALL, rows=6, text_share=0.6, row_tokens=1000, kept_matches=0)
    rows = [batches.draw_row(recipe, 5, number) for number in range(6)]
    # Pictures, texts that questions share, and questions alone.
    assert {(scene is not None, bool(text)) for scene, text, _ in rows} == {(True, False), (False, True), (False, False)}
    batch = batches.make_batch(tokenizer, recipe, 5)
    packed = losses.text_losses(model, losses.Heads(160), batch).answers.item()
    processor = architecture.build_processor(tokenizer)
    total, count = 0.0, 0
    for scene, text, question, answer in ((scene, text, *pair) for scene, text, pairs in rows for pair in pairs):
        length = len(tokenizer(f" {answer}{architecture.END}", add_special_tokens=False)["input_ids"])
        messages = Conversation(f"{text}\n{question}" if text else question, answer, scene is not None).messages()
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        inputs = processor(
            text=[f"{prompt} {answer}{architecture.END}"],
            images=[[scene.image]] if scene is not None else None,
            return_tensors="pt",
            add_special_tokens=False,
        )
        ids = inputs["input_ids"]
        labels = torch.where(torch.arange(ids.shape[1]) >= ids.shape[1] - length, ids, -100)
        total += model(**inputs, labels=labels).loss.item() * length
        count += length
    assert packed == pytest.approx(total / count, rel=1e-4)


def test_an_interrupted_run_resumes_to_the_same_weights(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    config = architecture.build_config(tokenizer, **small, num_hidden_layers=3, num_key_value_heads=2)
    for key, value in {**small, "num_hidden_layers": 1}.items():
        setattr(config.vision_config, key, value)
    monkeypatch.setattr(architecture, "build_tokenizer", lambda seed: tokenizer)
    monkeypatch.setattr(architecture, "build_config", lambda tokenizer: config)
    pretrain.pretrain(SMALL, tmp_path / "whole")
    step_loss, interrupted = pretrain.step_loss, False

    def interrupt_once(*arguments: object) -> object:
        nonlocal interrupted
        if arguments[-1] == 4 and not interrupted:
            interrupted = True
            raise KeyboardInterrupt
        return step_loss(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(pretrain, "step_loss", interrupt_once)
    with pytest.raises(KeyboardInterrupt):
        pretrain.pretrain(SMALL, tmp_path / "cut")
    pretrain.pretrain(SMALL, tmp_path / "cut")
    files = [(tmp_path / name / "pocket" / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert files[0] == files[1]
    with pytest.raises(ValueError, match="another recipe"):
        pretrain.pretrain(replace(SMALL, warmup=1), tmp_path / "cut")


def test_a_match_row_contains_what_its_labels_ask_for(word_tokenizer: PreTrainedTokenizerFast) -> None:
    """The letter to predict occurs in the tokens that the position may attend to."""
    recipe = replace(SMALL, match_rows=8)
    for step in (2, 3):  # lettered words only; then multiple-choice questions in half the rows
        batch = batches.make_batch(word_tokenizer, recipe, step)
        assert batch.pixels.numel() == 0
        assert batch.ids.shape[1] % 32 == 0
        for ids, labels, mask in zip(batch.ids, batch.labels, batch.mask[:, 0], strict=True):
            for at in (labels != -100).nonzero()[:, 0].tolist():
                assert labels[at] == ids[at]
                token = word_tokenizer.decode(ids[at])
                if token != architecture.END and len(token) == 1 and token in LETTERS:
                    assert token in word_tokenizer.decode(ids[mask[at - 1].nonzero()[:, 0]])


def test_look_back_loss_rewards_attention_to_earlier_occurrences(tokenizer: PreTrainedTokenizerFast) -> None:
    """It is 0 if all attention goes to them and grows as it goes elsewhere. Other blocks do not count."""
    batch = batches.make_batch(tokenizer, replace(SMALL, match_rows=2), 2)
    image = int(tokenizer.convert_tokens_to_ids(architecture.IMAGE))
    length = batch.ids.shape[1]
    same = (batch.ids[:, :, None] == batch.ids[:, None, :]) & batch.mask[:, 0] & ~torch.eye(length, dtype=torch.bool)
    best = torch.where(same.any(-1, keepdim=True), same / same.sum(-1, keepdim=True).clamp(min=1), 1.0 / length)
    uniform = batch.mask[:, 0] / batch.mask[:, 0].sum(-1, keepdim=True).clamp(min=1)
    lowest, higher = (
        float(losses.look_back_loss(attention.unsqueeze(1).expand(-1, 5, -1, -1), batch, image))
        for attention in (best, uniform)
    )
    assert abs(lowest) < 2e-4
    assert higher > 1


def test_look_at_picture_loss_rewards_attention_to_what_a_token_names(word_tokenizer: PreTrainedTokenizerFast) -> None:
    """Targets: the cells with that colour or shape, or the first token if the picture has none. Other tokens do not count."""
    batch = batches.make_batch(word_tokenizer, replace(SMALL, rows=12, text_share=0.3, questions=4), 4)
    is_image = batch.ids == word_tokenizer.convert_tokens_to_ids(architecture.IMAGE)
    has_things = batch.shown.any(0).any(-1)  # not a word alone
    assert (has_things <= is_image.any(-1)).all()
    assert has_things.any()
    assert not batch.shown[:, ~is_image].any()
    colors = {f" {name}": number for number, name in enumerate(COLORS, 1)}
    best = torch.zeros(*batch.mask.shape[:1], 2, *batch.mask.shape[2:])
    counts = {"present": 0, "absent": 0}
    for row in range(len(batch.ids)):
        for at, token in enumerate(batch.ids[row].tolist()):
            number = colors.get(word_tokenizer.decode([token]), 0)
            assert int(batch.named[0, row, at]) == number
            targets = (batch.shown[0, row] == number).nonzero()[:, 0] if number and has_things[row] else []
            best[row, 0, at, targets if len(targets) else 0] = 1.0 / max(1, len(targets))
            counts["present" if len(targets) else "absent"] += bool(number) and bool(has_things[row])
    assert min(counts.values()) > 0
    assert batch.named[1].any()
    best[:, 1] = ((batch.named[1][:, :, None] == batch.shown[1][:, None, :]) & (batch.named[1] > 0)[:, :, None]).float()
    best[:, 1, :, 0] += best[:, 1].sum(-1) == 0
    best[:, 1] /= best[:, 1].sum(-1, keepdim=True)
    uniform = batch.mask.float().expand(-1, 2, -1, -1) / batch.mask.float().sum(-1, keepdim=True)
    assert abs(float(losses.look_at_picture_loss(best, batch))) < 2e-4
    assert float(losses.look_at_picture_loss(uniform, batch)) > 1


def test_tokens_before_are_within_what_a_block_sees(tokenizer: PreTrainedTokenizerFast) -> None:
    """States that contain the preceding visible tokens have a loss near 0, so no target is in another block."""
    batch = batches.make_batch(tokenizer, replace(SMALL, match_rows=4), 3)
    size = len(tokenizer)
    heads = losses.TokensBefore(3 * size)
    states = torch.zeros(*batch.ids.shape, 3 * size)
    for row, (ids, positions, mask) in enumerate(zip(batch.ids, batch.positions, batch.mask[:, 0], strict=True)):
        for at in range(len(ids)):
            seen = {int(positions[j]): int(ids[j]) for j in mask[at].nonzero()[:, 0].tolist()}
            for places in (1, 2, 3):
                if (token := seen.get(int(positions[at]) - places)) is not None:
                    states[row, at, (places - 1) * size + token] = 1.0
    heads.readings = torch.nn.ModuleList(torch.nn.Linear(3 * size, size, bias=False) for _ in range(3))
    for places, reading in enumerate(heads.readings):
        with torch.no_grad():
            reading.weight.zero_()
            reading.weight[:, places * size : (places + 1) * size] = torch.eye(size)
    assert float(heads.loss(states, batch, torch.eye(size)).detach()) < 0.05
