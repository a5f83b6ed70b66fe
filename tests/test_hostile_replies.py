"""Hostile replies replayed on the server's side of Flower: the site is named, and the others' round goes on."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict

from fedmllm.algorithms import Update
from fedmllm.algorithms.fedavg import fedavg
from fedmllm.errors import ConfigError, brief
from fedmllm.federation import FederationPlan, federate
from fedmllm.remote import records
from fedmllm.remote.fleet import RemoteFleet, valid_metrics
from fedmllm.remote.protocol import MAX_DEPTH, MAX_SAMPLES, Job, Reply, counts_of, parts_of, to_bytes
from fedmllm.remote.records import HEADER, pack, unpack
from fedmllm.remote.serverapp import manifest_of
from fedmllm.remote.transport import Absent, FlowerTransport
from grids import DirectGrid
from helpers import same, tensors

START = tensors(w=[1.0, 2.0])
NAMES = ("north", "south", "east", "west")
LIAR = 1
HONEST = {"client": LIAR, "examples": 4, "steps": 2, "problem": "", "metrics": {"loss": 1.0, "padding": 0.0}, "about": {}}
DEEP = "[" * 100_000 + "]" * 100_000


def header_of(change: Mapping[str, Any]) -> str:
    """An honest header with some fields replaced; RAW stands for text that is put in as it is."""
    raw = {key: value for key, value in change.items() if isinstance(value, Raw)}
    text = json.dumps({**HONEST, "groups": ["adapter"], "version": 1, **change, **dict.fromkeys(raw, "RAW")})
    for value in raw.values():
        text = text.replace('"RAW"', value)
    return text


class Raw(str):
    """JSON text."""


def described(client: int, **about: Any) -> Reply:
    return Reply(client, about={"samples": 4, "image": 4, "text": 4, **about})


def site(hostile: Callable[[Message], RecordDict] | None, about: Mapping[str, Any] | None = None) -> Callable[..., Message]:
    """Sites that send the adapter that they received, and one more of client LIAR, which answers as `hostile` says."""

    def app(message: Message, context: Context) -> Message:
        job = Job.of(*parts_of(pack(message.content)))
        client = int(context.node_config["partition-id"])
        if job.kind == "describe":
            reply = unpack(to_bytes(described(client, **(about or {}) if client == LIAR else {})))
        elif client == LIAR and hostile is not None:
            reply = hostile(message)
        else:
            adapter = {name: tensor + client for name, tensor in job.state["adapter"].items()}
            reply = unpack(to_bytes(Reply(client, {"adapter": adapter}, 4, 2, {"loss": 1.0 + client, "padding": 0.5})))
        return Message(reply, reply_to=message)

    return app


def grid_of(app: Callable[..., Message]) -> DirectGrid:
    nodes = {100 + client: {"partition-id": client} for client in range(4)}
    return DirectGrid(app, nodes, {100 + client: name for client, name in enumerate(NAMES)})


def transport_on(grid: DirectGrid) -> FlowerTransport:
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    return FlowerTransport(grid, 30.0, NAMES, lambda: now[0], sleep)


def one_round(app: Callable[..., Message]) -> tuple[list[dict[str, str | int]], dict[str, dict[str, torch.Tensor]], float]:
    """What was refused, the state, and the loss of a round over Flower."""
    transport = transport_on(grid_of(app))
    transport.find_clients(Job("describe", "ab" * 8, ""), 4, wait=60)
    fleet = RemoteFleet(transport, "ab" * 8, "", 60.0)
    plan = FederationPlan(range(4), 4, 1, 0.1, "constant", 1, 0, declared=[4] * 4)
    ((record, state),) = federate(fedavg(), fleet, plan, START)
    return record.refused, state, record.loss


def with_header(change: Mapping[str, Any]) -> Callable[[Message], RecordDict]:
    groups = {"adapter": ArrayRecord({"w": Array(START["w"].numpy())})}
    return lambda message: RecordDict({HEADER: ConfigRecord({"head": header_of(change)}), **groups})


def with_groups(**groups: Mapping[str, Any]) -> Callable[[Message], RecordDict]:
    def hostile(message: Message) -> RecordDict:
        arrays = {group: ArrayRecord({n: Array(t.numpy()) for n, t in named.items()}) for group, named in groups.items()}
        return RecordDict({HEADER: ConfigRecord({"head": header_of({"groups": sorted(groups)})}), **arrays})

    return hostile


LONG = "n" * 600
REPLIES: list[tuple[Callable[[Message], RecordDict], str]] = [
    (with_header({"examples": 10**400}), "not a reply: a number of more than 63 bits"),
    (with_header({"examples": Raw("1" + "0" * 5000)}), "its header is not JSON: Exceeds the limit"),
    (with_header({"examples": -(10**400)}), "not a reply: a number of more than 63 bits"),
    (with_header({"steps": 10**400}), "not a reply: a number of more than 63 bits"),
    (with_header({"client": 10**400}), "not a reply: a number of more than 63 bits"),
    (with_header({"client": 2}), "answered as client 2"),
    (with_header({"examples": 10**18}), "trained on 1000000000000000000 samples, and has 4 in a round"),
    (with_header({"metrics": {"loss": 1.0, "padding": 10**400}}), "not a reply: a number of more than 63 bits"),
    (with_header({"metrics": {"loss": 10**400}}), "not a reply: a number of more than 63 bits"),
    (with_header({"metrics": {"loss": 1e300}}), "NaN or infinity in the training loss"),
    (with_header({"metrics": {"padding": 1e300}}), "padding = 1e+300 is not a share"),
    (with_header({"metrics": Raw('{"loss": NaN}')}), "NaN or infinity in the training loss"),
    (with_header({"metrics": Raw('{"loss": -Infinity}')}), "NaN or infinity in the training loss"),
    (with_header({"metrics": Raw('{"padding": NaN}')}), "padding = nan is not a share"),
    (with_header({"metrics": Raw('{"loss": 1e999}')}), "NaN or infinity in the training loss"),
    (with_header({"metrics": {"loss": "1"}}), "not a reply: its metrics are not numbers"),
    (with_header({"metrics": {"loss": True}}), "not a reply: its metrics are not numbers"),
    (with_header({"metrics": {LONG: 1.0}}), "not a reply: a text of 600 characters, of 500 at most"),
    (with_header({"metrics": [1]}), "not a reply: its metrics are not a table"),
    (with_header({"about": [1]}), "not a reply: its metrics are not a table"),
    (with_header({"about": None}), "not a reply: its metrics are not a table"),
    (with_header({"about": {"a": LONG}}), "not a reply: a text of 600 characters, of 500 at most"),
    (with_header({"about": {"a": [[[[[[[[[1]]]]]]]]]}}), f"not a reply: lists or tables more than {MAX_DEPTH} deep"),
    (with_header({"about": {"a": [10**400]}}), "not a reply: a number of more than 63 bits"),
    (with_header({"about": Raw(DEEP)}), "its header is not JSON: maximum recursion depth exceeded"),
    (with_header({"metrics": Raw('{"a":' * 90_000 + "1" + "}" * 90_000)}), "its header is not JSON: maximum recursion depth"),
    (with_header({"groups": [["adapter"]]}), "its tensors are not in the groups that its header lists"),
    (with_header({"groups": [{}]}), "its tensors are not in the groups that its header lists"),
    (with_header({"groups": ["adapter", LONG]}), "not a reply: a text of 600 characters, of 500 at most"),
    (with_header({"x" * 9999: 1}), "not a reply: Reply.__init__() got an unexpected keyword argument"),
    (with_header({"problem": "out of disk"}), "out of disk"),
    (with_header({"problem": 3}), "not a reply: its counts are not integers"),
    (with_header({"problem": "\x1b]0;gone\x07 \u202e\n" + "y" * 900_000}), r"\x1b]0;gone\x07 \u202e\nyyyyy"),
    (with_header({"problem": "\x1b[2J" * 2_500_000}), "not a reply: a header of 225"),
    (with_groups(adapter={LONG: START["w"]}), "not a reply: a text of 600 characters, of 500 at most"),
    (with_groups(adapter=START, **{"\x1b[31m": START}), r"groups ['\x1b[31m', 'adapter'] instead of ['adapter']"),
    (with_groups(adapter={"w": torch.tensor([3e38, -3e38])}), "its change of the adapter has norm 4.24e+38, more than "),
    (with_groups(adapter={"w": torch.tensor([1e6, 1e6])}), "its change of the adapter has norm 1.41e+06, more than "),
]  # fmt: skip


@pytest.mark.parametrize(("hostile", "why"), REPLIES, ids=range(len(REPLIES)))
def test_a_hostile_reply_is_refused_and_the_round_goes_on(hostile: Callable[[Message], RecordDict], why: str) -> None:
    refused, state, loss = one_round(site(hostile))
    (refusal,) = refused
    assert refusal["client"] == LIAR
    text = str(refusal["why"])
    assert text.startswith(why)
    assert text.isprintable()
    assert len(text) < 600
    # The mean of clients 0, 2 and 3, which add their number.
    assert same(state, {"adapter": tensors(w=[1 + 5 / 3, 2 + 5 / 3])})
    assert loss == pytest.approx(1 + 5 / 3)


def test_honest_sites_are_all_used() -> None:
    refused, state, _ = one_round(site(None))
    assert refused == []
    assert same(state, {"adapter": tensors(w=[2.5, 3.5])})


def test_a_message_that_is_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_BYTES", 1000)
    assert one_round(site(None))[0] == []
    (refusal,) = one_round(site(with_groups(adapter={"w": torch.ones(1000)})))[0]
    assert refusal == {"client": LIAR, "why": "the message is longer than fedmllm sends."}


# Admission


IMPOSSIBLE = [
    ({"samples": 10**6, "image": 10**6, "text": 10**6}, f"1000000 samples; a site may hold {MAX_SAMPLES} at most"),
    ({"samples": 2**62, "image": 2**62, "text": 0}, f"{2**62} samples; a site may hold {MAX_SAMPLES} at most"),
    ({"samples": -1}, "-1 samples, 4 with image and 4 with text, which is impossible"),
    ({"samples": 9}, "9 samples, 4 with image and 4 with text, which is impossible"),
    ({"text": 4.0}, "4 samples, 4 with image and -1 with text, which is impossible"),
    ({"text": [4]}, "4 samples, 4 with image and -1 with text, which is impossible"),
    ({"skipped": "many"}, "a number of skipped samples that is none"),
    ({"skipped": -5}, "a number of skipped samples that is none"),
    ({"skipped": True}, "a number of skipped samples that is none"),
]  # fmt: skip


@pytest.mark.parametrize(("about", "why"), IMPOSSIBLE, ids=range(len(IMPOSSIBLE)))
def test_a_site_with_impossible_counts_is_not_admitted(about: Mapping[str, Any], why: str) -> None:
    describe = Job("describe", "ab" * 8, "")
    with pytest.raises(Absent) as absent:
        transport_on(grid_of(site(None, about))).find_clients(describe, 4, wait=30)
    assert str(absent.value).startswith("3 of 4 clients connected within 30 s; missing: south; a node reported: 'south' has ")
    assert why in str(absent.value)
    found = transport_on(grid_of(site(None, about))).find_clients(describe, 4, wait=30, required=3)
    assert found.keys() == {0, 2, 3}
    with pytest.raises(ConfigError, match="site 'north' reports"):
        manifest_of({0: {"samples": 4, "image": 4, "text": 4, **about}}, NAMES)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [((0, 0, 0), (0, 0, 0)), ((3, 3, 0), (3, 3, 0)), ((5, 3, 4), (5, 3, 4)), ((MAX_SAMPLES, 0, MAX_SAMPLES),) * 2],
)
def test_possible_counts_are_kept(counts: tuple[int, int, int], expected: tuple[int, int, int]) -> None:
    assert counts_of(dict(zip(("samples", "image", "text"), counts, strict=True))) == expected


def test_a_manifest_of_many_samples_is_small() -> None:
    tracemalloc.start()
    manifest = manifest_of({0: {"samples": 100_000, "image": 60_000, "text": 50_000}}, ("north",))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert manifest.counts().tolist() == [[100_000, 60_000, 50_000]]
    assert peak < 20e6, "a hundred bytes a sample are one for each character of its id, and some more"


# Metrics and messages


@pytest.mark.parametrize(
    "row",
    [
        {"accuracy": 10**400},
        {"accuracy": -(10**400)},
        {"accuracy": 1e300},
        {"accuracy": float("inf")},
        {"accuracy_ci": [0, 10**400]},
        {"\x1b[31m": 0.5},
        {"<script>": 0.5},
        {"": 0.5},
        {"accuracy": [[0, 1], 1]},
    ],
)
def test_metrics_beyond_reason_are_left_out(row: dict[str, Any]) -> None:
    assert valid_metrics({"both": {"n": 3, **row}, "image": row}) == {"both": {"n": 3}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ("a" * 500, "a" * 500),
        ("a" * 501, "a" * 500 + "…"),
        ("one\ntwo\ttabs", r"one\ntwo\ttabs"),
        ("\x1b[31mred\x9b", r"\x1b[31mred\x9b"),
        ("für 患者", "für 患者"),
        ("\u202eleft", r"\u202eleft"),
    ],
)
def test_text_from_elsewhere_is_printable_and_short(text: str, expected: str) -> None:
    assert brief(text) == expected


def test_a_failed_update_keeps_its_reason() -> None:
    class Full:
        def exchange(self, jobs: Any, timeout: float) -> dict[int, Reply]:
            return {client: Reply.of(Reply(client, problem="disk\x00full").header(), {}) for client in jobs}

    info = FederationPlan((3,), 1, 1, 0.1, "constant", 1, 0).info(0, [3])
    (update,) = RemoteFleet(Full(), "ab" * 8, "", 1.0).request("keys", info, {3: {}})
    assert update == Update(3, {}, 0, 0, problem=r"disk\x00full")
