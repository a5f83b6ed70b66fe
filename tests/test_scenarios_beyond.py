"""The scenarios beyond the paper's, and scenarios laid over each other."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from fedmllm.config import validate
from fedmllm.data.dealing import draw
from fedmllm.data.manifest import Manifest
from fedmllm.data.partitions import partitions
from fedmllm.data.samples import Sample
from fedmllm.data.scenarios import BOTH, IMAGE, NONE, TEXT, Scenario, composed, scenarios
from fedmllm.data.summary import PATTERNS, absence, modality_shares, shares_lines
from fedmllm.errors import ConfigError, DataError
from fedmllm.experiment.parts import build, build_scenario
from fedmllm.rng import stream
from helpers import sample

SAMPLES = [replace(sample(f"s{i:04d}"), label=("cat", "dog", "owl")[i % 3]) for i in range(3000)]


def drawn(scenario: Scenario, clients: int = 10, seed: int = 0, samples: list[Sample] = SAMPLES) -> Manifest:
    return draw(samples, partitions.build("iid", {}), scenario, clients, 1, seed)


def shares(manifest: Manifest) -> dict[str, float]:
    return dict(zip(PATTERNS, (manifest.patterns().sum(axis=0) / len(manifest)).tolist(), strict=True))


# graded


def test_graded_gives_every_client_rates_of_its_own_with_the_stated_means() -> None:
    scenario = scenarios.build("graded", {"image": 0.6, "text": 0.2, "concentration": 3.0})
    counts = np.concatenate([drawn(scenario, seed=seed).counts() for seed in range(20)])
    rates = 1 - counts[:, 1:] / counts[:, :1]
    assert len({tuple(row) for row in rates.tolist()}) > 190
    for column, mean in ((0, 0.6), (1, 0.2)):
        variance = mean * (1 - mean) / 4 + mean * (1 - mean) / 300  # of Beta(3m, 3 − 3m), and of about 300 draws by a client
        assert rates[:, column].mean() == pytest.approx(mean, abs=4 * (variance / 200) ** 0.5)
        assert rates[:, column].var() == pytest.approx(variance, rel=0.3)


def test_graded_without_spread_is_missing() -> None:
    graded = drawn(scenarios.build("graded", {"image": 0.4, "text": 0.4, "concentration": 1e12}))
    assert graded == drawn(scenarios.build("missing", {"rate": 0.4}))


@pytest.mark.parametrize("modality", ["image", "text"])
def test_graded_with_a_mean_of_zero_loses_nothing(modality: str) -> None:
    other = {"image": "text", "text": "image"}[modality]
    manifest = drawn(scenarios.build("graded", {modality: 0.0, other: 0.5}))
    assert manifest.counts()[:, 1 + ["image", "text"].index(modality)].sum() == len(SAMPLES)


def test_graded_clients_do_not_depend_on_how_many_follow() -> None:
    rates = [scenarios.build("graded", {}).seen([], number, stream(0, "rates")) for number in (3, 30)]
    for client in range(3):
        few, many = ([seen(sample(), client, stream(i, "test")) for i in range(50)] for seen in rates)
        assert few == many


# label-dependent


def test_what_is_missing_follows_the_class() -> None:
    manifest = drawn(scenarios.build("label-dependent", {"rate": 0.4, "slope": 0.6, "modality": "image"}))
    labels = {s.id: s.label for s in SAMPLES}
    seen, all_of = Counter(labels[h.sample_id] for h in manifest if "image" in h.visible), Counter(labels.values())
    lost = {label: 1 - seen[label] / all_of[label] for label in all_of}
    assert lost == {label: pytest.approx(rate, abs=0.06) for label, rate in (("cat", 0.1), ("dog", 0.4), ("owl", 0.7))}
    assert all("text" in h.visible for h in manifest)


def test_without_a_slope_the_classes_lose_alike() -> None:
    assert drawn(scenarios.build("label-dependent", {"rate": 0.4, "slope": 0.0})) == drawn(
        scenarios.build("missing", {"rate": 0.4})
    )


def test_a_rate_a_class() -> None:
    rates = {"cat": 0.0, "dog": 0.0, "owl": 0.9}
    manifest = drawn(scenarios.build("label-dependent", {"rates": rates, "modality": "text"}))
    found = absence(manifest, SAMPLES)
    assert found is not None
    # Of the third that are owls, 0.9 have no text and are recognised by that; the others look like cats and dogs.
    assert found["accuracy"] == pytest.approx(1 / 3 + 0.9 / 3, abs=0.02)
    assert found["majority"] == pytest.approx(1 / 3)
    shares = modality_shares(manifest, SAMPLES, scenarios.build("label-dependent", {}))
    assert any(line.startswith("which modalities are there predicts the class of 6") for line in shares_lines(shares))


@pytest.mark.parametrize(
    ("options", "labels", "message"),
    [
        ({}, ["", ""], "at least two classes"),
        ({"rates": {"cat": 0.1}}, ["cat", "dog"], r"rates names the classes \['cat'\]"),
        ({"rates": {"cat": 0.1, "dog": 0.1, "owl": 0.1}}, ["cat", "dog"], r"training samples are \['cat', 'dog'\]"),
    ],
)
def test_classes_that_do_not_suit_are_refused(options: dict[str, object], labels: list[str], message: str) -> None:
    samples = [replace(sample(f"s{i}"), label=label) for i, label in enumerate(labels)]
    with pytest.raises(DataError, match=message):
        drawn(scenarios.build("label-dependent", options), 2, samples=samples)


def test_absence_that_says_nothing_and_absence_that_says_all() -> None:
    samples = [replace(sample(f"s{i}"), label="ab"[i % 2]) for i in range(100)]
    none = absence(drawn(scenarios.build("aligned", {}), samples=samples), samples)
    assert none == {"majority": 0.5, "accuracy": 0.5, "information": 0.0}
    rates = {"a": 0.0, "b": 1 - 1e-9}
    everything = absence(drawn(scenarios.build("label-dependent", {"rates": rates}), samples=samples), samples)
    assert everything == {"majority": 0.5, "accuracy": 1.0, "information": 1.0}
    assert absence(drawn(scenarios.build("aligned", {}), samples=samples), [replace(s, label="") for s in samples]) is None


# paired-few


@pytest.mark.parametrize(
    ("options", "both", "image"),
    [({}, 1, 4), ({"paired": 0}, 0, 5), ({"paired": 0.2, "image_clients": 2}, 2, 2), ({"paired": 10}, 10, 0)],
)
def test_a_few_clients_are_paired(options: dict[str, object], both: int, image: int) -> None:
    scenario = scenarios.build("paired-few", options)
    counts = Counter(scenario.clients(10, stream(0, "test")))
    assert (counts[BOTH], counts[IMAGE], counts[TEXT]) == (both, image, 10 - both - image)
    assert scenario.expected is not None
    assert scenario.expected(BOTH, 10) == {BOTH: both / 10, IMAGE: image / 10, TEXT: (10 - both - image) / 10}
    assert len({tuple(scenario.clients(10, stream(seed, "test"))) for seed in range(10)}) > 5 * (0 < both < 10)


@pytest.mark.parametrize("seed", range(5))
def test_without_pairs_it_is_cross(seed: int) -> None:
    none = drawn(scenarios.build("paired-few", {"paired": 0, "image_clients": 3}), seed=seed)
    assert none == drawn(scenarios.build("cross", {"image_clients": 3}), seed=seed)


# Scenarios laid over each other


def table(name: str, *then: dict[str, object], **options: object) -> Scenario:
    raw = {"task": {"name": "shapes-qa"}, "scenario": {"name": name, "then": list(then), **options}}
    return build_scenario(validate(raw).scenario)


def test_missing_over_hybrid_removes_from_what_the_clients_see() -> None:
    hybrid, laid = table("hybrid", presence=0.6), table("hybrid", {"name": "missing", "rate": 0.25}, presence=0.6)
    drawings = [[drawn(scenario, seed=seed) for seed in range(5)] for scenario in (hybrid, laid)]
    before, after = (np.stack([manifest.patterns().sum(axis=0) for manifest in manifests]) for manifests in drawings)
    both, image, text, none = (before.sum(axis=0) / before.sum()).tolist()
    assert none == 0
    expected = (0.5625 * both, 0.75 * image + 0.1875 * both, 0.75 * text + 0.1875 * both, 0.25 * (image + text) + 0.0625 * both)
    assert (after.sum(axis=0) / after.sum()).tolist() == pytest.approx(expected, abs=0.02)
    for manifest, both_laid in zip(*drawings, strict=True):  # who holds what, and what is seen at most, is as in the first
        first = {h.sample_id: h for h in manifest}
        assert all(h.client == first[h.sample_id].client and h.visible <= first[h.sample_id].visible for h in both_laid)


def test_the_expected_shares_of_a_composition() -> None:
    scenario = table("cross", {"name": "missing", "rate": 0.25}, image_clients=4)
    assert scenario.expected is not None
    assert scenario.expected(BOTH, 10) == pytest.approx({IMAGE: 0.3, TEXT: 0.45, NONE: 0.25})
    assert table("cross", {"name": "label-dependent"}).expected is None


def test_aligned_laid_over_changes_nothing_and_nothing_is_the_order() -> None:
    assert drawn(table("hybrid", {"name": "aligned"})) == drawn(table("hybrid"))
    twice = shares(drawn(table("missing", {"name": "missing", "rate": 0.5}, rate=0.5)))
    assert twice["both"] == pytest.approx(1 / 16, abs=0.02)


@pytest.mark.parametrize(
    ("then", "message"),
    [
        ({"name": "missing", "empty": "drop"}, "scenario.then: 'missing' drops samples, which only the first"),
        ({"name": "mising"}, "scenario.then.0.name: there is no scenario 'mising'"),
        ({"name": "missing", "rate": 2.0}, "scenario.then.0: rate = 2.0"),
        ({"name": "missing", "wrong": 2.0}, "scenario.then.0.wrong: unknown key"),
    ],
)
def test_what_cannot_be_laid_over_is_refused(then: dict[str, object], message: str) -> None:
    raw = {"task": {"name": "shapes-qa"}, "scenario": {"name": "hybrid", "then": [then]}}
    with pytest.raises(ConfigError, match="^" + message.replace(".", r"\.")):
        build(validate(raw))


def test_a_scenario_that_decides_what_clients_have_comes_first() -> None:
    with pytest.raises(DataError, match="'cross' decides which modalities clients have, so it must be the first"):
        drawn(composed(scenarios.build("missing", {}), [("cross", scenarios.build("cross", {}))]))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("graded", {"image": 1.0}),
        ("graded", {"text": -0.1}),
        ("graded", {"concentration": 0.0}),
        ("label-dependent", {"rate": 0.1, "slope": 0.4}),
        ("label-dependent", {"rates": {"a": 1.0}}),
        ("label-dependent", {"modality": "sound"}),
        ("paired-few", {"paired": -1}),
        ("paired-few", {"paired": 1.5}),
        ("paired-few", {"image_clients": 1.5}),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"^scenario"):
        scenarios.build(name, options)
