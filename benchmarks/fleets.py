"""What a round costs on each fleet: Ray's actors, Flower's simulation, and three sites connected to a SuperLink.

    python benchmarks/fleets.py [--rounds 5] [--only NAME …] [--json FILE]

All fleets do the same work: three clients with 300, 200 and 100 of the pictures of examples/hospitals take part in each round,
which has 150 steps, one client after the other and with one thread per client. Each fleet runs in processes of its own, as a
user would start it, and must produce the adapter of a single-process run; otherwise the benchmark fails. The time of a round is
the median over all rounds but the first, in which models are loaded and pictures encoded. It is divided by the time of a round
in a single process, which is measured before and after; so is the time of the first round. Masked updates are rounded to
integers, so fleets with secure aggregation are compared with a secure single-process run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from fedmllm.remote.supervisor import environment, tool
from fedmllm.storage.run_dir import RunDir
from fedmllm.tensors import distance

ROOT = Path(__file__).parents[1]
ORDER = ("east", "north", "south")
"""The sites as the partition "by-source" numbers them: the one with the most samples is client 0."""
FLEETS = (
    "in-process", "ray, 1 actor", "ray, 2 actors", "flower, simulated", "flower, 3 sites",
    "in-process, masked", "flower, 3 sites, masked", "in-process again",
)  # fmt: skip
MASKED = ["secure.name=pairwise"]
CORES = os.cpu_count() or 1
PATIENCE = 1800.0
"""The longest duration of a run, in seconds."""


def pictures_of(site: Path) -> list[dict[str, Any]]:
    return [s for s in map(json.loads, (site / "train.jsonl").read_text().splitlines()) if "image" in s]


def divide(folder: Path) -> None:
    """Give all sites pictures, and write the samples of all in one file, which the partition "by-source" divides in the same
    way. South, which has no pictures, gets a third of North's."""
    shutil.copytree(folder / "north" / "pictures", folder / "south" / "pictures", dirs_exist_ok=True)
    settings = folder / "south" / "site.toml"
    settings.write_text(settings.read_text().replace('["text"]', '["image"]'))
    north = pictures_of(folder / "north")
    bound = 2 * len(north) // 3
    samples = {"east": pictures_of(folder / "east"), "north": north[:bound], "south": north[bound:]}
    together = []
    for name in ORDER:
        (folder / name / "train.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples[name]))
        together += [s | {"image": f"{name}/{s['image']}", "source": name} for s in samples[name]]
    (folder / "together.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in together))


def settings(folder: Path, rounds: int) -> list[str]:
    """Overrides that turn the server's experiment into one whose clients are all on this machine."""
    task = {"train": folder / "together.jsonl", "test": folder / "server" / "test.jsonl"}
    paths = [f"task.{split}={path}" for split, path in task.items()]
    return [*paths, "partition.name=by-source", "partition.clients=3", *steps(rounds)]


def steps(rounds: int) -> list[str]:
    return [f"train.rounds={rounds}", "train.cohort=1"]


def fedmllm(*arguments: object, cwd: Path) -> subprocess.Popen[bytes]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "FEDMLLM_CACHE": str(cwd / "cache")}
    with (cwd / "benchmark.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "fedmllm", *map(str, arguments)], cwd=cwd, env=env, stdout=log, stderr=log
        )


def sets(overrides: Sequence[str]) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


def local(folder: Path, out: Path, rounds: int, *fleet: str) -> None:
    """Run in this process, or in Ray's actors."""
    overrides = [*fleet, *settings(folder, rounds)]
    process = fedmllm("run", folder / "server" / "experiment.toml", "--out", out, *sets(overrides), cwd=folder)
    if process.wait(PATIENCE):
        raise SystemExit((folder / "benchmark.log").read_text()[-2000:])


def simulated(folder: Path, out: Path, rounds: int) -> None:
    """Run `flwr run` with nodes that Flower simulates, each with one core."""
    home = folder / "flower"
    home.mkdir()
    (home / "config.toml").write_text('[superlink]\ndefault = "local"\n[superlink.local]\naddress = ":local:"\n')
    config = {"experiment": folder / "server" / "experiment.toml", "out": out, "overrides": ";".join(settings(folder, rounds))}
    command = [
        tool("flwr"), "run", str(ROOT / "examples" / "flower"), "local",
        "--federation-config", "num-supernodes=3 client-resources-num-cpus=1",
        "-c", " ".join(f"{key}={json.dumps(str(value))}" for key, value in config.items()),
    ]  # fmt: skip
    env = environment(home) | {"FEDMLLM_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    try:
        subprocess.run(command, env=env, check=True, capture_output=True, timeout=300)
        end = time.monotonic() + PATIENCE
        while not (out / "result.json").is_file():
            if time.monotonic() > end:
                raise SystemExit(f"the simulation did not finish within {PATIENCE:g} s")
            time.sleep(1)
    finally:
        for pid in superlinks(home):
            os.kill(pid, signal.SIGTERM)


def superlinks(home: Path) -> list[int]:
    """The SuperLinks that `flwr run` leaves running."""
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [int(line.split()[0]) for line in listed if "flower-superlink" in line and str(home) in line]


def sites(folder: Path, out: Path, rounds: int, *overrides: str) -> None:
    """Run over TLS with a SuperLink and three sites, which share the cores."""
    clients = [fedmllm("client", "site.toml", cwd=folder / name) for name in ORDER]
    try:
        arguments = sets([f"fleet.sites={json.dumps(ORDER)}", *steps(rounds), *overrides])
        server = fedmllm("server", "federation.toml", "--out", out, *arguments, cwd=folder / "server")
        if server.wait(PATIENCE):
            raise SystemExit((folder / "server" / "benchmark.log").read_text()[-2000:])
    finally:
        for client in clients:
            client.send_signal(signal.SIGTERM)
        for client in clients:
            client.wait(60)


def run(name: str, folder: Path, out: Path, rounds: int) -> None:
    secure = MASKED if name.endswith("masked") else []
    if name.startswith("in-process"):
        local(folder, out, rounds, "fleet.name=in-process", *secure)
    elif name.startswith("ray"):
        actors = int(name.split()[1])
        local(folder, out, rounds, "fleet.name=ray", f"fleet.actors={actors}", "fleet.cpus=1")
    elif name == "flower, simulated":
        simulated(folder, out, rounds)
    else:
        sites(folder, out, rounds, *secure)


def seconds(out: Path) -> tuple[float, float]:
    """(seconds of the first round, median seconds of the others)."""
    first, *others = [float(record["seconds"]) for record in RunDir(out).rounds()]
    return first, statistics.median(others)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=FLEETS, default=FLEETS, help="in addition to in-process")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    names = [name for name in FLEETS if name in {"in-process", *arguments.only}]
    if "flower, 3 sites, masked" in names and "in-process, masked" not in names:
        parser.error('"flower, 3 sites, masked" is compared with "in-process, masked"; name both')
    with tempfile.TemporaryDirectory(prefix="fleets-") as temporary:
        folder = Path(temporary) / "hospitals"
        prepare = [sys.executable, str(ROOT / "examples" / "hospitals" / "run.py"), "--out", str(folder), "--prepare"]
        subprocess.run(prepare, check=True, capture_output=True)
        divide(folder)
        measured, adapters = {}, {}
        for number, name in enumerate(names):
            print(f"{name} …", file=sys.stderr, flush=True)
            out = folder / f"run-{number}"
            run(name, folder, out, arguments.rounds)
            measured[name] = seconds(out)
            adapters[name] = load_file(out / "adapter" / "adapter_model.safetensors")
            shutil.rmtree(out)
    single = statistics.mean(later for name, (_, later) in measured.items() if name in ("in-process", "in-process again"))
    rows = {
        name: {
            "ratio": later / single,
            "first": first / single,
            "seconds_more": later - single,
            "differs_by": distance(adapters[name], adapters["in-process, masked" if name.endswith("masked") else "in-process"]),
        }
        for name, (first, later) in measured.items()
    }
    print(
        f"{'fleet':20s} {'round / in-process':>20s} {'first round':>12s} {'s more per round':>16s} {'adapter differs by':>19s}"
    )
    for name, row in rows.items():
        print(f"{name:20s} {row['ratio']:20.2f} {row['first']:12.2f} {row['seconds_more']:16.1f} {row['differs_by']:19.1e}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"rounds": arguments.rounds, "cores": CORES, "fleets": rows}, indent=2))
    return 0 if all(row["differs_by"] < 1e-6 for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
