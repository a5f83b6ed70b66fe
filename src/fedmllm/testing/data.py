"""The contracts of scenarios, partitions, prompt strategies and tasks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

from fedmllm.data.loading import read_split, usable_samples
from fedmllm.data.partitions import partitions
from fedmllm.data.prompts import prompts
from fedmllm.data.samples import MODALITIES, Sample
from fedmllm.data.scenarios import scenarios
from fedmllm.data.stored import Samples
from fedmllm.data.tasks import tasks
from fedmllm.rng import stream
from fedmllm.testing.registered import check_registered

SAMPLES_PER_SPLIT = 200
"""How many samples of each split `check_task` reads in full, with their pictures."""
METRICS = ("accuracy", "macro-f1", "auc")


def _samples(count: int) -> list[Sample]:
    """Samples with both modalities, one or none, of three labels and four sources, in the order of their ids."""
    samples = []
    for i in range(count):
        image, text = (b"" if i % 5 in (0, 1, 3) else None), ("a text" if i % 5 in (0, 2, 3) else None)
        samples.append(Sample(f"s{i:03d}", "what is it?", "yes", image, text, label=f"l{i % 3}", source=f"o{i % 4}"))
    return samples


def check_scenario(name: str, **options: Any) -> None:
    """Every client has a modality or tosses a coin, a sample shows no more than it has, and both follow from the generator
    alone; the expected shares are probabilities."""
    check_registered(scenarios, name)
    scenario, part = scenarios.build(name, options), f"scenario {name!r}"
    suited = 0
    for number, seed in product((1, 2, 5, 12), range(5)):
        try:
            clients = list(scenario.clients(number, stream(seed, "clients")))
        except ValueError:  # options such as a count of clients do not suit every number
            continue
        suited += 1
        assert len(clients) == number, f"{part}: {len(clients)} sets of modalities for {number} clients"
        known = all(has <= set(MODALITIES) and (has or scenario.coin_per_sample) for has in clients)
        assert known, f"{part}: a client without a modality"
        again = list(scenario.clients(number, stream(seed, "clients")))
        assert clients == again, f"{part}: `clients` depends on more than its generator"
        seen = scenario.seen(_samples(5), number, stream(seed, "rates"))
        seen_again = scenario.seen(_samples(5), number, stream(seed, "rates"))
        for sample, client in product(_samples(5), range(number)):
            visible = seen(sample, client, stream(seed, sample.id))
            assert visible <= sample.modalities, f"{part}: {sorted(visible)} of a sample with {sorted(sample.modalities)}"
            repeated = seen_again(sample, client, stream(seed, sample.id))
            assert visible == repeated, f"{part}: `visible` depends on more than its arguments"
        for sample in _samples(5) if scenario.expected else []:
            assert scenario.expected is not None
            shares = scenario.expected(sample.modalities, number)
            assert set().union(*shares) <= sample.modalities, f"{part}: expects modalities that a sample lacks"
            bounded = all(share >= 0 for share in shares.values()) and sum(shares.values()) <= 1 + 1e-9
            assert bounded, f"{part}: the expected shares {list(shares.values())} are no probabilities"
    assert suited, f"{part}: no number of clients up to 12 suits its options"


def check_partition(name: str, **options: Any) -> None:
    """Each sample goes to one of the eligible clients, and the generator alone decides to which."""
    check_registered(partitions, name)
    deal, part = partitions.build(name, options), f"partition {name!r}"
    for count, clients, seed in product((1, 7, 60), ((0,), (3, 5), (0, 1, 2, 9, 12, 30)), range(4)):
        samples = _samples(count)
        owners = deal(samples, clients, stream(seed, "partition")).tolist()
        assert len(owners) == count, f"{part}: {len(owners)} owners for {count} samples"
        assert set(owners) <= set(clients), f"{part}: a sample went to a client that may not hold it"
        assert samples == _samples(count), f"{part}: the list of samples was modified"
        again = deal(samples, clients, stream(seed, "partition")).tolist()
        assert owners == again, f"{part}: the deal depends on more than its generator"


def check_prompt(name: str, **options: Any) -> None:
    """The prompt contains the question, and depends on the question and the visible modalities only."""
    check_registered(prompts, name)
    strategy, part = prompts.build(name, options), f"prompt {name!r}"
    subsets = [frozenset(subset) for size in range(3) for subset in combinations(MODALITIES, size)]
    for question, visible in product(("is this hateful?", "which option is right?"), subsets):
        prompt = strategy(question, visible)
        assert question in prompt, f"{part}: the question {question!r} is not in {prompt!r}"
        assert prompt == strategy(question, visible), f"{part}: two calls give different prompts"


def check_task(name: str, **options: Any) -> None:
    """Loading is repeatable, ids are unique, and the first samples of each split can be used.

    The options must lead to data that is there. Pictures are decoded for the first 200 samples of a split.
    """
    check_registered(tasks, name)
    task, part = tasks.build(name, options), f"task {name!r}"
    assert task.metric in METRICS, f"{part}: the metric {task.metric!r} is none of {METRICS}"
    assert task.metric != "auc" or task.positive, f"{part}: AUC needs `positive`, the answer whose probability is the score"
    for split in task.splits:
        ids = [entry.id for entry in task.load(split) if isinstance(entry, Sample)]
        assert ids, f"{part}: the {split} split has no sample"
        assert len(set(ids)) == len(ids), f"{part}: an id is used twice in the {split} split"
        again: list[str] = []

        def choose(samples: Samples, again: list[str] = again) -> Sequence[Sample]:
            again += [sample.id for sample in samples]
            return samples[:SAMPLES_PER_SPLIT]

        samples = usable_samples(read_split(task, split, choose), task, split, "error")
        assert again == sorted(ids), f"{part}: loading the {split} split twice gives different samples"
        if task.metric == "auc":
            assert any(s.answer == task.positive for s in samples), f"{part}: no sample of {split} is {task.positive!r}"
