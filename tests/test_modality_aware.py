"""Averaging each block of the adapter over the clients that have samples of its modality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmllm.algorithms import AdapterInfo, RoundInfo, Update
from fedmllm.algorithms.screening import screen
from fedmllm.algorithms.traffic import traffic_of
from fedmllm.config import validate
from fedmllm.errors import ConfigError
from fedmllm.experiment.compatibility import check_adapter
from fedmllm.experiment.parts import build
from fedmllm.models.families import part_of
from fedmllm.tensors import Tensors, bytes_by_group
from helpers import ADAPTER_INFO, a_round, built, lora_adapter, quick, round_info, rounds_of, same, tensors

START = tensors(text=[1.0, 2.0], vision=[[3.0]], connector=[4.0])
BLOCKS = AdapterInfo(modality={"vision": "image", "connector": "image"})


def info_of(adapter: AdapterInfo = BLOCKS) -> RoundInfo:
    return replace(round_info(sampled=range(5)), adapter=adapter)


def sent(client: int, change: float, examples: int, image: float) -> Update:
    adapter = {name: tensor + change for name, tensor in START.items()}
    return Update(client, {"adapter": adapter, "shows": {"image": torch.tensor([image])}}, examples, 1)


def after(updates: Sequence[Update], **options: Any) -> Tensors:
    return built("modality-aware", **options).aggregate({"adapter": START}, updates, info_of())["adapter"]


def naive(updates: Sequence[Update], modality: Mapping[str, str], start: Tensors) -> Tensors:
    """Σ n_k s_k w_k / Σ n_k s_k of one tensor after the other, in the given precision, s_k = 1 where all samples pass."""
    result: Tensors = {}
    for name, old in start.items():
        total, weight = torch.zeros_like(old, dtype=torch.float64), 0.0
        for u in updates:
            share = float(u.groups["shows"][modality[name]]) if name in modality else 1.0
            total += u.examples * share * u.groups["adapter"][name].double()
            weight += u.examples * share
        result[name] = (total / weight).float() if weight else old
    return result


def test_by_hand() -> None:
    """6 samples of which 3 have pictures, 2 of which both do, and 8 without: text by 6, 2 and 8, pictures by 3 and 2."""
    result = after([sent(0, 1.0, 6, 0.5), sent(1, -1.0, 2, 1.0), sent(2, 2.0, 8, 0.0)])
    text, pictures = (6 - 2 + 16) / 16, (3 - 2) / 5
    assert result["text"].tolist() == pytest.approx([1 + text, 2 + text])
    assert result["vision"].tolist() == [pytest.approx([3 + pictures])]
    assert result["connector"].tolist() == pytest.approx([4 + pictures])
    half = after([sent(0, 1.0, 6, 0.5), sent(1, -1.0, 2, 1.0), sent(2, 2.0, 8, 0.0)], server_lr=0.5)
    assert half["vision"].tolist() == [pytest.approx([3 + pictures / 2])]


def test_a_block_that_nobody_trained_keeps_its_value_bit_for_bit() -> None:
    result = after([sent(0, 1.0, 6, 0.0), sent(1, -3.0, 2, 0.0)])
    assert result["vision"].equal(START["vision"])
    assert result["connector"].equal(START["connector"])
    assert result["text"].tolist() == pytest.approx([1.0, 2.0])  # 6 · 1 − 2 · 3 = 0
    one = after([sent(0, 1.0, 6, 0.0), sent(1, -3.0, 2, 0.25)])
    assert one["vision"].tolist() == [pytest.approx([0.0])], "a client whose samples lack pictures does not dilute it"


@quick
@given(
    st.lists(
        st.tuples(st.floats(-3, 3, width=32), st.integers(1, 10**6), st.sampled_from([0.0, 0.25, 0.5, 1.0])),
        min_size=1,
        max_size=5,
    )
)
def test_it_is_the_naive_mean(clients: list[tuple[float, int, float]]) -> None:
    updates = [sent(client, *values) for client, values in enumerate(clients)]
    result, expected = after(updates), naive(updates, BLOCKS.modality, START)
    for name, tensor in expected.items():
        torch.testing.assert_close(result[name], tensor, rtol=1e-5, atol=1e-5)


@quick
@given(st.lists(st.tuples(st.floats(-3, 3, width=32), st.integers(1, 10**6)), min_size=1, max_size=5), st.floats(0.1, 2.0))
def test_where_all_samples_show_everything_it_is_fedavg_bit_for_bit(clients: list[tuple[float, int]], lr: float) -> None:
    updates = [sent(client, change, examples, 1.0) for client, (change, examples) in enumerate(clients)]
    expected = built("fedavg", server_lr=lr).aggregate({"adapter": START}, updates, info_of())
    assert same({"adapter": after(updates, server_lr=lr)}, expected)


def test_without_blocks_of_a_modality_it_is_fedavg_and_sends_no_shares() -> None:
    aware, plain, info = built("modality-aware"), built("fedavg"), info_of(replace(ADAPTER_INFO, modality={}))
    start = lora_adapter()
    updates = a_round(aware, aware.init(start), {}, replace(info, sampled=(0, 1, 3)))
    assert all(update.groups.keys() == {"adapter"} for update in updates)
    assert same(aware.aggregate({"adapter": start}, updates, info), plain.aggregate({"adapter": start}, updates, info))


def test_rounds_follow_the_naive_mean() -> None:
    """All, three quarters and none of the samples of toy clients 0, 1 and 3 have pictures; half of client 0's have texts."""
    for before, updates, result, info in rounds_of(built("modality-aware")):
        assert [float(u.groups["shows"]["image"]) for u in updates] == [1.0, 0.75, 0.0]
        assert [float(u.groups["shows"]["text"]) for u in updates] == [0.5, 0.0, 0.0]
        expected = naive(updates, info.adapter.modality, before["adapter"])
        for name, tensor in expected.items():
            torch.testing.assert_close(result["adapter"][name], tensor, rtol=1e-5, atol=1e-6)


def test_the_shares_travel_up_as_one_number_each() -> None:
    assert traffic_of(built("modality-aware")) == {"down": ["adapter"], "up": ["adapter", "shows"]}
    (_, (update, *_), _, _), *_ = rounds_of(built("modality-aware"))
    assert bytes_by_group(update.groups)["shows"] == 2 * 4


@pytest.mark.parametrize(
    ("share", "why"),
    [(1.5, "not between 0 and 1"), (-0.25, "not between 0 and 1"), (float("nan"), "NaN"), (float("inf"), "infinity")],
)
def test_a_share_that_cannot_be_is_refused(share: float, why: str) -> None:
    algorithm = built("modality-aware")
    valid, refused = screen([sent(0, 1.0, 5, 0.5), sent(1, 1.0, 5, share)], algorithm, {"adapter": START}, info_of())
    assert [update.client for update in valid] == [0]
    assert why in str(refused[0]["why"])


def test_a_client_cannot_weigh_more_than_the_samples_that_it_declared() -> None:
    algorithm, lie = built("modality-aware"), sent(1, 1.0, 50, 1.0)
    refused = screen([sent(0, 1.0, 5, 0.5), lie], algorithm, {"adapter": START}, info_of(), declared=[5, 5, 5, 5, 5])[1]
    assert "trained on 50 samples, and has 5 in a round" in str(refused[0]["why"])


# What is combined


@pytest.mark.parametrize(
    ("tables", "why"),
    [
        ({"secure": {"name": "pairwise"}}, "'modality-aware' works on single updates"),
        ({"robust": {"name": "median"}}, "'modality-aware' works on single updates"),
        ({"privacy": {"name": "user-level", "noise": 1.0, "delta": 1e-3}}, "uses more of the updates than the mean"),
        (
            {"asynchronous": {"name": "fedbuff", "buffer": 2}, "clients": {"profile": ["phone"]}},
            "'modality-aware' does more than average them",
        ),
        ({"clients": {"rank": [2, 4]}}, "'modality-aware' cannot average adapters of ranks"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_needs_the_mean_alone_is_refused(tables: dict[str, dict[str, object]], why: str) -> None:
    base: dict[str, Any] = {"task": {"name": "pocket-memes"}, "model": {"name": "pocket"}, "train": {"clients_per_round": 4}}
    with pytest.raises(ConfigError, match=why):
        build(validate({**base, "algorithm": {"name": "modality-aware"}, **tables}))


def test_an_adapter_of_the_text_model_alone_is_refused() -> None:
    config = validate({"task": {"name": "easy-vqa"}, "algorithm": {"name": "modality-aware"}})
    with pytest.raises(ConfigError, match=r'what only pictures pass through .* adapts nothing there; .* or choose "fedavg"'):
        check_adapter(config, built("modality-aware"), lora_adapter(), AdapterInfo())
    check_adapter(config, built("modality-aware"), lora_adapter(), BLOCKS)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("base_model.model.model.text_model.layers.0.self_attn.q_proj.lora_A.weight", "text"),
        ("base_model.model.model.language_model.model.layers.3.mlp.down_proj.lora_B.weight", "text"),
        ("base_model.model.lm_head.lora_A.weight", "text"),
        ("prompt_embeddings", "text"),
        ("base_model.model.model.vision_model.encoder.layers.0.self_attn.q_proj.lora_A.weight", "vision"),
        ("base_model.model.model.connector.modality_projection.proj.lora_A.weight", "projector"),
        ("base_model.model.model.visual.blocks.1.attn.qkv.lora_B.weight", "vision"),
        ("base_model.model.model.visual.merger.mlp.0.lora_A.weight", "projector"),
        ("base_model.model.model.visual.deepstack_merger_list.1.linear_fc1.weight", "projector"),
        ("base_model.model.model.vision_tower.vit_merger.linear_1.lora_A.weight", "vision"),
        ("base_model.model.model.merger.mlp.0.linear_1.fold_A", "projector"),
        ("base_model.model.model.multi_modal_projector.linear_1.lora_A.weight", "projector"),
    ],
)
def test_the_part_of_a_model_that_a_tensor_belongs_to(name: str, expected: str) -> None:
    assert part_of(name) == expected
