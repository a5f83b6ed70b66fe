"""A finished run answers questions, and is exported as a folder that loads without fedmllm."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

import fedmllm
from fedmllm.cli import trained
from fedmllm.cli.app import app
from fedmllm.data.questions import Usual, question
from fedmllm.errors import DataError, RunError
from fedmllm.runs import export as exports
from fedmllm.storage.run_dir import RunDir
from helpers import sample

plain_peft = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture(scope="module")
def finished(tiny: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that runs a small experiment under an algorithm, once for all tests."""
    runs: dict[str, Path] = {}

    def run(algorithm: str = "fedavg", kind: Any = "federated", **overrides: Any) -> Path:
        key = json.dumps([algorithm, kind, overrides])
        if key not in runs:
            folder = tmp_path_factory.mktemp("finished")
            file = folder / "small.toml"
            file.write_text(f'[task]\nname = "jsonl"\ntrain = "{dataset / "train.jsonl"}"\ntest = "{dataset / "test.jsonl"}"\n')
            settings: dict[str, Any] = {
                "model.name": str(tiny), "model.precision": "fp32", "model.lora.rank": 2, "algorithm.name": algorithm,
                "partition.clients": 3, "train.rounds": 1, "train.lr": 0.05, "eval.max_new_tokens": 2,
            }  # fmt: skip
            fedmllm.run(fedmllm.load(file, **settings | overrides), kind, folder / "run")
            runs[key] = folder / "run"
        return runs[key]

    return run


def invoke(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


def asked(run: Path, *arguments: Any) -> Any:
    result = invoke("predict", run, *arguments, "--trust-config", "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["predictions"]


def test_the_answers_are_those_of_the_evaluation(finished: Callable[..., Path], dataset: Path) -> None:
    run = finished()
    written = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    rows = {row["id"]: row for row in asked(run, "--data", dataset / "test.jsonl")}
    assert len(rows) == 12
    for prediction in written:
        assert rows[prediction["id"]]["answer"] == prediction["predicted"]
        assert rows[prediction["id"]]["reference"] == prediction["answer"]
    assert rows["test-01"]["shown"] == ["image", "text"]
    assert sum(rows["test-01"]["probabilities"].values()) == pytest.approx(1)


def test_the_baseline_is_the_untrained_model(finished: Callable[..., Path], dataset: Path) -> None:
    untrained = finished(kind="zero-shot")
    expected = {row["id"]: row["probabilities"] for row in asked(untrained, "--data", dataset / "test.jsonl")}
    for algorithm in ("fedavg", "flora"):  # the second changes the base weights too
        rows = asked(finished(algorithm), "--data", dataset / "test.jsonl", "--baseline")
        for row in rows:
            assert row["untrained"]["probabilities"] == pytest.approx(expected[row["id"]])
        assert any(row["probabilities"] != pytest.approx(row["untrained"]["probabilities"]) for row in rows)


def test_one_question_is_asked_at_the_command_line_and_in_python(finished: Callable[..., Path], dataset: Path) -> None:
    run, picture = finished(), dataset / "red.png"
    (row,) = asked(run, "--image", picture, "--question", "which color is it?", "--choices", "red, blue,green")
    assert row["shown"] == ["image"]
    assert list(row["probabilities"]) == ["red", "blue", "green"]
    model = fedmllm.Model(run, trust_config=True)
    for image in (str(picture), picture, picture.read_bytes()):
        reply = model.predict(image=image, question="which color is it?", choices=["red", "blue", "green"])
        assert (reply.answer, reply.shown) == (row["answer"], ("image",))
        assert reply.probabilities == pytest.approx(row["probabilities"])
    (both,) = asked(
        run, "--image", picture, "--image", dataset / "blue.png", "--question", "which color is it?", "--choices", "red,blue"
    )
    reply = model.predict(image=[picture, dataset / "blue.png"], question="which color is it?", choices=["red", "blue"])
    assert reply.probabilities == pytest.approx(both["probabilities"])
    one = model.predict(image=picture, question="which color is it?", choices=["red", "blue"])
    assert reply.probabilities != pytest.approx(one.probabilities)
    printed = invoke("predict", run, "--text", "a red thing", "--question", "name the color.", "--trust-config")
    assert printed.stdout.strip() == model.predict(text="a red thing", question="name the color.").answer
    assert "shown to the model: text" in printed.stderr


def test_a_file_may_leave_answers_and_ids_out(finished: Callable[..., Path], dataset: Path, tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    shutil.copy(dataset / "red.png", tmp_path)
    file.write_text('{"image": "red.png", "question": "name the color."}\n\n{"text": "x", "question": "q", "answer": "y"}\n')
    assert [(row["id"], row.get("reference")) for row in asked(finished(), "--data", file)] == [("1", None), ("3", "y")]
    (tmp_path / "questions.csv").write_text("image,question,answer\nred.png,name the color.,\n,q,y\n")
    rows = asked(finished(), "--data", tmp_path / "questions.csv")
    assert [(row["id"], row["shown"], row.get("reference")) for row in rows] == [("2", ["image"], None), ("3", [], "y")]
    printed = invoke("predict", finished(), "--data", file, "--trust-config", "--baseline").stdout
    assert "of 1 answers of the untrained model are the reference" in printed


def test_at_the_terminal_questions_are_asked_one_after_another(
    finished: Callable[..., Path], dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["", "a red thing", "which color is it?", "red,blue", str(dataset / "none.png"), "", "what?", "", ""])

    def typed(prompt: str) -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr(trained.sys.stdin, "isatty", lambda: True, raising=False)
    trained.predict(finished(), trust_config=True)
    printed = capsys.readouterr()
    assert "probability, %" in printed.out
    assert "none.png is missing" in printed.err


def test_what_a_task_always_asks_need_not_be_said() -> None:
    memes = [sample(f"s{i}", question="is it hateful?", choices=("no", "yes"), answer="no", lettered=True) for i in range(3)]
    usual = Usual.of(memes)
    assert Usual.from_json(usual.to_json()) == usual
    made = question(usual, text="a cat")
    assert (made.question, made.choices, made.lettered, made.text) == ("is it hateful?", ("no", "yes"), True, "a cat")
    other = question(usual, text="a cat", question="how many?")  # the choices belong to the usual question
    assert (other.choices, other.lettered) == (None, False)
    assert Usual.of([*memes, sample("t", question="what else?")]).question is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "there is nothing to ask"),
        (("--data", "{data}/test.jsonl", "--text", "x"), "--text and --data exclude each other"),
        (("--text", "x"), "differ from sample to sample; give yours as --question"),
        (("--question", "q", "--choices", "a"), "must be a list of at least two texts"),
        (("--question", "q", "--image", "{data}/none.png"), "none.png is missing"),
        (("--question", "q", "--client", "1"), "no client of it has an adapter of their own"),
        (("--data", "{data}/none.jsonl"), "none.jsonl: cannot be read"),
        (("--question", "w " * 2000), "more than train.max_length"),
    ],
)
def test_a_question_that_cannot_be_asked_is_refused(
    finished: Callable[..., Path], dataset: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = invoke("predict", finished(), *(word.format(data=dataset) for word in arguments), "--trust-config")
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "q",}', "is not valid JSON"),
        ('{"question": "q", "imag": "x"}', "unknown key 'imag'"),
        ('{"text": "x"}', "a sample needs a 'question'"),
        ('{"question": "q", "image": "../x.png"}', "leads out of"),
        ('{"question": "q", "choices": ["a", "b"], "answer": "c"}', "is not among the choices"),
        ("", "there is no question in it"),
    ],
)
def test_a_file_of_questions_is_checked(finished: Callable[..., Path], tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "q.jsonl").write_text(line + "\n")
    result = invoke("predict", finished(), "--data", tmp_path / "q.jsonl", "--trust-config")
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_with_adapters_of_their_own_a_client_is_chosen(finished: Callable[..., Path], tmp_path: Path) -> None:
    run = finished("fedsa-lora", **{"train.clients_per_round": 3})
    assert "choose one by --client" in invoke("predict", run, "--question", "q", "--trust-config").stderr
    assert (
        "only 0, 1, 2 of its clients have" in invoke("predict", run, "--question", "q", "--client", 7, "--trust-config").stderr
    )
    assert asked(run, "--question", "q", "--client", 2)
    assert invoke("export", run, "--client", 1, "--to", tmp_path / "one", "--trust-config").exit_code == 0
    assert "the adapter of client 1" in (tmp_path / "one" / "README.md").read_text()


def test_a_run_without_an_adapter_has_nothing_to_say_or_to_export(finished: Callable[..., Path], tmp_path: Path) -> None:
    local = finished(kind="local")
    assert "has no adapter: its kind is 'local'" in invoke("predict", local, "--question", "q", "--trust-config").stderr
    result = invoke("export", finished(kind="zero-shot"), "--to", tmp_path / "x", "--trust-config")
    assert (result.exit_code, (tmp_path / "x").exists()) == (2, False)
    assert "has no adapter to export" in result.stderr


def snippet_of(card: Path) -> str:
    return card.read_text().partition("```python\n")[2].partition("```")[0]


def logits_of(loaded: Any, run: Path, picture: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits after a prompt with a picture: of a model that a snippet loaded, and of the run's own model."""
    own = fedmllm.Model(run, trust_config=True)._trained.model
    processor = loaded["processor"]
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "which color is it?"}]}]
    prompt = processor.apply_chat_template(talk, add_generation_prompt=True)
    inputs = dict(processor(text=[prompt], images=[[Image.open(picture)]], return_tensors="pt"))
    with torch.no_grad():
        return loaded["model"](**inputs).logits, own.model(**inputs).logits


@plain_peft
@pytest.mark.parametrize(
    ("algorithm", "adapter", "flags"),
    [("fedavg", "lora", []), ("flora", "lora", []), ("flora", "lora", ["--merged"]), ("fedavg", "dora", ["--merged"]),
     ("fedavg", "ia3", []), ("fedavg", "prompt-tuning", [])],
)  # fmt: skip
def test_the_lines_of_the_card_load_the_export(
    finished: Callable[..., Path], dataset: Path, tmp_path: Path, algorithm: str, adapter: str, flags: list[str]
) -> None:
    run = finished(algorithm, **{"model.adapter.kind": adapter})
    result = invoke("export", run, "--to", tmp_path / "model", "--trust-config", *flags)
    assert result.exit_code == 0, result.output
    code = snippet_of(tmp_path / "model" / "README.md")
    assert code.strip() in result.stdout
    assert code.count("\n") <= 5
    names: dict[str, Any] = {}
    exec(code, names)  # it is what users paste
    if adapter != "prompt-tuning":  # for that, PEFT's model takes prompts without the trained vectors, and ours with them
        theirs, ours = logits_of(names, run, dataset / "red.png")
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    assert names["processor"].apply_chat_template([{"role": "user", "content": [{"type": "text", "text": "hi"}]}])


def test_the_pocket_model_travels_with_its_adapter(tmp_path: Path, finished: Callable[..., Path]) -> None:
    experiment = fedmllm.load(**{"model.name": "pocket"})
    exports.export_adapter(finished() / "adapter", experiment, tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str((tmp_path / "model" / "base").resolve())
    assert (tmp_path / "model" / "base" / "config.json").is_file()


def test_the_card_says_what_was_measured_and_cannot_be_injected(finished: Callable[..., Path], tmp_path: Path) -> None:
    run = RunDir(finished())
    result = run.result() | {"name": "</code> <img src=x>", "attack": "sign-flip", "privacy_spent": {"epsilon": 2.5}}
    from fedmllm.report.card import model_card

    card = model_card(result, "org/model", "pass", merged=False, client=None)
    assert "<img" not in card
    assert 'base_model: "org/model"' in card
    assert "ε = 2.5 per client" in card
    assert "do not use it" in card
    metric = result["metrics"]["both"]
    assert f"{100 * metric['accuracy']:.1f} [{100 * metric['accuracy_ci'][0]:.1f}" in card


def test_an_export_overwrites_nothing_and_leaves_no_half(
    finished: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    result = invoke("export", finished(), "--to", tmp_path / "full", "--trust-config")
    assert (result.exit_code, "is not empty; give a new folder" in result.stderr) == (2, True)

    def broken(config: Any, folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exports, "_save_processor", broken)
    result = invoke("export", finished(), "--to", tmp_path / "new", "--trust-config")
    assert (result.exit_code, "cannot be written (No space left on device)" in result.stderr) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    with pytest.raises(RunError, match="cannot be merged into weights"):
        exports.export_merged(tmp_path, fedmllm.load(**{"model.adapter.kind": "prompt-tuning"}), tmp_path / "new")


class FakeHub:
    """Records what is uploaded; `refuses` makes it answer as the Hub does to somebody who is not logged in."""

    refuses = False
    uploads: list[dict[str, Any]] = []  # noqa: RUF012 (shared on purpose)

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> str:
        if self.refuses:
            raise huggingface_hub.errors.LocalTokenNotFoundError("token is missing")
        assert private
        assert exist_ok
        return f"https://hub/{name}"

    def upload_folder(self, **upload: Any) -> None:
        self.uploads.append(upload)


def test_an_export_is_pushed_to_the_hub(finished: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports, "HfApi", FakeHub)
    refused = invoke("export", finished(), "--to", tmp_path / "a", "--push", "me/model", "--trust-config")
    assert (refused.exit_code, "is not on the Hub, so push the whole: add --merged" in refused.stderr) == (2, True)
    pushed = invoke("export", finished(), "--to", tmp_path / "b", "--merged", "--push", "me/model", "--trust-config")
    assert pushed.exit_code == 0, pushed.output
    assert "pushed to https://hub/me/model" in pushed.stdout
    assert [(upload["repo_id"], upload["folder_path"]) for upload in FakeHub.uploads] == [("me/model", tmp_path / "b")]
    monkeypatch.setattr(FakeHub, "refuses", True)
    failed = invoke("export", finished(), "--to", tmp_path / "c", "--merged", "--push", "me/model", "--trust-config")
    assert (failed.exit_code, "is complete, but the Hub does not take it" in failed.stderr) == (2, True)
    assert (tmp_path / "c" / "README.md").is_file()


def test_a_question_without_words_is_refused() -> None:
    with pytest.raises(DataError, match="give yours as --question"):
        question(Usual(), text="x")
