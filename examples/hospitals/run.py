"""Three hospitals of different modalities and a server, on this machine, as they would be on four.

    python examples/hospitals/run.py [--out DIR] [--rounds 4] [--prepare]

`DIR/server`, `DIR/north`, `DIR/south` and `DIR/east` stand for four machines: nothing is read across them but through the
network, and what is copied between them is what would be sent by mail: public keys one way, the authority's certificate the
other. `--prepare` writes the folders and starts nothing.
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
"""name -> the modalities it has. In this order they are clients 0, 1, 2."""
PICTURES, TEXTS, TEST = 300, 150, 100
"""Samples of each kind that a site has, and that the server tests on."""
FEDMLLM = [sys.executable, "-m", "fedmllm"]


def write_data(folder: Path, split: str, samples: Sequence[Sample]) -> None:
    """Samples as the `jsonl` task reads them, pictures beside the file."""
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


def deal(split: str) -> Iterator[tuple[list[Sample], list[Sample]]]:
    """(questions about pictures, questions about texts), site after site, no sample twice."""
    pictures, texts = (
        [s for s in tasks.build(name, {}).load(split) if isinstance(s, Sample)]  # type: ignore[arg-type]
        for name in ("easy-vqa", "shapes-qa")
    )
    while True:
        yield pictures[:PICTURES], texts[:TEXTS]
        pictures, texts = pictures[PICTURES:], texts[TEXTS:]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def fedmllm(*arguments: object) -> None:
    subprocess.run([*FEDMLLM, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def prepare(out: Path, rounds: int) -> None:
    """What each of the four would do on its own machine, in the order of docs/deploy.md."""
    server, port, dealt = out / "server", free_port(), deal("train")
    fedmllm("keys", server / "keys", "--host", "127.0.0.1")
    for name, modalities in SITES.items():
        site, (pictures, texts) = out / name, next(dealt)
        write_data(site, "train", (pictures if "image" in modalities else []) + (texts if "text" in modalities else []))
        fedmllm("keys", site, "--site", name)
        shutil.copy(site / f"{name}.pub", server / "keys")
        shutil.copy(server / "keys" / "ca.crt", site)
        (site / "site.toml").write_text(
            f'name = "{name}"\nsuperlink = "127.0.0.1:{port}"\nca = "ca.crt"\nkey = "{name}.key"\n'
            f'jsonl = "train.jsonl"\nmodalities = {json.dumps(modalities)}\n'
        )
    pictures, texts = next(deal("test"))
    write_data(server, "test", pictures[:TEST] + texts[:TEST])
    shutil.copy(HERE / "experiment.toml", server)
    federation = (HERE / "federation.toml").read_text().replace("0.0.0.0:9092", f"127.0.0.1:{port}")
    (server / "federation.toml").write_text(federation)
    text = (server / "experiment.toml").read_text().replace("rounds = 4", f"rounds = {rounds}")
    (server / "experiment.toml").write_text(text)


def start(out: Path) -> int:
    """Start the sites and the server, wait for the server, and end the sites. The server's exit status."""
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
            print(f"three sites and a server are at work; what they say is in {out}/*.log", flush=True)
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
    parser.add_argument("--prepare", action="store_true", help="write the folders and start nothing")
    arguments = parser.parse_args()
    if arguments.out.exists():
        print(f"{arguments.out} is there already; remove it, or give another --out", file=sys.stderr)
        return 2
    prepare(arguments.out, arguments.rounds)
    return 0 if arguments.prepare else start(arguments.out)


if __name__ == "__main__":
    # Ended by a signal, it ends what it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
