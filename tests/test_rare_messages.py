"""Messages that no other test replays, each made by the function that raises it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from peft import LoraConfig, get_peft_model
from torch import nn

from commands import call
from fedmllm.algorithms import AdapterInfo, algorithms
from fedmllm.config import ModelTable, TaskTable, validate
from fedmllm.data.dataset import load_split, open_source
from fedmllm.data.files import json_lines
from fedmllm.errors import UserError
from fedmllm.experiment.compatibility import check_adapter
from fedmllm.experiment.parts import Parts, build
from fedmllm.models.adapter import adapter_parameters
from fedmllm.models.attach import attach
from fedmllm.models.backbone import _device, _end_ids
from fedmllm.models.families import family_of
from fedmllm.registry import load_plugin
from fedmllm.remote import clientapp, keys
from fedmllm.remote.files import SiteData, SiteFile
from fedmllm.remote.fleet import RemoteFleet
from fedmllm.remote.flower import FlowerCli
from fedmllm.remote.protocol import Job, ProtocolError, parts_of
from fedmllm.remote.server import Server
from fedmllm.remote.serverapp import _server_dataset
from fedmllm.remote.site import site_dataset
from fedmllm.remote.supervisor import tool
from fedmllm.remote.worker import Worker
from fedmllm.runs.rounds import begin, personal_models
from fedmllm.secure.client import MaskGroup, Refusal, SecureClient
from fedmllm.secure.clients import SecureClients
from fedmllm.storage.lock import locked
from fedmllm.storage.run_dir import RunDir
from helpers import built, round_info, tensors, update
from secure_rounds import settings as pairwise

QUESTION = {"id": "q", "text": "a text", "question": "which?", "answer": "yes"}
EASY = TaskTable.model_validate({"name": "easy-vqa", "train_samples": 8, "test_samples": 8})
LINEAR = nn.Sequential(nn.Linear(2, 2))


def parts(**tables: Mapping[str, Any]) -> Parts:
    return build(validate({"task": EASY.model_dump(exclude_none=True), **tables}))


def over_flower(**tables: Mapping[str, Any]) -> Parts:
    return parts(fleet={"name": "flower", "sites": ["north", "south"]}, partition={"name": "iid", "clients": 2}, **tables)


def task_with_companion(folder: Path, **companion: Any) -> Any:
    (folder / "a.jsonl").write_text(json.dumps(QUESTION) + "\n")
    paths = {"train": str(folder / "a.jsonl"), "test": str(folder / "a.jsonl")}
    table = {"name": "jsonl", **paths, "companion": {"name": "jsonl", **paths} | companion}
    return load_split(open_source(TaskTable.model_validate(table)), "test")


def site_file(folder: Path) -> SiteFile:
    (folder / "site.toml").write_text(
        'name = "north"\nsuperlink = "h:1"\nca = "ca"\nkey = "key"\njsonl_test = "t"\n[task]\nname = "easy-vqa"\n'
    )
    return SiteFile(folder / "site.toml")


def with_another_authority(folder: Path) -> None:
    keys.make_authority(folder)
    key = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "ca.key").write_bytes(key)
    keys.make_server(folder, ["example.org"])


def second_server(folder: Path) -> None:
    with locked(folder / "lock", RuntimeError()):
        Server(SimpleNamespace(state=folder, path=folder / "federation.toml"), folder / "run", False, print).run()  # type: ignore[arg-type]


def refused_key(folder: Path) -> None:
    (folder / "north.pub").write_text("key")
    cli = FlowerCli.__new__(FlowerCli)
    cli._federation = SimpleNamespace(state=folder, sites={"north": folder / "north.pub"})  # type: ignore[assignment]
    cli._call = lambda *_, **__: {"error-message": "the key is in use"}  # type: ignore[method-assign]
    cli.register_sites(set())


def other_data(folder: Path, **before: str) -> None:
    directory = RunDir(folder)
    directory.begin("", {"config_digest": "c", "kind": "local", "manifest_digest": "now", "content_digest": "now"} | before)
    dataset = SimpleNamespace(manifest=SimpleNamespace(digest=lambda: "now"), content_digest=lambda: "now")
    session = SimpleNamespace(config=SimpleNamespace(digest=lambda: "c"), dataset=dataset, progress=lambda *_: None)
    begin(SimpleNamespace(directory=directory, session=session, kind="local", backend=SimpleNamespace(local=False)))  # type: ignore[arg-type]


def another_adapter(folder: Path) -> None:
    evaluator = SimpleNamespace(sample_clients=lambda clients: [0])
    run = SimpleNamespace(evaluator=evaluator, session=SimpleNamespace(initial=tensors(w=[1.0]), attackers=()))
    plan = SimpleNamespace(clients=range(1), info=lambda done, clients: None)
    fleet = SimpleNamespace(personal=lambda *_: tensors(w=[1.0, 2.0]))
    personal_models(run, SimpleNamespace(message=lambda *_: {}), {}, plan, fleet, 1)  # type: ignore[arg-type]


def embedding(folder: Path) -> None:
    model = nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 2))
    adapter_parameters(get_peft_model(model, LoraConfig(r=1, target_modules=["0", "1"])))  # type: ignore[arg-type]


def no_default_target(folder: Path) -> None:
    attach(LINEAR, ModelTable(), family_of("some-model"), seed=0)


def no_end(folder: Path) -> None:
    nothing = SimpleNamespace(eos_token_id=None)
    _end_ids(ModelTable(), SimpleNamespace(generation_config=nothing), SimpleNamespace(tokenizer=nothing))


def share_of_a_stranger(folder: Path) -> None:
    client = SecureClient(MaskGroup.of(pairwise(), "run", round_info(sampled=(0, 1, 2)), bytes(16)), 0)
    client._pending = ["masked", "unmask"]
    client.open({"shares": {"7": torch.zeros(1)}})


def plugin(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)
    load_plugin(folder / name)


CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a companion of another metric": (
        lambda folder: task_with_companion(folder, metric="auc", positive="yes"), "choose a companion with the same metric"
    ),
    "a companion with the same ids": (task_with_companion, "the id 'q' occurs in both tasks; make the ids differ"),
    "a folder as a file of samples": (lambda folder: list(json_lines(folder)), r"cannot be read \(Is a directory\)"),
    "layers to tie in an adapter without layers": (
        lambda _: parts(model={"adapter": {"kind": "prompt-tuning"}}, regularization={"name": "adaptive"}),
        'ties the middle layers, .* use "fedprox" or "none"',
    ),
    "an adapter that is no LoRA adapter": (
        lambda _: check_adapter(
            validate({"task": {"name": "easy-vqa"}, "algorithm": {"name": "flora"}}),
            algorithms.build("flora", {}), tensors(w=[1.0]), AdapterInfo(),
        ),
        "algorithm.name: 'flora' cannot work with model.lora.target",
    ),
    "an adapter on an embedding": (embedding, "model.lora.target matches an embedding"),
    "a model without the usual modules": (no_default_target, "finds no module to adapt in this model"),
    "a device that is not there": (lambda _: _device("cuda:99"), "model.device = 'cuda:99' is not available on this machine"),
    "a model whose answers have no end": (no_end, "has no end-of-turn token"),
    "a node that is nobody": (
        lambda _: clientapp._answer_locally(b"", SimpleNamespace(node_config={})),  # type: ignore[arg-type]
        "this node's configuration has neither `worker` nor `partition-id`",
    ),
    "test data of a site twice": (site_file, "jsonl_test requires jsonl"),
    "a site that the federation does not name": (
        lambda _: site_dataset(over_flower(), SiteData("west", EASY)), "no site 'west'; its sites are north, south"
    ),
    "validation without training data": (
        lambda _: _server_dataset(over_flower(eval={"split": "validation"}), {}, None),
        "the server has none if fleet.sites is given",
    ),
    "an authority that is missing": (lambda folder: keys.make_server(folder, ["h"]), "there is no authority to sign with"),
    "an authority of another kind": (with_another_authority, "not a key made by `fedmllm keys`"),
    "a second server": (second_server, "another `fedmllm server` is running in .*; stop it first"),
    "a key that Flower refuses": (refused_key, r"does not register sites.north \(the key is in use\)"),
    "a tool of Flower that is missing": (lambda _: tool("flwr-no-such-tool"), "the command flwr-no-such-tool is missing"),
    "a client that keeps its adapter": (
        lambda _: RemoteFleet(SimpleNamespace(exchange=lambda *_: {}), "run", "", 1.0).personal(0, {}, 1),  # type: ignore[arg-type]
        r"client 0 did not send its own adapter \(no answer within 1 s\)",
    ),
    "a client's own adapter of another shape": (another_adapter, "client 0's own adapter cannot be used"),
    "samples that changed before a run was resumed": (
        lambda folder: other_data(folder, manifest_digest="before"), "the data changed since this run began"
    ),
    "a text that changed before a run was resumed": (
        lambda folder: other_data(folder, content_digest="before"), "the data changed since this run began"
    ),
    "an algorithm that needs single updates": (
        lambda _: SecureClients(pairwise(), built("flora"))._mask("run", round_info(sampled=(0, 1)), {}, update(0, {})),
        "the algorithm needs more than the mean of the updates",
    ),
    "a share of a client that sent no key": (share_of_a_stranger, "received the share of a client that sent no key"),
    "a plugin that is missing": (lambda folder: load_plugin(folder / "x.py"), "--plugin .*x.py: there is no such file"),
    "a plugin that is text": (lambda folder: plugin(folder, "x.txt", ""), "is not a Python file; give one that ends in .py"),
    "a plugin that fails": (
        lambda folder: plugin(folder, "x.py", "import no_such_library"), "it cannot be imported .ModuleNotFoundError: No module"
    ),
    "a job without its fields": (lambda _: Job.of('{"version": 1, "groups": []}', {}), "not a job: 'sampled'"),
    "bytes that are no message": (lambda _: parts_of(b"bytes"), "not a message"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_rare_input(case: str, tmp_path: Path) -> None:
    make, sentence = CASES[case]
    with pytest.raises((UserError, ProtocolError, Refusal), match=sentence):
        make(tmp_path)


def test_a_run_whose_name_leads_elsewhere_is_not_answered(tmp_path: Path) -> None:
    (reply,) = Worker(tmp_path).answer([Job("describe", "../elsewhere", "")])
    assert reply.problem == "the run's name is not one that fedmllm creates."


def test_an_address_without_a_cluster(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text('[task]\nname = "shapes-qa"\n')
    (tmp_path / "grid.toml").write_text('name = "g"\nbase = "base.toml"\n[[axes]]\nname = "m"\ncells = [{ name = "a" }]\n')
    done = call("sweep", tmp_path / "grid.toml", "--address", "auto", "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert done.stderr == "error: --address needs --fleet ray.\n"
