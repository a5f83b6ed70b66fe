"""What a broken disk does to a run's folder: every file that is read later is found damaged, and named, or made up for."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from commands import call, run
from fedmllm.config import Experiment
from fedmllm.data import manifest as manifests
from fedmllm.errors import RunError, UserError
from fedmllm.fleets.memory import ClientMemory
from fedmllm.models.adapter import read_adapter
from fedmllm.runs.directory import choose_directory
from fedmllm.storage import state_file
from fedmllm.storage.run_dir import RunDir, unfinished
from fedmllm.storage.state_file import load_state, save_state
from fedmllm.tensors import digest, flatten
from helpers import same
from made_checkpoints import ROUNDS, made_run, record_of, state_after


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def flip_last(file: Path) -> None:
    flip(file, 8 * file.stat().st_size - 3)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def as_list(file: Path) -> None:
    file.write_text("[]\n")


def nested(file: Path) -> None:
    file.write_text("[" * 100_000)


def not_text(file: Path) -> None:
    file.write_bytes(b"\xff\xfe\x00")


Damage = Callable[[Path], None]
BINARY: tuple[Damage, ...] = (flip_last, cut, empty, as_list)
TEXT: tuple[Damage, ...] = (cut, empty, as_list, nested, not_text)

READERS: dict[str, tuple[Callable[[RunDir], object], tuple[Damage, ...], str]] = {
    "result.json": (RunDir.result, TEXT, "delete it and give the run's command again with --resume"),
    "meta.json": (RunDir.meta, TEXT, "restore it from a copy, or start a new run"),
    "config.toml": (RunDir.settings, (cut, nested, not_text), "restore it from a copy, or start a new run"),
    "predictions.jsonl": (RunDir.predictions, (cut, as_list, nested, not_text), "restore it from a copy"),
    "manifest.parquet": (lambda run: manifests.read(run.manifest), BINARY, "manifest"),
    "adapter/adapter_model.safetensors": (lambda run: read_adapter(run.adapter), BINARY, "run the experiment again"),
    "checkpoint/clients/client-0/round-0.safetensors": (
        lambda run: ClientMemory(run.checkpoint / "clients").load(0, 1), BINARY, "restore it from a copy, or start a new run"
    ),
}  # fmt: skip
"""file -> (what reads it, the damages, what its message says to do)."""


@pytest.mark.parametrize("file", READERS)
def test_a_damaged_file_is_named_with_what_to_do(tmp_path: Path, file: str) -> None:
    read, damages, remedy = READERS[file]
    whole = made_run(tmp_path / "whole")
    whole.finish({"metrics": {}, "rounds": ROUNDS})
    read(whole)
    for damage in damages:
        shutil.copytree(whole.path, tmp_path / damage.__name__)
        damage(tmp_path / damage.__name__ / file)
        with pytest.raises(UserError) as error:
            read(RunDir(tmp_path / damage.__name__))
        assert Path(file).name in str(error.value), damage
        assert remedy in str(error.value), damage
        assert str(tmp_path / damage.__name__) in str(error.value), damage


WRONG_RESULTS = {
    '{"metrics": []}': "metrics: ",
    '{"metrics": {}, "per_client": {}}': "per_client: ",
    '{"per_client": ["x"]}': "AttributeError",
    '{"metrics": {"both": []}}': "metrics.both: ",
    '{"metrics": {"both": {"accuracy": "0.5"}}}': "'0.5' is in the place of a score",
    '{"metrics": {"both": {"accuracy": true}}}': "'True' is in the place of a score",
    '{"metrics": {"both": {"accuracy": 1e300}}}': "'1e+300' is in the place of a score",
    '{"metrics": {"both": {"accuracy": Infinity}}}': "'inf' is in the place of a score",
    '{"metrics": {"both": {"accuracy": {}}}}': "metrics.both.accuracy.float: ",
    '{"metrics": {"both": {"accuracy_ci": [0.1]}}}': "metrics.both.accuracy_ci.",
    '{"bootstrap_scores": {"both": [{}]}}': "bootstrap_scores.both.0: ",
    '{"primary_metric": {}}': "primary_metric: ",
    '{"kind": "best"}': "kind: ",
    '{"suites": []}': "suites: ",
    '{"transfer": {"qa": {"metrics": {}}}}': "transfer.qa.primary_metric: ",
    '{"clients": {"worst_decile": "x"}}': "clients.worst_decile: ",
    '{"modalities": {"drawn": {}, "expected": null}}': "modalities.drawn.both: ",
    '{"modalities": 5}': "modalities: ",
    '{"rounds": "3"}': "rounds: ",
    '{"rounds": -1}': "rounds: ",
    '{"bytes_up": {"adapter": 1e400}}': "bytes_up.adapter: ",
    f'{{"bytes_down": {{"adapter": 1{"0" * 400}}}}}': "bytes_down.adapter: ",
    '{"seconds": {"total": null}}': "seconds.total: ",
    '{"seconds": {"total": 1e308}}': "seconds.total: ",
}


@pytest.mark.parametrize("content", WRONG_RESULTS)
def test_a_result_of_the_wrong_shape_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(RunError, match=r"result\.json cannot be read") as error:
        RunDir(tmp_path).result()
    assert WRONG_RESULTS[content] in str(error.value)


@pytest.mark.parametrize("content", ["[]", "5", "null", '"x"', "{"])
def test_commands_name_a_damaged_result(tmp_path: Path, content: str) -> None:
    for name in ("a", "b"):
        made_run(tmp_path / name).finish({"metrics": {}})
    (tmp_path / "b" / "result.json").write_text(content)
    for command in (("compare", tmp_path / "a", tmp_path / "b"), ("eval", tmp_path / "b")):
        done = call(*command)
        assert done.exit_code == 2
        assert f"{tmp_path / 'b' / 'result.json'} cannot be read" in done.stderr
        assert "Traceback" not in done.output


def test_no_flipped_bit_of_a_state_is_used(tmp_path: Path) -> None:
    """Wherever it is in the file: either it is found, or the tensors are what they were."""
    file = tmp_path / "state"
    save_state(file, state_after(3), {"rounds_done": "3"})
    content, whole = file.read_bytes(), digest(flatten(state_after(3)))
    bits = [bit for bit in range(8 * len(content)) if bit % 19 == 0 or bit >= 8 * (len(content) - 4)]
    found = 0
    for bit in bits:
        flip(file, bit)
        try:
            state, metadata = load_state(file)
        except RunError:
            found += 1
        else:
            assert digest(flatten(state)) == whole
            assert metadata["rounds_done"] == "3"
        file.write_bytes(content)
    assert found > 0.9 * len(bits)


def test_two_checkpoints_are_kept(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    loaded = [load_state(run.checkpoint / name) for name in ("server.safetensors", "previous.safetensors")]
    assert [metadata["rounds_done"] for _, metadata in loaded] == ["4", "3"]
    assert same(loaded[1][0], state_after(3))


def no_line(number: int) -> Damage:
    """Cut the file after `number` lines."""
    return lambda folder: _keep(folder / "rounds.jsonl", lambda lines: lines[:number])


def other_line(number: int, line: str) -> Damage:
    return lambda folder: _keep(folder / "rounds.jsonl", lambda lines: [*lines[:number], line, *lines[number + 1 :]])


def _keep(file: Path, change: Callable[[list[str]], list[str]]) -> None:
    file.write_text("".join(f"{line}\n" for line in change(file.read_text().splitlines())))


def at(file: str, damage: Damage) -> Damage:
    return lambda folder: damage(folder / "checkpoint" / file)


def both(first: Damage, second: Damage) -> Damage:
    def damage(folder: Path) -> None:
        first(folder)
        second(folder)

    return damage


LATEST, PREVIOUS = "server.safetensors", "previous.safetensors"
CHANGED = json.dumps({**record_of(0), "bytes_up": {"adapter": 9}})
RECOVERIES: dict[str, tuple[Damage, int | None, str]] = {
    "flipped bit": (at(LATEST, flip_last), 3, "server.safetensors is damaged (its content does not match its digest)"),
    "cut": (at(LATEST, cut), 3, "server.safetensors is damaged"),
    "empty": (at(LATEST, empty), 3, "server.safetensors is damaged"),
    "JSON": (at(LATEST, as_list), 3, "server.safetensors is damaged"),
    "killed between two renames": (at(LATEST, Path.unlink), 3, ""),
    "previous damaged": (at(PREVIOUS, flip_last), 4, ""),
    "last record missing": (no_line(3), 3, "was saved after 4 rounds, and rounds.jsonl has intact records of 3"),
    "last record cut": (lambda folder: os.truncate(folder / "rounds.jsonl", (folder / "rounds.jsonl").stat().st_size - 9), 3,
                        "has intact records of 3"),
    "last record no object": (other_line(3, "[3]"), 3, "has intact records of 3"),
    "last record changed": (other_line(3, json.dumps({**record_of(3), "loss": 9.0})), 3, "which were changed"),
    "two records missing": (no_line(2), None, "rounds.jsonl has intact records of 2"),
    "a middle record no object": (other_line(1, "null"), None, "rounds.jsonl has intact records of 1"),
    "a middle record twice": (other_line(1, json.dumps(record_of(0))), None, "rounds.jsonl has intact records of 1"),
    "an early record changed": (other_line(0, CHANGED), None, "records in rounds.jsonl, which were changed"),
    "no records": (lambda folder: (folder / "rounds.jsonl").unlink(), None, "rounds.jsonl has intact records of 0"),
    "both damaged": (both(at(LATEST, flip_last), at(PREVIOUS, cut)), None, "previous.safetensors is damaged"),
    "latest damaged, last record missing": (both(at(LATEST, flip_last), no_line(3)), 3, "server.safetensors is damaged"),
    "previous damaged, last record missing": (both(at(PREVIOUS, flip_last), no_line(3)), None, "intact records of 3"),
}  # fmt: skip
"""what happened -> (the damage, the rounds of the checkpoint that is used, a part of the message)."""


@pytest.mark.parametrize("case", RECOVERIES)
def test_a_run_continues_from_the_last_checkpoint_that_agrees_with_its_records(tmp_path: Path, case: str) -> None:
    damage, rounds, sentence = RECOVERIES[case]
    made_run(tmp_path)
    damage(tmp_path)
    run = RunDir(tmp_path)
    if rounds is None:
        with pytest.raises(RunError) as error:
            run.load_checkpoint()
        assert sentence in str(error.value)
        assert f"or delete {run.checkpoint} to train this run again from its first round" in str(error.value)
        return
    for _ in range(2):  # a run loads it more than once
        loaded = run.load_checkpoint()
        assert loaded is not None
        assert loaded[0] == rounds
        assert same(loaded[1], state_after(rounds))
        assert len(run.notes) == bool(sentence)
        assert all(sentence in note and str(tmp_path) in note for note in run.notes)
    for number in range(rounds, ROUNDS + 1):
        run.save_round(record_of(number), state_after(number + 1), "d")
        run.rounds()
        fresh = RunDir(tmp_path)
        assert (fresh.load_checkpoint() or (0,))[0] == number + 1
        assert fresh.notes == []
    assert run.rounds() == [record_of(number) for number in range(ROUNDS + 1)]
    assert same(load_state(run.checkpoint / PREVIOUS)[0], state_after(ROUNDS))


def test_a_damaged_checkpoint_never_replaces_the_good_one(tmp_path: Path) -> None:
    """Nor if the run is killed right after it went on."""
    made_run(tmp_path)
    flip_last(tmp_path / "checkpoint" / LATEST)
    run = RunDir(tmp_path)
    run.load_checkpoint()
    run.save_round(record_of(3), state_after(4), "d")
    run.rounds()
    assert load_state(run.checkpoint / PREVIOUS)[1]["rounds_done"] == "3"
    assert load_state(run.checkpoint / LATEST)[1]["rounds_done"] == "4"


def test_the_only_checkpoint_damaged(tmp_path: Path) -> None:
    run = made_run(tmp_path, rounds=1)
    flip_last(run.checkpoint / LATEST)
    with pytest.raises(RunError, match=r"server\.safetensors is damaged .* or delete .*checkpoint to train this run again"):
        RunDir(tmp_path).load_checkpoint()
    shutil.rmtree(run.checkpoint)
    assert RunDir(tmp_path).load_checkpoint() is None


@pytest.fixture
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Files are written as by earlier versions: without digests."""
    with monkeypatch.context() as patch:
        patch.setattr(state_file, "with_digest", lambda flat, metadata: {"rounds_done": metadata.get("rounds_done", "")})
        yield


def test_a_run_of_an_earlier_version_is_read_unverified(tmp_path: Path, _as_before: None) -> None:  # noqa: PT019 (a fixture)
    run = made_run(tmp_path)
    part = run.checkpoint / "client-0.json"
    part.write_text(json.dumps({key: value for key, value in json.loads(part.read_text()).items() if key != "sha256"}))
    (run.checkpoint / PREVIOUS).unlink()
    again = RunDir(tmp_path)
    loaded = again.load_checkpoint()
    assert loaded is not None
    assert (loaded[0], again.notes) == (ROUNDS, [])
    assert again.load_part("client-0") == run.load_part("client-0") is not None
    no_line(2)(tmp_path)
    with pytest.raises(RunError, match="intact records of 2"):
        RunDir(tmp_path).load_checkpoint()


@pytest.mark.parametrize("damage", [*TEXT, lambda file: file.write_text(file.read_text().replace('"a"', '"b"'))])
def test_a_damaged_part_is_made_again(tmp_path: Path, damage: Damage) -> None:
    run = made_run(tmp_path)
    assert run.load_part("client-0") is not None
    damage(run.checkpoint / "client-0.json")
    assert run.load_part("client-0") is None
    (note,) = run.notes
    assert str(run.checkpoint / "client-0.json") in note
    assert "client-0 is trained again" in note


@pytest.mark.parametrize("change", [no_line(2), other_line(1, "[]"), other_line(3, "{}")])
def test_a_complete_run_without_all_its_records_is_not_summed_up(tmp_path: Path, change: Damage) -> None:
    run = made_run(tmp_path)
    run.finish({"metrics": {}, "rounds": ROUNDS})
    assert len(RunDir(tmp_path).rounds()) == ROUNDS
    change(tmp_path)
    with pytest.raises(RunError, match=r"rounds\.jsonl is damaged \(line \d of 4 is missing or changed\)"):
        RunDir(tmp_path).rounds()


@pytest.mark.parametrize("damage", [*TEXT, Path.unlink])
def test_a_damaged_neighbour_does_not_stand_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Damage) -> None:
    monkeypatch.chdir(tmp_path)
    config = Experiment(name="x", task={"name": "shapes-qa"})  # type: ignore[arg-type] # as a file would give it
    stem = Path("runs/x-federated-seed0")
    for path in (stem, Path(f"{stem}-2"), Path(f"{stem}-3")):
        RunDir(path).begin("", {"config_digest": config.digest()})
    damage(Path(f"{stem}-3/meta.json"))
    Path(f"{stem}-2/config.toml").unlink()
    run = choose_directory(config, "federated", None, resume=True)
    assert run.path == stem
    assert len(run.notes) == (damage is not Path.unlink)
    assert all(f"{stem}-3/meta.json cannot be read" in note and "passed over" in note for note in run.notes)
    assert unfinished(Path("runs"), stem.name, config.digest()) is not None
    shutil.rmtree(stem)
    new = choose_directory(config, "federated", None, resume=True)
    assert not new.path.exists()
    assert new.notes == run.notes


def test_resumed_after_damage_equals_uninterrupted(
    write_experiment: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients remember something from round to round, and all take part in each: the round done again needs what they knew."""
    monkeypatch.chdir(tmp_path)
    parts = ("--set", "algorithm.name=scaffold", "--set", "train.clients_per_round=4")
    command = ("run", write_experiment(rounds=3), *parts)
    whole = run(*command, "--out", "whole")
    (Path("whole") / "result.json").unlink()
    cases = {"flipped": RECOVERIES["flipped bit"][0], "short": no_line(2)}
    for name, damage in cases.items():
        shutil.copytree("whole", name)
        damage(Path(name))
        done = call(*command, "--out", name, "--resume", "--json")
        assert done.exit_code == 0, done.output
        assert f"note: {name}/checkpoint/server.safetensors" in done.stderr
        assert "continues from previous.safetensors, which was saved after 2 rounds" in done.stderr
        resumed = json.loads(done.stdout)
        for key in ("adapter_sha256", "metrics", "bytes_up", "rounds"):
            assert resumed[key] == whole[key]
    flip_last(Path("whole/checkpoint/clients/client-0/round-1.safetensors"))
    no_line(2)(Path("whole"))
    refused = call(*command, "--out", "whole", "--resume")
    assert refused.exit_code == 2
    assert "is damaged (its content does not match its digest); restore it from a copy, or start a new run" in refused.stderr
