"""Judges of open answers, tested against a local server that replies well, badly, late or not at all."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from commands import call, run
from fedmllm.errors import ConfigError, RunError
from fedmllm.evaluation.judges import Judge, judges
from fedmllm.evaluation.judging import JudgeCache, read_verdict
from fedmllm.evaluation.predictions import Prediction
from fedmllm.evaluation.summary import summarise
from helpers import task

Write = Callable[..., Path]


class Server:
    """A chat-completions endpoint on a free port; `behave(prompt)` returns (status, body)."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.behave: Callable[[str], tuple[int, bytes]] = lambda prompt: (200, self.reply("yes"))
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append({"path": self.path, **body})
                outer.headers.append(dict(self.headers))
                status, content = outer.behave(body["messages"][0]["content"])
                try:
                    self.send_response(status)
                    self.end_headers()
                    self.wfile.write(content)
                except BrokenPipeError:
                    pass  # the client timed out

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    @staticmethod
    def reply(text: str) -> bytes:
        return json.dumps({"choices": [{"message": {"content": text}}]}).encode()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def build(server: Server, **options: Any) -> Judge:
    judge = judges.build("openai", {"endpoint": server.url, "model": "m", "timeout_seconds": 2.0, **options})
    assert judge is not None
    return judge


def prediction(answer: str, predicted: str, closed: bool = False) -> Prediction:
    return Prediction("both", f"id-{answer}", answer, predicted, answer == predicted, closed, not predicted)


REPLIES = {"yes": True, "Yes.": True, "**No**, it does not": False, "no": False, "maybe": None, "": None, "…": None}


@pytest.mark.parametrize(("reply", "verdict"), [*REPLIES.items(), ("yesterday", None)])
def test_only_yes_and_no_are_verdicts(reply: str, verdict: bool | None) -> None:
    assert read_verdict(reply) is verdict


def test_requests_follow_the_interface_and_carry_the_key(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    assert build(server, key_variable="JUDGE_KEY")("how?") == "yes"
    (request,) = server.requests
    assert request["path"] == "/v1/chat/completions"
    assert (request["model"], request["temperature"], request["messages"]) == ("m", 0, [{"role": "user", "content": "how?"}])
    assert server.headers[0]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    ("status", "content", "requests"),
    [
        (200, b"not json", 3),
        (200, b"[]", 3),
        (200, b'{"choices": []}', 3),
        (200, b'{"choices": [{"message": null}]}', 3),
        (500, b"", 3),
        (429, b"", 3),
        (401, b"", 1),
        (404, b"", 1),
    ],
)
def test_bad_replies_are_retried_if_that_can_help_and_then_reported(
    server: Server, status: int, content: bytes, requests: int
) -> None:
    server.behave = lambda prompt: (status, content)
    with pytest.raises(RunError, match="gave no usable answer"):
        build(server)("how?")
    assert len(server.requests) == requests


def test_a_retry_reaches_a_server_that_recovers(server: Server) -> None:
    server.behave = lambda prompt: (200, Server.reply("no")) if len(server.requests) > 2 else (503, b"")
    assert build(server)("how?") == "no"


def test_a_server_that_does_not_reply_in_time(server: Server) -> None:
    given_up = threading.Event()

    def slow(prompt: str) -> tuple[int, bytes]:
        given_up.wait(60)
        return 200, Server.reply("yes")  # which whoever waits for it takes for an answer

    server.behave = slow
    with pytest.raises(RunError, match="gave no usable answer"):
        build(server, timeout_seconds=0.1, retries=1)("how?")
    given_up.set()


def test_an_unreachable_server() -> None:
    judge = judges.build("openai", {"endpoint": "http://127.0.0.1:9", "model": "m", "retries": 0})
    assert judge is not None
    with pytest.raises(RunError, match=r"127\.0\.0\.1:9/chat/completions gave no usable answer"):
        judge("how?")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"endpoint": "localhost", "model": "m"}, "must begin with http"),
        ({"endpoint": "http://x", "model": "m", "retries": -1}, "not negative"),
        ({"endpoint": "http://x", "model": "m", "timeout_seconds": 0.0}, "must be above 0"),
        ({"model": "m"}, "judge.endpoint: this key is required"),
    ],
)
def test_options_out_of_range_are_rejected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        judges.build("openai", options)


# The cache


def test_each_open_answer_is_judged_once_and_closed_answers_are_not(server: Server) -> None:
    server.behave = lambda prompt: (200, Server.reply("yes" if "Given answer: the heart" in prompt else "no"))
    predictions = [prediction("heart", "the heart"), prediction("heart", "the heart"), prediction("lung", "liver")]
    predictions.append(prediction("yes", "no", closed=True))
    cache = JudgeCache(build(server))
    judged = cache.judge(predictions, {p.id: "which organ?" for p in predictions})
    assert [p.judged for p in judged] == [True, True, False, None]
    assert len(server.requests) == 2
    stored = cache.judgements()
    assert [(j["reply"], j["verdict"]) for j in stored] == [("yes", True), ("no", False)]
    assert "Question: which organ?\nReference answer: heart\nGiven answer: the heart" in stored[0]["prompt"]


def test_a_judge_is_not_asked_again_after_three_failures_in_a_row(server: Server) -> None:
    server.behave = lambda prompt: (401, b"")
    predictions = [prediction(str(i), "x") for i in range(10)]
    cache = JudgeCache(build(server))
    judged = cache.judge(predictions, {p.id: "?" for p in predictions})
    assert [p.judged for p in judged] == [None] * 10
    assert len(server.requests) == 3
    assert cache.judgements()[-1]["reply"] == "not asked: the judge failed 3 times in a row"


def test_the_summary_counts_verdicts_and_failures() -> None:
    """A correct and a wrong closed answer; three open answers judged correct (though not matching), wrong, and not at all."""
    from dataclasses import replace

    rows = [prediction("yes", "yes", True), prediction("no", "yes", True)]
    rows += [replace(prediction(f"a{i}", "b"), judged=verdict) for i, verdict in enumerate((True, False, None))]
    summary = summarise(task(), [rows], "exact", {}, judged=True)["both"]
    assert summary["accuracy"] == pytest.approx(1 / 5)
    assert summary["judged_accuracy"] == pytest.approx(2 / 5)
    assert summary["judged_accuracy_open"] == pytest.approx(1 / 3, abs=1e-6)
    assert summary["judge_failures"] == 1
    assert "judged_accuracy" not in summarise(task(), [rows], "exact", {})["both"]


# Through the command line


@pytest.fixture
def in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("in_its_own_folder")
def test_a_run_stores_prompts_replies_and_verdicts(write_experiment: Write, server: Server) -> None:
    file = write_experiment(f'[judge]\nname = "openai"\nendpoint = "{server.url}"\nmodel = "m"\n', rounds=1)
    result = run("run", file, "--out", "a")
    plain = run("run", write_experiment(rounds=1, name="plain"), "--out", "b")
    assert result["judge"] == "openai"
    both = result["metrics"]["both"]
    assert both["judged_accuracy_open"] == 1.0
    assert {k: v for k, v in both.items() if "judge" not in k} == plain["metrics"]["both"]
    stored = [json.loads(line) for line in Path("a/judgements.jsonl").read_text().splitlines()]
    assert stored
    assert all(j["verdict"] is True and j["reply"] == "yes" and "Reference answer" in j["prompt"] for j in stored)
    assert len(server.requests) == len(stored)
    assert not Path("b/judgements.jsonl").exists()


@pytest.mark.usefixtures("in_its_own_folder")
def test_a_run_completes_without_its_judge(write_experiment: Write) -> None:
    file = write_experiment('[judge]\nname = "openai"\nendpoint = "http://127.0.0.1:9"\nmodel = "m"\nretries = 0\n', rounds=1)
    both = run("run", file)["metrics"]["both"]
    assert both["judged_accuracy_open"] == 0.0
    assert both["judge_failures"] == 6
    assert call("compare", "runs/small-federated-seed0").exit_code == 0


# A local model


@pytest.fixture
def causal(tiny: Path, tmp_path: Path) -> Path:
    """A random causal language model with the tiny model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = None
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(tmp_path / "causal")
    tokenizer.save_pretrained(tmp_path / "causal")
    return tmp_path / "causal"


def test_a_local_model_gives_the_more_probable_verdict(causal: Path) -> None:
    judge = judges.build("local", {"model": str(causal)})
    assert judge is not None
    tokenizer, model = AutoTokenizer.from_pretrained(causal), LlamaForCausalLM.from_pretrained(causal).eval()
    for prompt in ("red?", "blue and red are alike", "no"):
        with torch.no_grad():
            logits = model(tokenizer(prompt, return_tensors="pt").input_ids).logits[0, -1]
        ids = {w: {tokenizer(s + w, add_special_tokens=False).input_ids[0] for s in ("", " ")} for w in ("yes", "no")}
        yes, no = (max(float(logits[i]) for i in ids[a] - ids[b]) for a, b in (("yes", "no"), ("no", "yes")))
        assert judge(prompt) == ("yes" if yes > no else "no")


def test_a_local_model_that_does_not_exist() -> None:
    judge = judges.build("local", {"model": "nowhere"})
    assert judge is not None
    with pytest.raises(RunError, match=r"judge.model = 'nowhere' cannot be loaded as a causal language model"):
        judge("how?")
