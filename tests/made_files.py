"""Valid contents of every kind of file and message that fedmllm reads, and strategies that change one thing in them.

What a parser refuses says nothing about what comes after it, so most cases are well-formed and wrong in one place: a type, a
key, a number, a text, the depth. The others are damaged as a disk or a network damages bytes.
"""

from __future__ import annotations

import copy
import io
import json
import lzma
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import tomli_w
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from fedmllm.evaluation.answers import test_digest
from fedmllm.remote.protocol import Job, Reply, to_bytes

T = TypeVar("T")
DEEP = "deeply nested"
"""In a value, stands for more lists inside one another than any parser follows."""
NUMBERS = (
    0,
    -1,
    1,
    3,
    2**31,
    2**63,
    -(2**63) - 1,
    10**9,
    10**400,
    0.5,
    -0.0,
    1e308,
    -1e308,
    5e-324,
    float("inf"),
    float("nan"),
)
TEXTS = (
    "", " ", "x", "0", "none", "nan", "é", "\x00", "\x1b[2J", "a\nb", "a\r\n\tb", "../../x", "/etc/passwd", "C:\\x", "~",
    "..", ".", "<script>alert(1)</script>", "[/red]", "{name}", "%s%n", "|", "`", "\u202e", "\u2028", "\ud800", "💥" * 9,
    "x" * 5_000, "a.b", "data\\new", "=1+1", "-x", "*",
)  # fmt: skip
OTHERS = (None, True, False, [], {}, [[]], [None], {"": None}, {"name": "x"}, {"name": {}}, ["x", 1], [[], {}], [0] * 300, DEEP)


def anything() -> SearchStrategy[Any]:
    return st.sampled_from((*NUMBERS, *TEXTS, *OTHERS))


def _places(container: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of the values inside, at any depth; of a long list, those of its first entries."""
    lists = enumerate(container[:6]) if isinstance(container, list) else ()
    entries = container.items() if isinstance(container, dict) else lists
    for key, value in entries:
        yield container, key
        yield from _places(value)


OPERATIONS = ("replace", "replace", "replace", "like", "remove", "rename", "add", "copy", "wrap")


@st.composite
def mutated(draw: DrawFn, valid: SearchStrategy[Any]) -> Any:
    """A copy of a valid value in which one thing is changed; DEEP may be in it."""
    root = [copy.deepcopy(draw(valid))]
    places = list(_places(root))
    container, key = places[draw(st.integers(0, len(places) - 1))]
    value, operation = container[key], draw(st.sampled_from(OPERATIONS))
    if operation == "like":  # another value of the same type passes the first check
        of_type = NUMBERS if isinstance(value, int | float) else TEXTS if isinstance(value, str) else OTHERS
        container[key] = draw(st.sampled_from(of_type))
    elif operation == "copy":
        source, name = places[draw(st.integers(0, len(places) - 1))]
        container[key] = copy.deepcopy(source[name])
    elif operation == "wrap":
        container[key] = draw(st.sampled_from(([value], {"name": value}, [value, copy.deepcopy(value)])))
    elif operation == "add" and isinstance(value, dict | list):
        entry = draw(anything())
        value.append(entry) if isinstance(value, list) else value.update({draw(st.sampled_from(TEXTS)): entry})
    elif operation == "rename" and isinstance(container, dict):
        container[draw(st.sampled_from(TEXTS))] = container.pop(key)
    elif operation == "remove" and container is not root:
        del container[key]
    else:
        container[key] = draw(anything())
    return root[0]


@st.composite
def damaged(draw: DrawFn, content: bytes) -> bytes:
    """The bytes after one accident: cut, a bit flipped, bytes inserted, lost or repeated, or all of them replaced."""
    start, stop = sorted(draw(st.tuples(*[st.integers(0, len(content))] * 2)))
    accident = draw(st.sampled_from(("flip", "flip", "flip", "cut", "insert", "lose", "repeat", "replace")))
    if accident == "flip" and start < len(content):
        flipped = content[start] ^ 1 << draw(st.integers(0, 7))
        return content[:start] + bytes([flipped]) + content[start + 1 :]
    if accident == "cut":
        return content[:start]
    if accident in ("insert", "replace"):
        noise = draw(
            st.sampled_from((b"", b"\x00" * 9, b"\xff\xfe", b"\xef\xbb\xbf", b"[" * 9_000, b"{}", b'"', b"\n", b"1" * 5_000))
        )
        return noise if accident == "replace" else content[:start] + noise + content[start:]
    return content[:start] + (content[stop:] if accident == "lose" else content[start:stop] + content[start:])


def cases(valid: SearchStrategy[T], dump: Callable[[Any], bytes]) -> SearchStrategy[bytes]:
    """The bytes of valid values of which three in four have one wrong value, and one in four is damaged."""
    wrong = mutated(valid).map(dump)
    return st.one_of(wrong, wrong, wrong, valid.map(dump).flatmap(damaged))


# Formats


def _with_depth(text: str) -> bytes:
    return text.replace(f'"{DEEP}"', "[" * 20_000 + "]" * 20_000).encode(errors="surrogatepass")


def as_json(value: Any) -> bytes:
    return _with_depth(json.dumps(value))


def as_lines(value: Any) -> bytes:
    return b"".join(as_json(line) + b"\n" for line in value) if isinstance(value, list) else as_json(value)


def as_toml(value: Any) -> bytes:
    plain = _without_none(value)
    return _with_depth(tomli_w.dumps(plain if isinstance(plain, dict) else {} if plain is None else {"name": plain}))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(entry) for key, entry in value.items() if entry is not None}
    return [_without_none(entry) for entry in value if entry is not None] if isinstance(value, list) else value


def of_safetensors(content: bytes) -> SearchStrategy[bytes]:
    """A safetensors file with one change in its header, or damaged."""
    size = 8 + int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8:size]), content[size:]

    def dump(changed: Any) -> bytes:
        text = as_json(changed)
        return len(text).to_bytes(8, "little") + text + data

    return st.one_of(mutated(st.just(header)).map(dump), damaged(content))


def messages(valid: Job | Reply) -> SearchStrategy[bytes]:
    """A message of the protocol with one change in its own header, in that of its file, or damaged."""
    content = to_bytes(valid)
    size = 8 + int.from_bytes(content[:8], "little")

    def dump(changed: Any) -> bytes:
        head = as_json(changed).decode(errors="replace")
        text = as_json(json.loads(content[8:size]) | {"__metadata__": {"head": head}})
        return len(text).to_bytes(8, "little") + text + content[size:]

    own = mutated(st.just(json.loads(valid.header()))).map(dump)
    return st.one_of(own, own, of_safetensors(content))


def of_compressed(content: bytes) -> SearchStrategy[bytes]:
    """An .xz file that is damaged, or whose content was damaged before it was compressed, which no checksum tells."""
    inner = damaged(lzma.decompress(content)).map(lambda tar: lzma.compress(tar, preset=0))
    return st.one_of(damaged(content), inner, inner)


def of_parquet(columns: Mapping[str, Any], metadata: Mapping[str, str], whole: bytes) -> SearchStrategy[bytes]:
    """A Parquet file with one change in its columns or metadata, as far as the format can hold it, or damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def dump(changed: Any) -> bytes:
        buffer = io.BytesIO()
        try:
            table = pa.table(changed["columns"]).replace_schema_metadata(changed["metadata"])
            pq.write_table(table, buffer)
        except Exception:  # this change has no such file
            return whole
        return buffer.getvalue()

    changed = mutated(st.just({"columns": dict(columns), "metadata": dict(metadata)})).map(dump)
    return st.one_of(changed, changed, damaged(whole))


# Valid values

TASKS: tuple[dict[str, Any], ...] = (
    {"name": "shapes-qa", "train": 40, "test": 20},
    {"name": "jsonl", "train": "train.jsonl", "test": "test.jsonl", "metric": "auc", "positive": "yes"},
    {"name": "easy-vqa", "companion": {"name": "shapes-qa"}, "train_samples": 9, "on_bad_sample": "skip"},
    {"name": "pocket-memes", "n": 30},
    {"name": "easy-vqa", "draw": 3},
    {"name": "hub", "dataset": "owner/set", "answer": "label", "question": "text"},
)
PARTS: dict[str, tuple[dict[str, Any], ...]] = {
    "partition": ({"name": "iid", "clients": 4}, {"name": "dirichlet", "clients": 8, "alpha": 0.5},
                  {"name": "by-source", "clients": 3}),
    "scenario": ({"name": "aligned"}, {"name": "missing", "rate": 0.3}, {"name": "cross", "image_clients": 0.5},
                 {"name": "hybrid", "presence": 0.7, "coin": "client"}),
    "prompt": ({"name": "modality-agnostic"}, {"name": "modality-specific"}),
    "algorithm": ({"name": "fedavg", "server_lr": 1.0}, {"name": "fedprox", "mu": 0.1}, {"name": "fedadam", "tau": 1e-3},
                  {"name": "scaffold"}),
    "compression": ({"name": "none"}, {"name": "top-k"}),
    "secure": ({"name": "none"},),
    "judge": ({"name": "none"}, {"name": "openai", "endpoint": "http://127.0.0.1:9/v1", "model": "m"}),
    "fleet": ({"name": "in-process"}, {"name": "flower", "timeout": 60.0}),
}  # fmt: skip
TABLES: dict[str, Any] = {
    "name": "made", "seed": 1, "clients": {"rank": []},
    "model": {"name": "pocket", "adapter": {"kind": "lora"},
              "lora": {"rank": 4, "alpha": 8.0, "dropout": 0.1, "target": "q_proj"}},
    "train": {"rounds": 3, "clients_per_round": 2, "batch_size": 4, "lr": 5e-3, "optimizer": "sgd", "max_norm_ratio": 10.0},
    "eval": {"every": 1, "patterns": ["both", "image"], "split": "test", "match": "squad", "transfer": [{"name": "shapes-qa"}]},
    "track": {"with": ["tensorboard"], "project": "made", "folder": "board", "options": {"wandb": {"mode": "offline"}}},
}  # fmt: skip


@st.composite
def experiments(draw: DrawFn) -> dict[str, Any]:
    """The tables of an experiment file, each of them there or not."""
    raw: dict[str, Any] = {"task": draw(st.sampled_from(TASKS))}
    raw |= {table: draw(st.sampled_from(parts)) for table, parts in PARTS.items()}
    kept = draw(st.integers(1, 2 ** len(TABLES) - 1))
    return copy.deepcopy(raw | {key: TABLES[key] for number, key in enumerate(TABLES) if kept >> number & 1})


SWEEP: dict[str, Any] = {
    "name": "made", "base": "experiment.toml", "margin": 1.5, "set": {"train.rounds": 2, "model": {"lora": {"rank": 8}}},
    "axes": [
        {"name": "place", "cells": [{"name": "β = 0.3", "set": {"scenario": {"name": "missing", "rate": 0.3}}},
                                    {"name": "aligned", "set": {"scenario.name": "aligned"}}]},
        {"name": "method", "cells": [{"name": "zero-shot", "kind": "zero-shot"}, {"name": "FedAvg"},
                                     {"name": "FedProx", "set": {"algorithm.name": "fedprox"}}]},
    ],
}  # fmt: skip


def sweeps() -> SearchStrategy[dict[str, Any]]:
    return st.sampled_from(({"seeds": [0, 1]}, {"replicates": 2}, {})).map(lambda extra: SWEEP | extra)


SITE = {
    "name": "north", "superlink": "127.0.0.1:9092", "ca": "keys/ca.crt", "key": "keys/north.key",
    "modalities": ["image", "text"], "device": "cpu", "model": "", "trust_remote_code": False, "secure": False,
    "state": "state",
}  # fmt: skip
SITES: tuple[dict[str, Any], ...] = (
    SITE | {"jsonl": "train.jsonl", "jsonl_test": "test.jsonl"},
    SITE | {"task": {"name": "jsonl", "train": "train.jsonl", "test": "test.jsonl", "companion": {"name": "shapes-qa"}}},
)
FEDERATION = {
    "experiment": "experiment.toml", "address": "127.0.0.1:9092", "ca": "keys/ca.crt", "certificate": "keys/server.crt",
    "key": "keys/server.key", "state": "state", "retries": 5, "sites": {"north": "keys/north.pub", "south": "keys/south.pub"},
}  # fmt: skip
SAMPLES: list[dict[str, Any]] = [
    {
        "id": "a",
        "image": "red.png",
        "text": "a red thing",
        "question": "which color?",
        "choices": ["red", "blue"],
        "answer": "red",
    },
    {"id": 7, "text": "a text", "question": "yes?", "answer": "yes", "label": "yes", "source": "north"},
    {"id": "c", "image": "red.png", "question": "how many?", "answer": 3},
    {"id": "d", "text": "t", "choices": ["A", "B", "C"], "answer": "B"},
]
SETTINGS = (
    "train.rounds=5", "task.name=shapes-qa", "eval.patterns=['both', 'text']", "scenario = {name = 'missing', rate = 0.2}",
    "name=x", "model.lora.alpha=4.5", "clients.rank=[1, 2]", "task.companion={name='shapes-qa'}", "algorithm.name=fedprox",
    "seed=3",
    "model.trust_remote_code=true", "partition.clients=3", "eval.transfer=[{name = 'shapes-qa'}]", "task.train='a.jsonl'",
)  # fmt: skip


@st.composite
def settings_texts(draw: DrawFn) -> str:
    """The argument of `--set`, with another value, or damaged."""
    text = draw(st.sampled_from(SETTINGS))
    key, value = text.split("=", 1)
    other = draw(st.one_of(anything(), mutated(experiments())))
    written = as_toml({"x": other}).decode(errors="surrogateescape").removeprefix("x = ").strip()
    other_key = draw(
        st.sampled_from((key, key, *(f"{key}.{t}" for t in TEXTS), *(f"{t}.{key}" for t in TEXTS), key + ".a" * 3_000))
    )
    whole = draw(damaged(text.encode())).decode(errors="surrogateescape")
    return draw(st.sampled_from((f"{key}={written}", f"{other_key}={value}", f"{key}={draw(st.sampled_from(TEXTS))}", whole)))


# A run's folder: `result.json` with every key, as a run of this version writes it (test_runs compares the keys).

PREDICTIONS: list[dict[str, Any]] = [
    {"pattern": pattern, "id": f"s{i}", "answer": answer, "predicted": "a", "correct": answer == "a", "closed": True,
     "failed": False, "score": 0.5, "judged": None, "option": 0}
    for pattern in ("both", "image") for i, answer in enumerate("ababab")
]  # fmt: skip
_METRICS = {
    "n": 6, "parse_failures": 0, "accuracy": 0.5, "accuracy_ci": [0.2, 0.8], "accuracy_closed": 0.5,
    "accuracy_closed_ci": [0.2, 0.8],
    "macro_f1": 0.4, "macro_f1_ci": [0.1, 0.7], "majority": 0.5, "chance": 0.5, "ceiling": 0.9, "accuracy_worst_decile": 0.25,
}  # fmt: skip
_SHARES = {"both": 0.5, "image": 0.25, "text": 0.25, "none": 0.0}
RESULT: dict[str, Any] = {
    "schema": 1, "name": "made", "kind": "federated", "task": "jsonl", "scenario": "aligned", "partition": "iid",
    "algorithm": "fedavg", "regularization": "none", "compression": "none", "secure": "none", "robust": "median",
    "privacy": "user-level", "attack": "alie", "asynchronous": "none", "prompt": "modality-agnostic",
    "model": "pocket", "adapter": "lora", "seed": 0, "draw": None, "primary_metric": "accuracy", "positive": None,
    "asks": {"question": None, "choices": ["yes", "no"], "lettered": False},
    "match": "exact", "judge": "none", "metrics": {"both": _METRICS, "image": _METRICS},
    "test_digest": test_digest(PREDICTIONS),
    "bootstrap_scores": {"both": [0.4, None, *[0.5, 0.6] * 99]},
    "transfer": {"shapes-qa": {"primary_metric": "accuracy", "metrics": {"both": _METRICS}}},
    "per_client": [{"client": 0, "samples": 4, "image": 2, "text": 4, "gap": 0.25, "rounds": 2, "score": 0.5,
                    "metrics": {"both": _METRICS}}],
    "clients": {"n": 2, "mean": 0.5, "sd": 0.1, "worst_decile": 0.4},
    "modalities": {"drawn": _SHARES, "expected": _SHARES, "dropped": 0,
                   "absence": {"majority": 0.5, "accuracy": 0.6, "information": 0.1}},
    "suites": {"corruption": {"tables": {"robustness": {"blur": {"both": 0.9}}}, "unavailable": [], "details": {}}},
    "simulated_seconds": 120.5,
    "kept": [{"group": "paired", "attacker": False, "clients": 2, "updates": 3, "refused": 1, "kept": 0.5, "below_half": 0.25}],
    "privacy_spent": {"epsilon": 1.5, "delta": 1e-4, "noise": 1.0, "clip": 0.1, "clipping": "fixed", "sampling": "poisson",
                      "probability": 0.1, "unit": "client", "neighbours": "add or remove one"},
    "rounds": 2, "keep": "best", "kept_rounds": [1], "stopped_early": False,
    "cohort": 1, "bytes_up": {"adapter": 1000}, "bytes_down": {"adapter": 1000},
    "bytes_by_part": {"up": {"text": 600, "projector": 400}, "down": {"text": 600, "projector": 400}},
    "adapter_parameters": {"text": 60, "projector": 40},
    "seconds": {"total": 12.0, "train": 10.0, "eval": 1.0, "setup": 1.0}, "peak_memory_mb": 500, "config_digest": "d" * 64,
    "manifest_digest": "e" * 64, "adapter_sha256": "f" * 64, "skipped_samples": 0, "refused_updates": 0,
}  # fmt: skip
ROUNDS: list[dict[str, Any]] = [
    {"round": number, "lr": 0.01, "sampled": [0, 1], "examples": 8, "steps": 2, "loss": 0.5, "bytes_down": {"adapter": 500},
     "bytes_up": {"adapter": 500}, "parts_down": {"text": 500}, "parts_up": {"text": 500},
     "refused": [{"client": 1, "why": "its norm"}], "seconds": 0.5, "padding": 0.1,
     "metrics": {"both": _METRICS}, "kept": {"0": 0.5}, "privacy": {"epsilon": 0.5, "clip": 0.1},
     "clock": {"began": 60.25 * number, "seconds": 60.25, "clients": {"0": {"compute": 60.25, "transfer": 0.0}}, "lost": [1]},
     "stopped": False}
    for number in range(2)
]  # fmt: skip
META = {
    "kind": "federated", "run_id": "a" * 16, "config_digest": "d" * 64, "manifest_digest": "e" * 64,
    "versions": {"fedmllm": "0.2.0"}, "git_commit": None, "hardware": {"device": "cpu", "threads": 1}, "caches_features": True,
}  # fmt: skip
CONFIG: dict[str, Any] = {
    "name": "made", "seed": 0, "task": {"name": "jsonl", "train": "train.jsonl", "test": "test.jsonl"},
    "scenario": {"name": "missing", "rate": 0.3}, "partition": {"name": "iid", "clients": 2}, "train": {"rounds": 2},
    "eval": {"patterns": ["both"]},
}  # fmt: skip
