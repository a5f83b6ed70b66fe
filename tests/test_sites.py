"""A SuperLink and sites as processes of their own, over TLS on the loopback interface.

One set of sites serves all runs of this module, one after the other, as real sites do.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from federations import (
    Process,
    adapter,
    close,
    commands,
    in_one_process,
    pid_of,
    rounds_done,
    running,
    superlink_on,
    wait_for,
    with_site_names,
    write_federation,
)
from fedmllm.remote.files import FederationFile
from fedmllm.remote.supervisor import environment, tool
from fedmllm.storage.run_dir import RunDir

ROOT = Path(__file__).parents[1]
NAMES = ("north", "south")
"""A site with images and one with texts: each process that trains takes seconds to start."""
pytestmark = [
    pytest.mark.timeout(2400),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("federation")


@pytest.fixture(scope="module")
def federation(root: Path, tiny: Path) -> Path:
    return write_federation(root, tiny, names=NAMES, rounds=2)


@pytest.fixture(scope="module")
def sites() -> Iterator[dict[str, Process]]:
    """The processes of the sites, which the first server to admit them starts."""
    started: dict[str, Process] = {}
    try:
        yield started
    finally:
        with running(*started.values()):
            pass


@contextmanager
def serving(federation: Path, sites: dict[str, Process], out: Path, *options: str) -> Iterator[Process]:
    """A server whose sites are running. They are started when it admits them, because a node that comes earlier ends."""
    server, root = Process(out.with_suffix(".log"), "server", federation, "--out", out, "--json", *options), out.parent
    with running(server):
        wait_for(lambda: "may connect" in server.output(), 600)
        for name in NAMES:
            if name not in sites:
                sites[name] = Process(root / f"{name}.log", "client", root / name / "site.toml")
        yield server


def result_of(server: Process, seconds: float = 2000) -> dict[str, Any]:
    """The result that the server prints when its run is finished."""
    status, text = server.result(seconds)
    assert status == 0, server.output()[-4000:]
    result: dict[str, Any] = json.loads(text)
    return result


@pytest.fixture(scope="module")
def expected(federation: Path, root: Path) -> dict[str, torch.Tensor]:
    """The adapter of a single-process run."""
    in_one_process(federation, root / "in-one")
    return adapter(root / "in-one")


def test_an_interrupted_server_stops_what_it_started(root: Path, federation: Path, sites: dict[str, Process]) -> None:
    """As soon as the process of its run has started. The next test shows that the sites wait for another server."""
    run = f"flwr-serverapp --runtime-api-address 127.0.0.1:{FederationFile(federation, []).port}"
    with serving(federation, sites, root / "interrupted") as server:
        wait_for(lambda: [line for line in commands().values() if run in line], 300)
        server.popen.send_signal(signal.SIGINT)
        status, _ = server.result(300)
    assert status == 130
    assert "interrupted: the same command with --resume" in server.output()
    wait_for(lambda: not [line for line in commands().values() if str(federation.parent) in line or run in line], 30)


def test_killed_processes_cost_time_and_do_not_change_the_run(
    root: Path, federation: Path, sites: dict[str, Process], expected: dict[str, torch.Tensor]
) -> None:
    """A SuperNode is killed in the first round and the SuperLink in the second: the result is that of a single-process run."""
    out, south_key = root / "killed", str(root / "keys" / "south.key")
    with serving(federation, sites, out) as server:
        wait_for(lambda: (out / "meta.json").is_file(), 1500)  # the first round has begun
        supernode = pid_of("fedmllm.remote.supernode", south_key)
        os.kill(supernode, signal.SIGKILL)
        wait_for(lambda: rounds_done(out) == 1, 1500)
        assert pid_of("fedmllm.remote.supernode", south_key) != supernode
        assert "the run failed" not in server.output(), "the round waited for the site"
        os.kill(pid_of("fedmllm.remote.superlink", str(federation.parent)), signal.SIGKILL)
        result = result_of(server)
    assert "SuperNode ended with status -9" in sites["south"].output()
    assert "SuperLink ended with status -9" in server.output()
    assert "the run failed after round 1" in server.output()
    assert close(adapter(out), expected)
    single = RunDir(root / "in-one").result()
    assert result["per_client"] == with_site_names(single["per_client"], NAMES), "derived from the counts that sites report"
    for key in ("metrics", "rounds", "bytes_up", "bytes_down", "refused_updates"):
        assert result[key] == single[key], key
    assert all(site.is_running for site in sites.values()), "sites wait for the next run"
    for process in sites.values():
        maps = Path(f"/proc/{process.popen.pid}/maps").read_text()
        assert "tokenizers" not in maps, "only the site's worker loads transformers"


@pytest.mark.slow
def test_flwr_run_submits_the_shipped_app_to_a_running_superlink(
    root: Path, federation: Path, sites: dict[str, Process], expected: dict[str, torch.Tensor]
) -> None:
    """For users who start the SuperLink themselves; sites cannot tell the difference."""
    state, out = federation.parent / "state", root / "submitted"
    settings = f'experiment="{state / "experiment.toml"}" out="{out}"'
    port = FederationFile(federation, []).port
    with superlink_on(root, port, state / "superlink.db", state / "flower"):
        command = [tool("flwr"), "run", str(ROOT / "examples" / "flower"), "here", "-c", settings]
        subprocess.run(command, env=environment(state / "flower"), check=True, capture_output=True, timeout=600)
        wait_for((out / "result.json").is_file, 1500)
    assert close(adapter(out), expected)


@pytest.mark.slow
def test_a_site_that_sends_nan_is_refused_by_name_and_the_others_continue(
    root: Path, federation: Path, sites: dict[str, Process], tiny: Path
) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    broken = root / "south" / "broken"
    model = AutoModelForImageTextToText.from_pretrained(tiny)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    model.save_pretrained(broken)
    AutoProcessor.from_pretrained(tiny).save_pretrained(broken)
    assert "south" not in sites or sites["south"].stop() == 0
    file = root / "south" / "broken.toml"
    file.write_text('model = "broken"\n' + (root / "south" / "site.toml").read_text())
    broken_site = Process(root / "broken.log", "client", file)
    with serving(federation, sites, root / "nan", "--set", "train.rounds=1") as server, running(broken_site):
        result = result_of(server)
        assert broken_site.stop() == 0
    (record,) = RunDir(root / "nan").rounds()
    assert [(r["client"], r["why"].partition(" in ")[0]) for r in record["refused"]] == [(1, "NaN or infinity")]
    assert result["refused_updates"] == 1
    assert all(bool(torch.isfinite(t).all()) for t in adapter(root / "nan").values())


def test_a_stopped_site_leaves_no_process(root: Path, sites: dict[str, Process]) -> None:
    running_sites = [site for site in sites.values() if site.is_running]
    for site in running_sites:
        site.popen.send_signal(signal.SIGTERM)
    for site in running_sites:
        status, _ = site.result(90)
        assert status == 0
    wait_for(lambda: not [line for line in commands().values() if str(root) in line], 20)
