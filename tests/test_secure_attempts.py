"""Second attempts at a round whose sum may be known already: two sums over different clients would differ by an update."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from fedmllm.algorithms import Update, algorithms
from fedmllm.federation import TooFewUpdates
from fedmllm.secure.attempts import Attempts
from fedmllm.secure.clients import SecureClients
from fedmllm.secure.fleet import LocalTransport, SecureFleet
from fedmllm.secure.settings import Phase
from helpers import lora_adapter, round_info
from secure_rounds import RUN, Clients, MaliciousServer, RecordingTransport, dropping, settings

CLIENTS = 5
Drops = Mapping[int, Phase]
LAST: dict[int, Phase] = {2: "unmask", 3: "unmask", 4: "unmask"}


class Site:
    """Five sites that remember attempts in `folder`, and a server that follows the protocol."""

    def __init__(self, folder: Path | None) -> None:
        self.folder, self.trained = folder, 0

    def attempt(self, drops: Drops, run: str = RUN, experiment: str = "a", round: int = 0) -> tuple[set[int], list[Update]]:
        """The clients in the sum and the updates. All processes are new, as after a restart. Raises TooFewUpdates."""
        algorithm = algorithms.build("fedavg", {})
        clients = Clients(algorithm)
        local = LocalTransport(settings(), algorithm, clients, run)
        local._clients = SecureClients(settings(), algorithm, Attempts(self.folder, experiment) if self.folder else None)
        transport = RecordingTransport(local, dropping(drops))
        fleet = SecureFleet(settings(), algorithm, clients, transport, run)
        info = round_info(round, range(CLIENTS), clients=CLIENTS)
        state = algorithm.init(lora_adapter())
        try:
            updates = fleet.train(info, {client: algorithm.message(state, client, info) for client in info.sampled})
        finally:
            self.trained = sum(len(messages) for _, messages in clients.seen)
        return {update.client for update in updates if not update.problem}, list(updates)


ALL, FOUR = {0, 1, 2, 3, 4}, {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("first", "second", "summed"),
    [
        ({}, {}, ALL),
        ({4: "unmask"}, {}, ALL),  # it went away after its vector was in the sum
        ({4: "masked"}, {4: "keys"}, FOUR),
        ({4: "masked"}, {}, FOUR),  # it is back, and the server leaves it out
        ({4: "keys"}, {}, FOUR),
        ({4: "keys"}, {4: "masked"}, FOUR),
        ({3: "masked", 4: "keys"}, {}, {0, 1, 2}),
    ],
)
def test_a_resumed_round_is_over_the_same_clients(tmp_path: Path, first: Drops, second: Drops, summed: set[int]) -> None:
    site = Site(tmp_path)
    before, updates = site.attempt(first)
    after, again = site.attempt(second)
    assert before == after == summed
    for client in summed:
        for name, tensor in updates[client].groups["adapter"].items():
            assert torch.equal(again[client].groups["adapter"][name], tensor)


@pytest.mark.parametrize(
    ("first", "second", "trained"),
    [
        ({}, {4: "keys"}, 0),  # the set shrank, and nobody trains for it
        ({}, {4: "shares"}, 0),
        ({}, {4: "masked"}, 5),  # known only when it is time to unmask
        ({4: "unmask"}, {4: "keys"}, 0),
        ({4: "masked"}, {3: "keys"}, 0),
        ({4: "masked"}, {3: "masked"}, 4),
        ({3: "masked", 4: "masked"}, {2: "keys"}, 2),  # those that were not asked to unmask are not bound
    ],
)
def test_a_second_sum_over_fewer_clients_is_refused(tmp_path: Path, first: Drops, second: Drops, trained: int) -> None:
    site = Site(tmp_path)
    site.attempt(first)
    with pytest.raises(TooFewUpdates, match="the same updates were already summed over other clients"):
        site.attempt(second)
    assert site.trained == trained
    assert site.attempt(first)[0], "the first set can be summed again"


def test_a_round_whose_sum_nobody_helped_to_unmask_starts_afresh(tmp_path: Path) -> None:
    site = Site(tmp_path)
    with pytest.raises(TooFewUpdates):
        site.attempt({2: "masked", 3: "masked", 4: "masked"})
    assert site.attempt({4: "keys"})[0] == FOUR


def test_who_answered_is_bound_even_if_the_sum_stayed_masked(tmp_path: Path) -> None:
    """A client cannot know whether enough others answered."""
    site = Site(tmp_path)
    with pytest.raises(TooFewUpdates):
        site.attempt(LAST)
    with pytest.raises(TooFewUpdates, match="already summed"):
        site.attempt({4: "keys"})
    assert site.attempt({})[0] == ALL


def test_without_the_record_two_sums_reveal_an_update() -> None:
    """The attack itself: what the site's record prevents."""
    site = Site(None)
    (_, everyone), (_, fewer) = site.attempt({}), site.attempt({4: "keys"})
    both = [Update(c, u.groups, u.examples, u.steps) for c, u in enumerate(everyone)], fewer[:4]
    counts = [sum(update.examples for update in updates) for updates in both]
    info, adapter = round_info(0, (4,), clients=CLIENTS), lora_adapter()
    alone = Clients(algorithms.build("fedavg", {})).train(info, {4: {"adapter": adapter}})[0]
    assert counts[0] - counts[1] == alone.examples
    for name, start in adapter.items():
        means = [updates[0].groups["adapter"][name].double() - start for updates in both]
        update = (counts[0] * means[0] - counts[1] * means[1]) / alone.examples
        assert torch.allclose(update.float(), alone.groups["adapter"][name] - start, atol=1e-3)


def test_the_same_experiment_in_a_new_run_is_a_second_attempt(tmp_path: Path) -> None:
    """It sends the same updates. Another experiment or another round does not."""
    site = Site(tmp_path)
    site.attempt({})
    with pytest.raises(TooFewUpdates, match="start a run with another seed"):
        site.attempt({4: "keys"}, run="cd" * 8)
    assert site.attempt({4: "keys"}, run="cd" * 8, experiment="b")[0] == FOUR
    assert site.attempt({4: "keys"}, round=1)[0] == FOUR


def test_a_hostile_server_cannot_choose_the_set_either(tmp_path: Path) -> None:
    """It ignores what the clients report, and claims at the last moment that a client is gone."""
    for number, (present, gone) in enumerate((([0, 1, 2], []), ([0, 1], [2]), ([0, 1, 2], []))):
        server = MaliciousServer(attempts=Attempts(tmp_path, "a"))  # the sites' processes are new
        server.masked()
        answers = [server.unmask(present, gone, client) for client in (0, 1)]
        problems = {answer.problem.partition(";")[0] for answer in answers}
        other = "secure aggregation: the same updates were already summed over other clients, and two sums would reveal updates"
        assert problems == ({f"{other}: that sum and this one differ by client 2"} if number == 1 else {""})


@pytest.mark.parametrize("content", ["", "[0, 1", "{}", "3", "null"])
def test_a_damaged_record_refuses_the_round(tmp_path: Path, content: str) -> None:
    site = Site(tmp_path)
    site.attempt({})
    for file in tmp_path.iterdir():
        file.write_text(content)
    with pytest.raises(TooFewUpdates, match="the site's record of earlier attempts is damaged"):
        site.attempt({})


@pytest.mark.parametrize("claim", [torch.tensor(3), torch.tensor([float("nan")]), torch.tensor([[9, -1]]), torch.zeros(0)])
def test_one_client_cannot_exclude_others(claim: torch.Tensor) -> None:
    algorithm = algorithms.build("fedavg", {})
    clients = Clients(algorithm)

    def lie(phase: Phase, answer: Update) -> Update:
        if phase == "keys" and answer.client == 0:
            answer.groups["keys"]["earlier"] = claim
        return answer

    transport = RecordingTransport(LocalTransport(settings(), algorithm, clients, RUN), lie)
    info, state = round_info(0, range(CLIENTS), clients=CLIENTS), algorithm.init(lora_adapter())
    messages = {client: algorithm.message(state, client, info) for client in info.sampled}
    updates = SecureFleet(settings(), algorithm, clients, transport, RUN).train(info, messages)
    assert [update.problem for update in updates] == [""] * CLIENTS
