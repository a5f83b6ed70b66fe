from __future__ import annotations

import hashlib
import random
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmllm.data import manifest as manifests
from fedmllm.data.dealing import draw
from fedmllm.data.manifest import Holding, Manifest
from fedmllm.data.partitions import partitions
from fedmllm.data.samples import Modality, Sample
from fedmllm.data.scenarios import BOTH, IMAGE, NONE, TEXT, Modalities, Scenario, scenarios
from fedmllm.errors import DataError
from helpers import mixed, quick, sample

combinations = pytest.mark.parametrize(("partition", "scenario"), list(product(partitions.names(), scenarios.names())))


def drawn(
    samples: list[Sample], partition: str = "iid", scenario: str = "aligned", clients: int = 4, least: int = 1, seed: int = 0,
    **options: object,
) -> Manifest:  # fmt: skip
    return draw(samples, partitions.build(partition, {}), scenarios.build(scenario, options), clients, least, seed)


@combinations
@quick
@given(count=st.integers(40, 80), clients=st.integers(2, 6), least=st.integers(1, 3), seed=st.integers(0, 20))
def test_every_sample_is_held_once_and_every_client_holds_enough(
    partition: str, scenario: str, count: int, clients: int, least: int, seed: int
) -> None:
    samples = {s.id: s for s in mixed(count)}
    try:
        manifest = drawn(list(samples.values()), partition, scenario, clients, least, seed)
    except DataError:
        assert scenario in ("cross", "hybrid", "paired-few"), (
            "samples that no client may hold exist only if clients lack a modality"
        )
        return
    assert sorted(h.sample_id for h in manifest) == list(samples)
    assert min(manifest.sizes()) >= least
    assert sum(manifest.sizes()) == count
    assert [len(manifest.of_client(c)) for c in range(clients)] == manifest.sizes()
    for holding in manifest:
        modalities = samples[holding.sample_id].modalities
        assert holding.visible <= modalities
        assert holding.visible or not modalities or scenario in ("missing", "graded", "label-dependent")


@combinations
def test_the_manifest_does_not_depend_on_the_order_of_samples(partition: str, scenario: str) -> None:
    # Two samples in five have one modality only, so the seed must give some client images and some client texts.
    expected = drawn(mixed(50), partition, scenario)
    for seed in range(3):
        shuffled = mixed(50)
        random.Random(seed).shuffle(shuffled)
        again = drawn(shuffled, partition, scenario)
        assert again == expected
        assert again.digest() == expected.digest()


def held_by(manifest: Manifest, samples: list[Sample]) -> dict[str, set[int]]:
    """source -> the clients that hold some of it."""
    source, held = {s.id: s.source for s in samples}, dict[str, set[int]]()
    for holding in manifest:
        held.setdefault(source[holding.sample_id], set()).add(holding.client)
    return held


@pytest.mark.parametrize("scenario", ["aligned", "missing", "hybrid"])
@pytest.mark.parametrize("seed", range(5))
def test_a_source_of_mixed_modalities_stays_together(scenario: str, seed: int) -> None:
    samples = mixed(60)
    manifest = drawn(samples, "by-source", scenario, clients=4, seed=seed, least=0)
    assert all(len(clients) == 1 for clients in held_by(manifest, samples).values())


def test_a_source_that_no_client_can_fully_see_is_split_by_modality() -> None:
    samples = mixed(60)
    manifest = drawn(samples, "by-source", "cross", clients=4)
    assert all(len(clients) > 1 for clients in held_by(manifest, samples).values())
    modalities = {s.id: s.modalities for s in samples}
    assert all(holding.visible or not modalities[holding.sample_id] for holding in manifest)


def test_the_manifest_of_a_small_input_is_known() -> None:
    """These literals must not change: every published manifest would change with them."""
    manifest = drawn(mixed(6), "dirichlet", "missing", clients=2, rate=0.3, empty="redraw")
    rows = [(h.sample_id, h.client, "+".join(sorted(h.visible))) for h in manifest]
    assert rows == [
        ("s000", 0, "image"),
        ("s001", 0, "image"),
        ("s002", 0, "text"),
        ("s004", 0, ""),
        ("s005", 0, "image+text"),
        ("s003", 1, "image+text"),
    ]
    assert manifest.digest() == "9fa19342b2968bff32a840e56916e6a06fb75d9512975cea13d5eb18fec40f25"


PUBLISHED = [
    (200, "iid", "aligned", {"clients": 7}, "444e7fc82ac60a9e77f728112237653ca0142270f5c6c11a8021c753831e5083"),
    (200, "dirichlet", "hybrid", {"clients": 9, "least": 5, "seed": 3, "coin": "client"},
     "aa16c9717980493a956465bc714b964c618ba687f5f75c889c327e01ecf3d4e1"),
    (300, "by-source", "missing", {"clients": 11, "least": 2, "seed": 1, "empty": "redraw"},
     "57e5c6f3e61b3f39a52311c48915f23a1ff3c6fc0a826999d04cd7bd9db4ee16"),
    (300, "by-source", "aligned", {"clients": 3}, "f35dd163cf709a4dbb873ba5daf3acab3f6d99d967c2a6c4c8c2c8bcb6c67ef7"),
    (150, "dirichlet", "cross", {"clients": 20, "least": 6, "seed": 2},
     "45c179a837c689c5f79cd1c122555618b721e8718cddd7638d9ba181b2e9b458"),
    (1000, "dirichlet", "hybrid", {"clients": 300, "least": 3, "seed": 6, "coin": "client"},
     "5a91d22313f1ee6b9e438a33a9bad3bc879d6afeb3dd38f19715a65a946559a3"),
    # Drawn when `empty = "redraw"` was `never_empty = true`, "keep" was false, and the only coin was the client's.
    (200, "iid", "missing", {"clients": 7, "seed": 4, "rate": 0.4, "empty": "redraw"},
     "dd6ea887e42a77b8605946a44167f933f3c5f79546b6638f7377907a5a605c43"),
    (200, "iid", "missing", {"clients": 7, "seed": 4, "rate": 0.4, "empty": "keep"},
     "8642c82b427dcd46dbe37392bea4e996d1642df633f3ca6eae30b15f68c49714"),
    (300, "dirichlet", "missing", {"clients": 10, "least": 2, "seed": 1, "rate": 0.5, "never_empty": True},
     "0939c6efabd95744717b31f7aefafea8aecb5a508b5fa1d5402f4d4a79881070"),
    (300, "dirichlet", "missing", {"clients": 10, "least": 2, "seed": 1, "rate": 0.5, "never_empty": False},
     "7b82c92874e4bd1924ed550e4b9d2c777fac1fe1db086da47bbf4af7cc3683a4"),
    (300, "by-source", "missing", {"clients": 3, "seed": 2, "rate": 0.3},
     "5dfcd8a567caff08eec351e81e541f911f92b337347197dec6040a982f147766"),
    (200, "dirichlet", "hybrid", {"clients": 9, "least": 5, "seed": 3, "presence": 0.6, "coin": "client"},
     "d22692fb28d6b3418ce48456885f5768694f4362382b668fa371dd11b966d61b"),
    (240, "iid", "hybrid", {"clients": 12, "seed": 7, "presence": 0.5, "coin": "client"},
     "12a2b67600097ba35c2cfc466fbb6612e09c3129a14b6abc2a36fc7edf903a94"),
    (240, "by-source", "hybrid", {"clients": 20, "presence": 0.7, "coin": "client"},
     "e5c841383503a343b1f6a0f48362889f703e54de510982b9840d0b3cbbfc01d6"),
]  # fmt: skip
"""Digests from earlier implementations: the same settings give the same draw in every version."""


@pytest.mark.parametrize(("count", "partition", "scenario", "options", "digest"), PUBLISHED)
def test_draws_have_their_published_digests(
    count: int, partition: str, scenario: str, options: dict[str, Any], digest: str
) -> None:
    assert drawn(mixed(count), partition, scenario, **options).digest() == digest


def test_ids_enter_the_digest_unchanged() -> None:
    samples = [sample(f"é\t{i}", "text" if i % 2 == 0 else "image", label=str(i * i % 11)) for i in range(500)]
    manifest = drawn(samples, "dirichlet", "hybrid", clients=120, least=3, seed=8, coin="client")
    assert manifest.digest() == "45216051c182e44a33ee6e7506106028abf8188a01546c3f5ef83faa0b23a9fe"


@quick
@given(
    rows=st.lists(st.tuples(st.integers(0, 6), st.sets(st.sampled_from(sorted(BOTH)))), max_size=30), clients=st.integers(7, 9)
)
def test_columns_represent_the_rows(rows: list[tuple[int, set[Modality]]], clients: int) -> None:
    """Compared with a plain list of rows."""
    holdings = [Holding(f"s{i}", client, frozenset(seen)) for i, (client, seen) in enumerate(rows)]
    manifest = Manifest.of(holdings, clients)
    held = [[h for h in holdings if h.client == client] for client in range(clients)]
    assert list(manifest) == [h for own in held for h in own]
    assert len(manifest) == len(holdings)
    assert [manifest.of_client(client) for client in range(clients)] == held
    assert manifest.sizes() == [len(own) for own in held]
    assert manifest.counts().tolist() == [
        [len(own), sum("image" in h.visible for h in own), sum("text" in h.visible for h in own)] for own in held
    ]
    lines = "".join(f"{h.sample_id}\t{h.client}\t{sorted(h.visible)}\n" for h in manifest)
    assert manifest.digest() == hashlib.sha256(lines.encode()).hexdigest()


def test_the_digest_depends_on_seed_partition_and_scenario() -> None:
    drawn_manifests = [
        drawn(mixed(50)),
        drawn(mixed(50), seed=1),
        drawn(mixed(50), "dirichlet"),
        drawn(mixed(50), "iid", "missing"),
    ]
    assert len({m.digest() for m in drawn_manifests}) == 4


def test_samples_go_to_clients_that_can_see_part_of_them() -> None:
    samples = mixed(100)
    manifest = drawn(samples, scenario="cross", clients=4)
    has = [{m for h in manifest.of_client(c) for m in h.visible} for c in range(4)]
    assert sorted(map(sorted, has)) == [["image"], ["image"], ["text"], ["text"]]
    by_id = {s.id: s for s in samples}
    assert all(h.visible == by_id[h.sample_id].modalities & has[h.client] for h in manifest)


IMAGE_LOSS = (0.0, 0.5, 1.0)


def lose_images(sample: Sample, client: int, rng: np.random.Generator) -> Modalities:
    lost = rng.random() < IMAGE_LOSS[client]
    return sample.modalities - {"image"} if lost else sample.modalities


def test_a_scenario_can_have_a_rate_per_client() -> None:
    scenario = Scenario(clients=lambda number, rng: [BOTH] * number, visible=lose_images)
    manifest = draw([sample(f"{i:03d}") for i in range(900)], partitions.build("iid", {}), scenario, 3, 1, 0)
    held, images, texts = manifest.counts().T.tolist()
    assert held == texts == [300, 300, 300]
    assert (images[0], images[2]) == (300, 0)
    assert images[1] / 300 == pytest.approx(0.5, abs=0.1)


def test_dropped_samples_leave_every_client_its_minimum() -> None:
    samples = [sample(f"{i:03d}", label=f"l{i % 3}") for i in range(400)]
    manifest = drawn(samples, "dirichlet", "missing", clients=8, least=20, rate=0.6, empty="drop")
    kept = drawn(samples, "dirichlet", "missing", clients=8, least=20, rate=0.6)
    assert set(manifest.ids.to_pylist()) == {h.sample_id for h in kept if h.visible}
    assert {h.sample_id: h.visible for h in manifest} == {h.sample_id: h.visible for h in kept if h.visible}
    assert min(manifest.sizes()) >= 20
    assert len(manifest) / 400 == pytest.approx(1 - 0.36, abs=0.06)


def test_dropping_too_many_samples_is_a_data_error() -> None:
    with pytest.raises(DataError, match=r"needs 30 samples and there are \d+"):
        drawn([sample(f"{i:02d}") for i in range(40)], "iid", "missing", clients=3, least=10, rate=0.9, empty="drop")


COIN = Scenario(clients=lambda number, rng: [NONE, BOTH, IMAGE], coin_per_sample=True)


def test_a_client_without_modalities_tosses_a_coin_for_every_sample() -> None:
    samples = [sample(f"{i:04d}", ("both", "both", "image", "text", "none")[i % 5]) for i in range(3000)]
    manifest = draw(samples, partitions.build("iid", {}), COIN, 3, 1, 0)
    by_id = {s.id: s.modalities for s in samples}
    seen = {
        kind: Counter(h.visible for h in manifest.of_client(0) if by_id[h.sample_id] == kind) for kind in (BOTH, IMAGE, TEXT)
    }
    assert seen[BOTH].keys() == {IMAGE, TEXT}
    assert seen[BOTH][IMAGE] / seen[BOTH].total() == pytest.approx(0.5, abs=0.08)
    # A sample of one modality shows it; that of a text goes to the first two clients, that of an image to all.
    assert seen[IMAGE].keys() == {IMAGE}
    assert seen[TEXT].keys() == {TEXT}
    assert (seen[IMAGE].total(), seen[TEXT].total()) == (200, 300)


def test_the_coin_of_a_sample_depends_on_nothing_else() -> None:
    samples = [sample(f"{i:03d}") for i in range(60)]
    whole = {h.sample_id: h.visible for h in draw(samples, partitions.build("iid", {}), ALL_COINS, 3, 1, 0)}
    part = {h.sample_id: h.visible for h in draw(samples[::2], partitions.build("dirichlet", {}), ALL_COINS, 5, 1, 0)}
    assert part == {sample_id: whole[sample_id] for sample_id in part}
    assert len(set(whole.values())) == 2


ALL_COINS = Scenario(clients=lambda number, rng: [NONE] * number, coin_per_sample=True)


def test_a_scenario_that_needs_more_clients_is_a_data_error() -> None:
    with pytest.raises(DataError, match=r"^scenario: image_clients = 5 is more than the number of clients, 4; change it or"):
        drawn(mixed(20), scenario="cross", image_clients=5)


def test_more_clients_than_samples_is_a_data_error() -> None:
    with pytest.raises(DataError, match=r"partition\.clients = 4 with min_samples = 1 needs 4 samples and there are 3"):
        drawn(mixed(3))
    with pytest.raises(DataError, match=r"min_samples = 3 needs 12 samples and there are 10"):
        drawn(mixed(10), least=3)


def test_samples_that_no_client_can_see_are_a_data_error() -> None:
    texts = [sample(f"{i}", "text") for i in range(20)]
    for count in (4, 1):
        message = rf"{count} of 4 clients have only image \(client \d is the first\), and the samples have only text"
        with pytest.raises(DataError, match=message):
            drawn(texts, scenario="cross", image_clients=count)
    with pytest.raises(DataError, match="10 samples have only text, which no client has"):
        drawn([*texts[:10], *(sample(f"p{i}") for i in range(10))], scenario="cross", image_clients=4)


def test_the_work_does_not_grow_with_samples_times_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = 0

    def counted(_: Sample) -> frozenset[str]:
        nonlocal reads
        reads += 1
        return BOTH

    monkeypatch.setattr(Sample, "modalities", property(counted))
    drawn([sample(f"{i}") for i in range(100)], scenario="hybrid", clients=50)
    assert reads <= 10 * 100


# The file


@quick
@given(count=st.integers(4, 30), seed=st.integers(0, 5))
def test_a_written_manifest_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, count: int, seed: int) -> None:
    manifest = drawn(mixed(count), scenario="missing", seed=seed)
    path = tmp_path_factory.mktemp("manifest") / "m.parquet"
    manifest.write(path)
    assert manifests.read(path) == manifest


def test_the_same_manifest_is_the_same_file_with_the_published_columns(tmp_path: Path) -> None:
    for name in "ab":
        drawn(mixed(20)).write(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert pq.read_table(tmp_path / "a").schema.names == ["sample_id", "client", "has_image", "has_text"]


def test_a_changed_manifest_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    drawn(mixed(20)).write(path)
    table = pq.read_table(path)
    moved = table.set_column(1, "client", pa.array([0] * 20, pa.int32()))
    pq.write_table(moved, path)
    with pytest.raises(DataError, match="do not match its digest"):
        manifests.read(path)


def test_missing_or_unsorted_rows_are_detected(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    drawn(mixed(20)).write(path)
    table = pq.read_table(path)
    pq.write_table(table.take(list(range(19, -1, -1))), tmp_path / "backwards")
    pq.write_table(table.set_column(2, "has_image", pa.array([None] * 20, pa.bool_())), tmp_path / "nothing")
    for name in ("backwards", "nothing"):
        with pytest.raises(DataError, match="do not match its digest"):
            manifests.read(tmp_path / name)


@pytest.mark.parametrize("metadata", [{}, {"clients": "2"}, {"digest": "d"}])
def test_a_table_without_metadata_is_not_a_manifest(tmp_path: Path, metadata: dict[str, str]) -> None:
    pq.write_table(manifests.SCHEMA.empty_table().replace_schema_metadata(metadata), tmp_path / "m.parquet")
    with pytest.raises(DataError, match="is not a manifest; its columns must be sample_id, client, has_image, has_text"):
        manifests.read(tmp_path / "m.parquet")


@pytest.mark.parametrize("clients", [-1, 0, 3, 2**31])
def test_a_number_of_clients_that_its_rows_contradict_is_refused(tmp_path: Path, clients: int) -> None:
    path = tmp_path / "m.parquet"
    manifest = Manifest.of([Holding("a", 0, BOTH), Holding("b", 3, BOTH)], 5)
    manifest.write(path)
    metadata = {"clients": str(clients), "digest": manifest.digest()}
    pq.write_table(pq.read_table(path).replace_schema_metadata(metadata), path)
    with pytest.raises(DataError, match="do not match its digest"):
        manifests.read(path)


def test_other_files_are_not_manifests(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other")
    for name, message in (("nowhere", "cannot be read"), ("text", "cannot be read"), ("other", "is not a manifest")):
        with pytest.raises(DataError, match=f"{name}: {message}"):
            manifests.read(tmp_path / name)


def test_pooled_puts_everything_on_one_client() -> None:
    pooled = manifests.pooled([sample("b"), sample("a", "text"), sample("c")])
    assert pooled.clients == 1
    assert list(pooled) == [Holding("a", 0, frozenset(("text",))), Holding("b", 0, BOTH), Holding("c", 0, BOTH)]
