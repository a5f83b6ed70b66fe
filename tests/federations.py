"""A federation in a folder, with a server and sites of different modalities, and its processes on this machine."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file

from fedmllm.config import Named
from fedmllm.data.dataset import Dataset, load_split, open_source
from fedmllm.data.manifest import Manifest
from fedmllm.experiment.parts import build
from fedmllm.remote.files import FederationFile, SiteFile
from fedmllm.remote.keys import make
from fedmllm.remote.supernode import HEARTBEAT
from fedmllm.remote.supervisor import environment, free_port
from fedmllm.runs.kinds import execute
from fedmllm.runs.session import Session
from fedmllm.storage.run_dir import RunDir

SITES = {"north": ["image"], "south": ["text"], "east": ["image", "text"]}
COLORS = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (30, 200, 30)}


def write_samples(folder: Path, split: str, count: int, shift: int = 0) -> None:
    """Write paired samples; a site may be limited to one modality of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rgb in COLORS.items():
        Image.new("RGB", (64, 64), rgb).save(folder / f"{name}.png")
    lines = []
    for i in range(count):
        color = list(COLORS)[(i + shift) % 3]
        line = {"id": f"{folder.name}-{split}-{i:02d}", "image": f"{color}.png", "text": f"a {color} thing in {folder.name}"}
        lines.append(json.dumps({**line, "question": "which color is it?", "choices": list(COLORS), "answer": color}))
    (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


def write_federation(root: Path, model: Path, extra: str = "", names: Sequence[str] = tuple(SITES), rounds: int = 3) -> Path:
    """Write keys, the sites of these names and a server on a free port; the path of the federation file. `extra` is appended
    to the experiment."""
    port = free_port()
    make(root / "keys", ["127.0.0.1"], list(names))
    for number, name in enumerate(names):
        write_samples(root / name, "train", 8 + 4 * number, number)
        (root / name / "site.toml").write_text(
            f'name = "{name}"\nsuperlink = "127.0.0.1:{port}"\nca = "../keys/ca.crt"\nkey = "../keys/{name}.key"\n'
            f'jsonl = "train.jsonl"\nmodalities = {json.dumps(SITES[name])}\ndevice = "cpu"\n'
            f'[limits]\nmodels = ["{model}"]\n'
        )
    for split in ("train", "test"):
        write_samples(root / "server", split, 6)
    (root / "server" / "experiment.toml").write_text(
        'name = "sites"\n[task]\nname = "jsonl"\n'
        f'train = "{root / "server" / "train.jsonl"}"\ntest = "{root / "server" / "test.jsonl"}"\n'
        f'[model]\nname = "{model}"\nprecision = "fp32"\n[model.lora]\nrank = 2\nalpha = 4\n'
        f'[algorithm]\nname = "scaffold"\n[train]\nrounds = {rounds}\nclients_per_round = 3\nlr = 5e-3\n'
        f'[eval]\nbootstrap = 20\n[fleet]\nname = "flower"\nwait = 900.0\ntimeout = 900.0\nabsent = 600.0\n{extra}'
    )
    file = root / "server" / "federation.toml"
    keys = "".join(f'{name} = "../keys/{name}.pub"\n' for name in names)
    file.write_text(
        f'experiment = "experiment.toml"\naddress = "127.0.0.1:{port}"\nca = "../keys/ca.crt"\n'
        f'certificate = "../keys/server.crt"\nkey = "../keys/server.key"\n[sites]\n{keys}'
    )
    return file


def in_one_process(federation: Path, out: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The result of the same experiment on the same data in this process, one client after the other."""
    config = FederationFile(federation, ["train.cohort=1", *overrides]).experiment
    all_samples, holdings = [], []
    for client, name in enumerate(config.fleet.options["sites"]):
        site = SiteFile(federation.parents[1] / name / "site.toml").data
        _, samples, _ = load_split(open_source(site.task), "train")
        all_samples += samples
        holdings += site.holdings(samples, client)
    config = config.model_copy(update={"fleet": Named(name="in-process")})
    parts = build(config)
    task, test, _ = load_split(parts.source, "test")
    data = Dataset(task, all_samples, test, 0, Manifest.of(holdings, config.partition.clients))
    return execute("federated", Session(parts, data), RunDir(out))


def with_site_names(rows: Sequence[dict[str, Any]], names: Sequence[str] = tuple(SITES)) -> list[dict[str, Any]]:
    """The rows of clients of a single-process run, with the names of the sites."""
    return [row | {"site": name} for row, name in zip(rows, names, strict=True)]


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def close(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[n], b[n], rtol=1e-6, atol=1e-6) for n in a)


# Processes

INTERVALS = {HEARTBEAT: "10", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5"}
"""Seconds. A node that was killed is back sooner, and Flower's processes spend less on asking each other for work."""


class Process:
    """A `fedmllm` command with its errors in a file."""

    def __init__(self, log: Path, *arguments: object) -> None:
        self.log = log
        with log.open("ab") as file:
            command = [sys.executable, "-m", "fedmllm", *map(str, arguments)]
            env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | INTERVALS
            self.popen = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, env=env, cwd=log.parent)

    def result(self, seconds: float) -> tuple[int, str]:
        """(exit status, standard output)."""
        out, _ = self.popen.communicate(timeout=seconds)
        return self.popen.returncode, out.decode()

    @property
    def is_running(self) -> bool:
        return self.popen.poll() is None

    def stop(self) -> int:
        """Stop it as a service manager would; its exit status."""
        self.popen.send_signal(signal.SIGTERM)
        self.popen.communicate(timeout=90)
        return self.popen.returncode

    def output(self) -> str:
        return self.log.read_text(errors="replace")


@contextmanager
def running(*processes: Process) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            if process.is_running:
                process.popen.terminate()
        for process in processes:
            if process.is_running:
                try:
                    process.popen.communicate(timeout=40)
                except subprocess.TimeoutExpired:
                    process.popen.kill()
                    process.popen.communicate()


@contextmanager
def superlink_on(root: Path, port: int, database: Path, home: Path) -> Iterator[None]:
    keys = root / "keys"
    command = [
        sys.executable, "-m", "fedmllm.remote.superlink", "--host", "127.0.0.1", "--port", str(port),
        "--ssl-ca-certfile", str(keys / "ca.crt"), "--ssl-certfile", str(keys / "server.crt"),
        "--ssl-keyfile", str(keys / "server.key"), "--enable-supernode-auth", "--database", str(database),
    ]  # fmt: skip
    with (root / "superlink.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment(home), stdout=log, stderr=log)
    try:
        wait_for(lambda: is_open(port), 300)
        yield
    finally:
        process.terminate()
        process.wait(20)


def commands() -> dict[int, str]:
    """pid -> command line, for all processes that have one."""
    lines = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                lines[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
    return {pid: line for pid, line in lines.items() if line}


def pid_of(*parts: str) -> int:
    """The only process whose command line contains all of these parts."""
    (pid,) = [pid for pid, line in commands().items() if all(part in line for part in parts)]
    return pid


def is_open(port: int) -> bool:
    """Whether a process listens on this port of the loopback interface."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_for(condition: Callable[[], Any], seconds: float) -> Any:
    """The first true value of `condition()`."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"the condition is still false after {seconds:g} s"
        time.sleep(0.2)
    return value


def rounds_done(run: Path) -> int:
    return len(RunDir(run).rounds())


__all__ = [
    "SITES", "Process", "adapter", "close", "commands", "in_one_process", "is_open", "pid_of", "rounds_done",
    "running", "superlink_on", "wait_for", "with_site_names", "write_federation", "write_samples",
]  # fmt: skip
