"""The attacks of benchmarks/leakage.py: their figures, and that they find what an update certainly tells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from fedmllm.data.prompts import Conversation
from fedmllm.models.mllm import MLLM
from fedmllm.rng import stream
from leaks.membership import Candidates
from leaks.pictures import Prior, gradients, mismatch, psnr
from leaks.reading import Imitation, Reader, recovered
from leaks.statistics import auc_and_tpr, ceiling, epsilon, interval
from leaks.victim import Victim, noisy_sum, train_table


@pytest.fixture
def victim(model: MLLM, dataset: Path) -> Victim:
    """Eight samples, and an adapter whose B is not 0."""
    names = ["red", "blue", "green", "red"] * 2
    talks = [Conversation(f"question {i}, name the {n} color.", n, image=i % 3 != 2) for i, n in enumerate(names)]
    images = [dataset / f"{name}.png" for name in names]
    victim = Victim(model, model.encode(talks, images, 200), images)
    victim.initial = 0.1 * torch.from_numpy(stream(0, "adapter").standard_normal(len(victim.initial), dtype=np.float32))
    return victim


@pytest.mark.parametrize(
    ("members", "auc", "tpr"),
    [
        ([200.0], 1.0, 1.0),  # above all 99 outsiders, which are 0, 1, …, 98
        ([98.0], 0.994949, 0.0),  # a tie counts half for the AUC, and against the attacker
        ([97.5], 0.989899, 0.0),
        ([-1.0], 0.0, 0.0),
        ([49.0], 0.5, 0.0),
        ([200.0, -1.0], 0.5, 0.5),
        ([200.0, 99.0, 97.5, 49.0], 0.872475, 0.5),
    ],
)
def test_auc_and_tpr(members: list[float], auc: float, tpr: float) -> None:
    assert auc_and_tpr(np.array(members), np.arange(99.0)) == (pytest.approx(auc, abs=1e-6), tpr)


def test_scores_that_say_nothing_find_one_member_in_a_hundred() -> None:
    rng = stream(0, "null")
    figures = [auc_and_tpr(rng.standard_normal(100), rng.standard_normal(99)) for _ in range(400)]
    auc, tpr = np.mean(figures, axis=0)
    assert auc == pytest.approx(0.5, abs=0.01)
    assert tpr == pytest.approx(0.01, abs=0.003)


def test_interval_is_students() -> None:
    assert interval([0.2, 0.4, 0.6]) == "0.40 [0.00, 0.90]"  # 4.303 · 0.2 / √3 = 0.497
    assert interval([1.0, 1.0]) == "1.00 [1.00, 1.00]"


def test_guarantees() -> None:
    # At z = 1 and ε = 1, δ = Φ(−0.5) − e Φ(−1.5) = 0.308538 − 0.181601 = 0.126937.
    assert epsilon(1.0, 0.1269367) == pytest.approx(1.0, abs=1e-5)
    assert epsilon(3.0) < epsilon(1.0) < epsilon(0.3)
    assert ceiling(1.0) == (pytest.approx(0.92135, abs=1e-5), pytest.approx(0.37208, abs=1e-5))
    assert ceiling(1e6) == (pytest.approx(0.5, abs=1e-5), pytest.approx(0.01, abs=1e-5))
    assert ceiling(0.0) == (1.0, 1.0)


def test_noisy_sum_clips_and_has_the_stated_noise() -> None:
    updates = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    assert noisy_sum(updates, 1.0, 0.0, stream(0, "noise")).tolist() == pytest.approx([0.9, 1.2])
    n = 20_000
    noise = noisy_sum(torch.zeros(2, n), 0.5, 3.0, stream(0, "noise")).double()
    assert chi2.cdf(float((noise**2).sum()) / 1.5**2, n) == pytest.approx(0.5, abs=0.49)


def test_update_of_one_sample_is_its_own_direction(victim: Victim) -> None:
    candidates = Candidates(victim, victim.initial, victim.samples)
    update = victim.updates(victim.initial, [victim.samples[2:3]], train_table("sgd"))[0]
    scores = candidates.scores(update, 1, np.arange(8), with_loss=True)
    assert scores["match"][2] == pytest.approx(1.0, abs=1e-4)
    assert {name: int(values.argmax()) for name, values in scores.items() if name != "loss"} == {"match": 2, "joint": 2}
    assert scores["loss"][2] > 0


def test_joint_matching_finds_all_members_of_a_sum(victim: Victim) -> None:
    candidates = Candidates(victim, victim.initial, victim.samples)
    members = [1, 4, 6]
    joint = candidates.scores(candidates.directions[members].sum(0), 1, np.arange(8), with_loss=False)["joint"]
    assert set(np.argsort(joint)[-3:].tolist()) == set(members)


def test_gradients_are_those_of_single_samples(victim: Victim) -> None:
    together = victim.gradients(victim.initial, victim.samples[:3], chunk=2)
    for i in range(3):
        alone = victim.gradients(victim.initial, victim.samples[i : i + 1])[0]
        torch.testing.assert_close(together[i], alone, rtol=1e-4, atol=1e-6)


def test_first_layer_spans_the_inputs_of_a_short_sample(victim: Victim) -> None:
    reader = Reader(victim)
    sample = victim.samples[2]  # without a picture
    update = -victim.gradients(victim.initial, [sample])[0]
    # Rank 2 leaves 6 directions, less than the sample's distinct tokens; what they hold is a mixture of these tokens alone.
    closeness = reader.closeness(update)
    inside = closeness[sorted(reader.secret(sample))].mean()
    assert inside > closeness[[i for i in range(len(closeness)) if i not in sample.prompt]].mean()
    assert len(reader.by_span(update, 3)) == 3
    without = reader.closeness(torch.zeros_like(update))
    assert bool(without.isnan().all())
    assert reader.by_span(torch.zeros_like(update), 3) == frozenset()


WITH_PICTURE = [0, 1, 6]
"""Samples with different pictures."""


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_updates_match_with_the_true_picture_and_with_no_other(victim: Victim, optimizer: str) -> None:
    samples = [victim.samples[i] for i in WITH_PICTURE]
    updates = victim.updates(victim.initial, [[sample] for sample in samples], train_table(optimizer))
    true = victim.features(WITH_PICTURE)
    distance, wrong = (
        mismatch(gradients(victim, victim.initial, samples, features).detach(), updates, optimizer)
        for features in (true, true.roll(1, 0))
    )
    # A smooth sign is not the sign, so the true picture's distance is small, but not 0.
    assert float(distance.max()) < (1e-5 if optimizer == "sgd" else 0.2)
    assert float(wrong.min()) > 0.5


def test_gradients_of_given_features_can_be_differentiated(victim: Victim) -> None:
    samples = [victim.samples[i] for i in WITH_PICTURE]
    features = victim.features(WITH_PICTURE).requires_grad_()
    together = gradients(victim, victim.initial, samples, features)
    torch.testing.assert_close(together.detach(), victim.gradients(victim.initial, samples), rtol=1e-3, atol=1e-6)
    direction = torch.from_numpy(stream(0, "direction").standard_normal(tuple(features.shape), dtype=np.float32))
    (slope,) = torch.autograd.grad((together**2).sum(), features)
    step = 1e-2 * direction
    ahead, behind = (
        float((gradients(victim, victim.initial, samples, features.detach() + s).detach() ** 2).sum()) for s in (step, -step)
    )
    assert float((slope * step).sum()) == pytest.approx((ahead - behind) / 2, rel=0.05)


def test_a_client_is_imitated_best_by_its_own_sample(victim: Victim) -> None:
    imitation = Imitation(victim, victim.initial, WITH_PICTURE, train_table())
    update = victim.updates(victim.initial, [[victim.samples[1]]], train_table())[0]
    assert imitation.copy(update) is victim.samples[1]
    true = victim.features(WITH_PICTURE) - imitation.mean
    predicted = torch.nn.functional.cosine_similarity(imitation.picture(update).unsqueeze(0), true)
    assert int(predicted.argmax()) == 1


def test_prior_knows_its_own_pictures() -> None:
    rng = stream(0, "prior")
    features = torch.from_numpy(rng.standard_normal((6, 40), dtype=np.float32))
    pixels = torch.from_numpy(rng.random((6, 12), dtype=np.float32))
    prior = Prior(features, pixels, components=5)
    torch.testing.assert_close((prior.basis**2).sum(0), features.var(0, correction=0))
    assert bool((psnr(prior.pixels(features), pixels) > 35).all())
    torch.testing.assert_close(prior.pixels(prior.mean.unsqueeze(0))[0], pixels.mean(0))
    # A mean squared error of 0.01 is 20 dB.
    assert float(psnr(torch.zeros(1, 12), torch.full((1, 12), 0.1))) == pytest.approx(20.0, abs=1e-4)


def test_share_of_recovered_tokens() -> None:
    assert recovered(frozenset({1, 2, 9}), frozenset({1, 2, 3, 4})) == 0.5
    assert recovered(frozenset(), frozenset({1})) == 0.0
