"""Site files, federation files, keys, the worker's socket, supervised processes, and the restrictions on Flower."""

from __future__ import annotations

import json
import re
import socket
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from commands import call, run
from federations import write_federation
from fedmllm import api
from fedmllm.errors import ConfigError
from fedmllm.remote import server
from fedmllm.remote.files import FederationFile, SiteFile, private_folder
from fedmllm.storage.lock import locked

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    root = tmp_path_factory.mktemp("files")
    write_federation(root, tiny)
    return root


# Keys


def test_keys_are_private_and_match(folder: Path) -> None:
    keys = folder / "keys"
    for name in ("ca.key", "server.key", "north.key"):
        assert stat.S_IMODE((keys / name).stat().st_mode) == 0o600
    authority = x509.load_pem_x509_certificate((keys / "ca.crt").read_bytes())
    certificate = x509.load_pem_x509_certificate((keys / "server.crt").read_bytes())
    certificate.verify_directly_issued_by(authority)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    assert authority.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    private = load_ssh_private_key((keys / "north.key").read_bytes(), None)
    public = load_ssh_public_key((keys / "north.pub").read_bytes())
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert private.public_key() == public
    assert private.curve.name == "secp384r1", "the curve that Flower requires"


def test_each_machine_makes_its_own_keys(tmp_path: Path) -> None:
    files = run("keys", tmp_path / "k", "--site", "north")["made"]
    assert [Path(path).name for path in files] == ["north.key", "north.pub"]
    files = run("keys", tmp_path / "k", "--host", "fed.example.org", "--host", "10.0.0.7")["made"]
    assert [Path(path).name for path in files] == ["ca.key", "ca.crt", "server.key", "server.crt"]
    certificate = x509.load_pem_x509_certificate((tmp_path / "k" / "server.crt").read_bytes())
    alternatives = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert alternatives.get_values_for_type(x509.DNSName) == ["fed.example.org", "localhost"]
    assert [str(a) for a in alternatives.get_values_for_type(x509.IPAddress)] == ["10.0.0.7", "127.0.0.1"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "nothing to create: give --host"),
        (["--site", "../north"], "a site's name may contain letters"),
        (["--site", "north", "--site", "north"], "north.key exists already"),
    ],
)
def test_keys_are_never_overwritten(tmp_path: Path, arguments: list[str], reason: str) -> None:
    completed = call("keys", tmp_path, *arguments)
    assert completed.exit_code == 2
    assert reason in completed.stderr


# Files


def changed_copy(folder: Path, file: str, old: str, new: str) -> Path:
    path = folder / file
    copy = path.with_name(f"changed-{path.name}")
    text = path.read_text()
    assert old in text
    copy.write_text(text.replace(old, new))
    return copy


def test_check_prints_what_the_site_would_report(folder: Path) -> None:
    report = run("client", folder / "east" / "site.toml", "--check")
    assert report.pop("superlink").startswith("127.0.0.1:")
    assert report == {"name": "east", "samples": 16, "image": 16, "text": 16, "skipped": 0}
    report = run("client", folder / "south" / "site.toml", "--check")
    assert (report["samples"], report["image"], report["text"]) == (12, 0, 12), "its modalities are a limit"


def test_a_site_may_give_a_whole_task_with_relative_paths(folder: Path) -> None:
    task = 'device = "cpu"\n[task]\nname = "jsonl"\ntrain = "train.jsonl"\ntest = "train.jsonl"\ntrain_samples = 5\n'
    path = changed_copy(folder, "north/site.toml", 'jsonl = "train.jsonl"\n', "")
    path.write_text(path.read_text().replace('device = "cpu"\n', task))
    assert SiteFile(path).data.task.options["train"] == str(folder / "north" / "train.jsonl")
    assert run("client", path, "--check")["samples"] == 5


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('name = "north"', 'name = "no/rth"', "name: string should match"),
        ('name = "north"\n', "", "name: this key is required"),
        ('key = "../keys/north.key"', 'key = "north.key"', "key = 'north.key': there is no such file"),
        ('ca = "../keys/ca.crt"', 'ca = "ca.crt"', "ca = 'ca.crt': there is no such file"),
        ('ca = "../keys/ca.crt"', f'ca = "{"x" * 300}"', "xxx': there is no such file"),
        ('modalities = ["image"]', 'modalities = ["sound"]', "modalities.0: input should be 'image' or 'text'"),
        ('modalities = ["image"]', "modalities = []", "modalities"),
        ('jsonl = "train.jsonl"', 'jsonl = "none.jsonl"', "none.jsonl is missing"),
        ('jsonl = "train.jsonl"', "", "give either a [task] table or jsonl"),
        ('device = "cpu"', 'divice = "cpu"', "divice: unknown key; did you mean 'device'?"),
        ('superlink = "127.0.0.1', 'superlink = "127.0.0.1" #', "superlink: string should match"),
        ('device = "cpu"', "min_peers = 1", "min_peers: input should be greater than or equal to 2"),
        ("[limits]", "[limits]\nsecond = 5", "limits.second: unknown key; did you mean 'seconds'?"),
        ("[limits]", "[limits]\nseconds = 0", "limits.seconds: input should be greater than 0"),
        ("[limits]", "[limits]\nsamples = 1.5", "limits.samples: input should be a valid integer"),
        ("models = [", "models = 5 #", "limits.models: must be a list"),
    ],
)
def test_an_error_in_a_site_file_gives_one_sentence(folder: Path, old: str, new: str, reason: str) -> None:
    completed = call("client", changed_copy(folder, "north/site.toml", old, new), "--check")
    assert completed.exit_code == 2, completed.output
    assert reason in completed.stderr
    assert "Traceback" not in completed.stderr


def test_a_site_without_usable_samples_gives_one_sentence(folder: Path) -> None:
    file = folder / "north" / "blind.toml"
    file.write_text((folder / "north" / "site.toml").read_text().replace("train.jsonl", "texts.jsonl"))
    line = {"id": "a", "text": "a red thing", "question": "which color?", "choices": ["red", "blue"], "answer": "red"}
    (folder / "north" / "texts.jsonl").write_text(json.dumps(line) + "\n")
    completed = call("client", file, "--check")
    assert completed.exit_code == 2
    assert "none of the 1 samples has image, so there is nothing to train on" in completed.stderr


def test_a_site_is_served_by_one_process(folder: Path) -> None:
    site = SiteFile(folder / "north" / "site.toml")
    private_folder(site.state, site.path)
    with locked(site.state / "lock", RuntimeError()):
        completed = call("client", site.path)
    assert completed.exit_code == 2
    assert "another `fedmllm client` is running" in completed.stderr


@pytest.mark.parametrize("party", ["east/site.toml", "server/federation.toml"])
def test_a_state_folder_that_other_users_may_open_is_refused(folder: Path, party: str) -> None:
    state = (folder / party).with_name("state")
    state.mkdir(exist_ok=True)
    state.chmod(0o750)
    completed = call(*(["client"] if "site" in party else ["server", "--out", folder / "never"]), folder / party)
    state.chmod(0o700)
    assert completed.exit_code == 2
    assert f"other users of this machine may open the folder {state}; run `chmod 700 {state}`" in completed.stderr
    assert list(state.iterdir()) == []


def test_a_port_in_use_gives_one_sentence(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", FederationFile(folder / "server" / "federation.toml", []).port))
        taken.listen()
        completed = call("server", folder / "server" / "federation.toml", "--out", folder / "never")
    assert completed.exit_code == 2
    assert "cannot listen on 127.0.0.1:" in completed.stderr
    assert not (folder / "never").exists()


def test_a_key_that_other_users_may_read_is_refused(folder: Path) -> None:
    key = folder / "keys" / "east.key"
    key.chmod(0o640)
    try:
        completed = call("client", folder / "east" / "site.toml", "--check")
    finally:
        key.chmod(0o600)
    assert completed.exit_code == 2
    assert "chmod 600" in completed.stderr


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('experiment = "experiment.toml"', 'experiment = "none.toml"', "there is no such experiment file"),
        ('north = "../keys/north.pub"', 'north = "../keys/north.key"', "sites.north = '../keys/north.key' is not a public key"),
        ('north = "../keys/north.pub"', 'north = "n.pub"', "sites.north = 'n.pub': there is no such file"),
        ('address = "127.0.0.1', 'address = "127.0.0.1" #', "address: string should match"),
        ('certificate = "../keys/server.crt"\n', "", "certificate: this key is required"),
        ("[sites]", "sitse = 3\n[sites]", "sitse: unknown key; did you mean 'sites'?"),
    ],
)
def test_an_error_in_a_federation_file_gives_one_sentence(folder: Path, old: str, new: str, reason: str) -> None:
    completed = call("server", changed_copy(folder, "server/federation.toml", old, new), "--out", folder / "none")
    assert completed.exit_code == 2, completed.output
    assert reason in completed.stderr
    assert not (folder / "none").exists()


@pytest.mark.parametrize(
    ("tables", "reason"),
    [
        ("", "task: this key is required"),
        ("task = 5", "task: "),
        ('task = "shapes-qa"', "task: "),
        ('task = { name = "shapes-qa" }\nfleet = 5', "fleet: "),
        ('task = { name = "shapes-qa" }\nfleet = { name = "flower", sites = 3 }', "fleet.sites: must be a list"),
        ('task = { name = "shapes-qa" }\nfleet = { name = "flower", sites = [1, "a"] }', "fleet.sites.0: "),
        ('task = { name = "shapes-qa" }\npartition = [1]', "partition: "),
        ('task = { name = "shapes-qa" }\ntrain = "x"', "train: "),
        ('task = { name = "shapes-qa" }\ntrain = { clients_per_round = "2" }', "train.clients_per_round: "),
        ('task = { name = "shapes-qa", companion = "x" }', "task.companion: "),
    ],
)
def test_an_experiment_of_the_wrong_shape_gives_one_sentence(folder: Path, tables: str, reason: str) -> None:
    (folder / "server" / "shape.toml").write_text(tables)
    path = changed_copy(folder, "server/federation.toml", 'experiment = "experiment.toml"', 'experiment = "shape.toml"')
    with pytest.raises(ConfigError, match=re.escape(f"{folder / 'server' / 'shape.toml'}: {reason}")):
        FederationFile(path, [])


def test_the_clients_are_the_sites_in_the_order_of_the_file(folder: Path) -> None:
    config = FederationFile(folder / "server" / "federation.toml", ["train.rounds=7"]).experiment
    assert config.fleet.options["sites"] == ["north", "south", "east"]
    assert (config.partition.clients, config.train.rounds, config.train.clients_per_round) == (3, 7, 3)
    with pytest.raises(ConfigError, match=r"fleet\.sites is \['north'\]"):
        FederationFile(folder / "server" / "federation.toml", ['fleet.sites=["north"]'])


def test_fedmllm_run_refuses_an_experiment_over_flower(folder: Path) -> None:
    completed = call("run", folder / "server" / "experiment.toml", "--set", 'fleet.sites=["a", "b"]', "--out", folder / "none")
    assert completed.exit_code == 2


def test_a_missing_extra_gives_one_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "find_spec", lambda name: None)
    for command in (["client", folder / "east" / "site.toml"], ["server", folder / "server" / "federation.toml"]):
        completed = call(*command)
        assert completed.exit_code == 2
        assert completed.stderr.strip() == 'error: flwr is not installed; run pip install "fedmllm[flower]".'


def test_the_example_app_is_the_shipped_one_and_has_no_other_files() -> None:
    shipped, example = server.APP, ROOT / "examples" / "flower"
    assert [path.name for path in example.iterdir()] == ["pyproject.toml"], "Flower would send other files to all sites"
    assert (shipped / "pyproject.toml").read_text() == (example / "pyproject.toml").read_text()
