"""Run three hospitals with different modalities and a server on this machine, set up as they would be on four machines.

    python examples/hospitals/run.py [--out DIR] [--rounds 4] [--prepare [--host NAME --port NUMBER]]

`DIR/server`, `DIR/north`, `DIR/south` and `DIR/east` stand for four machines: no process reads another one's folder, and only
public keys (to the server) and the authority's certificate (to the sites) are copied between them. `--prepare` only writes
the folders, for a server that the sites reach at this name and port.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedmllm.data.samples import Sample
from fedmllm.data.tasks import tasks

HERE = Path(__file__).parent
SITES = {"north": ["image"], "south": ["text"], "east": ["image", "text"]}
"""name -> modalities of the site. In this order the sites are clients 0, 1 and 2."""
PICTURES, TEXTS, TEST = 300, 150, 100
"""Numbers of samples: questions about pictures and about texts per site, and of each kind in the server's test set."""
LOCAL = "127.0.0.1"
FEDMLLM = [sys.executable, "-m", "fedmllm"]


def write_data(folder: Path, split: str, samples: Sequence[Sample]) -> None:
    """Write samples in the format of the `jsonl` task, with the pictures in a folder beside the file."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    with (folder / f"{split}.jsonl").open("w") as file:
        for sample in samples:
            line = {"id": sample.id, "question": sample.question, "answer": sample.answer}
            if sample.choices:
                line["choices"] = list(sample.choices)
            if sample.text:
                line["text"] = sample.text
            if sample.image is not None:
                picture = f"pictures/{sample.id.replace('/', '-')}.png"
                content = sample.image if isinstance(sample.image, bytes) else sample.image.read_bytes()
                (folder / picture).write_bytes(content)
                line["image"] = picture
            file.write(json.dumps(line) + "\n")


def divide(split: str) -> Iterator[tuple[list[Sample], list[Sample]]]:
    """Yield (questions about pictures, questions about texts) for one site after another, without repeating a sample."""
    pictures, texts = (
        [s for s in tasks.build(name, {}).load(split) if isinstance(s, Sample)]  # type: ignore[arg-type]
        for name in ("easy-vqa", "shapes-qa")
    )
    while True:
        yield pictures[:PICTURES], texts[:TEXTS]
        pictures, texts = pictures[PICTURES:], texts[TEXTS:]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOCAL, 0))
        return int(probe.getsockname()[1])


def fedmllm(*arguments: object) -> None:
    subprocess.run([*FEDMLLM, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def prepare(out: Path, rounds: int, host: str, port: int) -> None:
    """Do what each party would do on its own machine, in the order of docs/deploy.md."""
    server, shares = out / "server", divide("train")
    fedmllm("keys", server / "keys", "--host", host)
    for name, modalities in SITES.items():
        site, (pictures, texts) = out / name, next(shares)
        write_data(site, "train", (pictures if "image" in modalities else []) + (texts if "text" in modalities else []))
        fedmllm("keys", site, "--site", name)
        shutil.copy(site / f"{name}.pub", server / "keys")
        shutil.copy(server / "keys" / "ca.crt", site)
        (site / "site.toml").write_text(
            f'name = "{name}"\nsuperlink = "{host}:{port}"\nca = "ca.crt"\nkey = "{name}.key"\n'
            f'jsonl = "train.jsonl"\nmodalities = {json.dumps(modalities)}\n'
        )
    pictures, texts = next(divide("test"))
    write_data(server, "test", pictures[:TEST] + texts[:TEST])
    shutil.copy(HERE / "experiment.toml", server)
    federation = (
        (HERE / "federation.toml").read_text().replace("0.0.0.0:9092", f"{LOCAL if host == LOCAL else '0.0.0.0'}:{port}")
    )
    (server / "federation.toml").write_text(federation)
    text = (server / "experiment.toml").read_text().replace("rounds = 4", f"rounds = {rounds}")
    (server / "experiment.toml").write_text(text)


def start(out: Path) -> int:
    """Start the sites and the server, wait for the server, stop the sites, and return the server's exit status."""
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}  # three models share this machine
    sites = []
    try:
        for name in SITES:
            with (out / f"{name}.log").open("w") as log:
                sites.append(
                    subprocess.Popen([*FEDMLLM, "client", "site.toml"], cwd=out / name, stderr=log, env=os.environ | threads)
                )
        with (out / "server.log").open("w") as log:
            command = [*FEDMLLM, "server", "federation.toml", "--out", "run"]
            print(f"three sites and a server are running; their output is in {out}/*.log", flush=True)
            return subprocess.run(command, cwd=out / "server", stderr=log, env=os.environ | threads).returncode
    finally:
        for site in sites:
            site.send_signal(signal.SIGTERM)
        for site in sites:
            site.wait(60)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/hospitals"))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--prepare", action="store_true", help="only write the folders")
    parser.add_argument("--host", default=LOCAL, help="with --prepare, the name or address by which sites reach the server")
    parser.add_argument("--port", type=int, help="with --prepare, the server's port; by default one that is free here")
    arguments = parser.parse_args()
    if arguments.out.exists():
        print(f"{arguments.out} exists already; remove it, or choose another --out", file=sys.stderr)
        return 2
    if (arguments.host != LOCAL or arguments.port) and not arguments.prepare:
        parser.error("--host and --port are for --prepare: without it, all processes run on this machine")
    prepare(arguments.out, arguments.rounds, arguments.host, arguments.port or free_port())
    return 0 if arguments.prepare else start(arguments.out)


if __name__ == "__main__":
    # Turn SIGTERM into SystemExit, so that the sites are stopped too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
