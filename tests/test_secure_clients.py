"""What the client half of secure aggregation refuses to a malicious server."""

from __future__ import annotations

import pytest
import torch

from fedmllm.rng import stream
from fedmllm.secure.clients import SecureClients
from fedmllm.tensors import State
from helpers import same
from secure_rounds import MaliciousServer, settings


def test_both_secrets_of_a_client_are_never_sent() -> None:
    server = MaliciousServer()
    server.masked()
    assert "both secrets of one client" in server.unmask([0, 1, 2], [1]).problem
    assert "was already answered in this round" in server.unmask([0, 1, 2], []).problem, "not even after a refusal"


def test_nor_are_they_sent_one_after_the_other() -> None:
    server = MaliciousServer()
    server.masked()
    first = server.unmask([0, 1, 2], [])
    assert set(first.groups["unmask"]) == {"0", "1", "2"}
    later = server.unmask([0, 2], [1])
    assert later.problem == "secure aggregation: 'unmask' was already answered in this round"
    assert not later.groups
    again = server.unmask([0, 1, 2], [])
    assert same(again.groups, first.groups), "a repeated request gets the same answer"


@pytest.mark.parametrize(
    ("present", "gone", "reason"),
    [
        ([0, 1], [], "clients other than those with which it shares masks"),
        ([0, 1, 2, 9], [], "clients other than those with which it shares masks"),
        ([1, 2], [0], "clients other than those with which it shares masks"),
        ([0], [1, 2], "1 clients share masks with it, and 2 are needed"),
    ],
)
def test_secrets_are_sent_for_whole_rounds_only(present: list[int], gone: list[int], reason: str) -> None:
    server = MaliciousServer()
    server.masked()
    assert reason in server.unmask(present, gone).problem


def test_altered_shares_are_detected_before_training() -> None:
    def alter(inboxes: dict[int, State]) -> None:
        shares = inboxes[1]["shares"]
        shares["0"] = shares["0"].clone()
        shares["0"][3] ^= 1

    server = MaliciousServer()
    answers = server.masked(alter)
    assert answers[1].problem == "secure aggregation: the shares of client 0 were altered in transit"
    assert (answers[0].problem, server.trained) == ("", 2)


def test_shares_of_another_client_are_detected() -> None:
    def swap(inboxes: dict[int, State]) -> None:
        shares = inboxes[1]["shares"]
        shares["0"], shares["2"] = shares["2"], shares["0"]

    assert "altered in transit" in MaliciousServer().masked(swap)[1].problem


def test_shares_of_an_earlier_attempt_are_detected() -> None:
    server = MaliciousServer()
    old_shares = server.sealed()
    server.attempt = server.attempt + 1
    answers = server.masked(lambda inboxes: inboxes.update(old_shares))
    assert all("altered in transit" in answer.problem for answer in answers.values())


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"1": 63, "2": 64}, "'1' is not 64 bytes"),
        ({"1": 64, "7": 64}, "the key of a client that is not a peer"),
        ({"1": 64, "2": 64, "x": 64}, "the key of a client that is not a peer"),
    ],
)
def test_bad_keys_are_refused(keys: dict[str, int], reason: str) -> None:
    server = MaliciousServer()
    server.keys()
    forged = {name: torch.from_numpy(stream(0, name).integers(0, 255, size=n, dtype="uint8")) for name, n in keys.items()}
    assert reason in server.request("shares", {0: {"keys": forged}})[0].problem


def test_the_same_key_for_two_clients_is_refused() -> None:
    server = MaliciousServer()
    server.keys()
    key = torch.arange(64, dtype=torch.uint8)
    assert "two clients have the same key" in server.request("shares", {0: {"keys": {"1": key, "2": key}}})[0].problem


def test_a_restarted_client_refuses_to_continue() -> None:
    server = MaliciousServer()
    server.sealed()
    server.clients = SecureClients(settings(), server.algorithm)
    assert "restarted in the middle" in server.unmask([0, 1, 2], []).problem
    assert "restarted in the middle" in MaliciousServer().request("masked", {0: {"adapter": {}, "shares": {}}})[0].problem


def test_phases_must_be_requested_in_order() -> None:
    server = MaliciousServer()
    server.shares()
    assert "was requested too early" in server.unmask([0, 1, 2], []).problem


def test_a_repeated_request_trains_nobody_twice() -> None:
    server = MaliciousServer()
    messages = {client: {**server.model, **inbox} for client, inbox in server.sealed().items()}
    first, second = server.request("masked", messages), server.request("masked", messages)
    assert server.trained == 3
    assert all(same(first[c].groups, second[c].groups) for c in first)
