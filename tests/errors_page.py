"""docs/errors.md: every bad input that the tests replay, with the message that a user gets.

    make errors        # runs the suite with --errors-page=docs/errors.md

A message is recorded where a test expects an error of the project, where a command ends with status 2, where a sample cannot be
used, and where an update is refused. Property tests are left out, because their inputs are drawn at random.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fedmllm.errors import UserError, printable
from fedmllm.report.page import Page

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "fedmllm"
INTRODUCTION = """# Error messages

Bad input ends a command with exit status 2 and one sentence: what is wrong, where, and what to do. This page lists the inputs
that the tests replay, each with its message, and is written by them (`make errors`). File names, keys and numbers are those of
the tests: search the page for the words around yours. Where it is not plain what to do, the message ends with it."""
SUBJECTS = {
    "Overrides with `--set`": ("--set",),
    "Experiment files": ("config", "registry", "experiment"),
    "Sweeps": ("experiment.sweep", "cli.grids", "storage.sweep_index", "report.grids"),
    "Tasks and samples": ("data", "sample"),
    "Models and training": ("models", "training", "tensors"),
    "Algorithms": ("algorithms",),
    "Robust aggregation and attacks": ("algorithms.robust", "algorithms.combining", "robust", "attacks"),
    "Updates that are refused": ("algorithms.screening", "federation", "update"),
    "Differential privacy": ("privacy",),
    "Secure aggregation": ("secure",),
    "Simulated devices and asynchronous rounds": (
        "simulation",
        "runs.memory",
        "experiment.simulated",
        "algorithms.asynchronous",
    ),
    "Sites and federations": ("remote",),
    "Ray": ("remote.actors", "remote.cluster", "remote.ray_sweep"),
    "Fleets": ("fleets",),
    "Run folders and checkpoints": ("storage", "runs"),
    "Archives": ("storage.archive",),
    "Evaluation and judges": ("evaluation",),
    "Reports and comparisons": ("report",),
    "Commands and the Python API": ("cli", "api", "testing", "__main__"),
    "Others": (),
}
"""Subject -> the modules that raise its errors; the longest prefix decides."""
MOST = 8
"""How many cases of a test are listed by name."""


class Message(NamedTuple):
    """What a user gets. `site` is where the code raised it: module, function and line; `input` says what was wrong."""

    subject: str
    site: str
    text: str
    input: str


# Recording


class ErrorsPage:
    """The plug-in behind --errors-page: records messages, also in the workers of xdist, and writes the page at the end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._messages: set[Message] = set()
        self._input = ""
        self._install()

    def pytest_runtest_setup(self, item: pytest.Function) -> None:
        """What is recorded from now on belongs to this test."""
        if getattr(item.obj, "is_hypothesis_test", False):
            self._input = ""
            return
        self._input = item.originalname.removeprefix("test_").replace("_", " ")
        case = item.callspec.id if hasattr(item, "callspec") else ""
        if re.fullmatch(r"[A-Za-z][A-Za-z ,']*", case):  # a name that somebody gave
            self._input += f": {case}"

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self._messages |= {Message(*fields) for fields in getattr(node, "workeroutput", {}).get("messages", ())}

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["messages"] = [list(message) for message in self._messages]
        else:
            self._path.write_text(render(self._messages), encoding="utf-8")

    def _note(self, site: str, text: str) -> None:
        if self._input and text:
            module = "--set" if text.startswith("--set") else site
            self._messages.add(Message(subject_of(module), site, neutral(text), self._input))

    def _note_error(self, error: BaseException | None) -> None:
        # Others, such as OutputLost, are no sentences.
        sentences = UserError | ValueError | RuntimeError | OSError
        if error and type(error).__module__.startswith("fedmllm.") and isinstance(error, sentences) and (site := _site(error)):
            self._note(site, str(error))

    def _install(self) -> None:
        from fedmllm.algorithms import screening
        from fedmllm.cli import common
        from fedmllm.data.samples import Problem
        from fedmllm.federation import step
        from fedmllm.remote.worker import Worker
        from fedmllm.secure.client import Refusal

        raises = pytest.raises

        @contextmanager
        def recording_raises(*args: Any, **options: Any) -> Iterator[Any]:
            __tracebackhide__ = True
            with raises(*args, **options) as caught:
                yield caught
            self._note_error(caught.value)

        pytest.raises = recording_raises
        _after(common, "say", lambda *_: self._note_error(sys.exception()))
        _after(Problem, "__init__", lambda _, problem, *__: self._note("sample", problem.what))
        _after(Refusal, "__init__", lambda _, refusal, *__: self._note("secure.client", str(refusal)))
        _after(Worker, "answer", lambda replies, *_: [self._note("remote.worker", reply.problem) for reply in replies])
        _after(screening, "screen", lambda both, *_: [self._note("update", str(row["why"])) for row in both[1]])
        step.screen = screening.screen


def _after(owner: Any, name: str, record: Callable[..., object]) -> None:
    """Call `record(result, *arguments)` after each call of the function of this name."""
    inner = getattr(owner, name)

    def recording(*args: Any, **options: Any) -> Any:
        result = inner(*args, **options)
        record(result, *args)
        return result

    setattr(owner, name, recording)


def _site(error: BaseException) -> str:
    """Where the error was raised, or the first of the errors that it stands for; "" if a test raised it itself."""
    while isinstance(error.__context__, UserError):
        error = error.__context__
    site, frame = "", error.__traceback__
    while frame is not None:
        code = frame.tb_frame.f_code
        if Path(code.co_filename).is_relative_to(PACKAGE):
            module = ".".join(Path(code.co_filename).relative_to(PACKAGE).with_suffix("").parts)
            site = f"{module}:{code.co_name}:{frame.tb_lineno}"
        elif Path(code.co_filename).is_relative_to(ROOT / "tests"):
            site = ""
        frame = frame.tb_next
    return site


def subject_of(site: str) -> str:
    module = site.partition(":")[0]
    found = [(len(p), subject) for subject, prefixes in SUBJECTS.items() for p in prefixes if f"{module}.".startswith(f"{p}.")]
    return max(found, default=(0, "Others"))[1]


_TEMPORARY = re.compile(
    rf"{re.escape(tempfile.gettempdir())}/(?:pytest-of-[^/]+/pytest-\d+/(?:popen-gw\d+/)?)?[^/\s'\"():;,]+(/?)"
)


def neutral(text: str) -> str:
    """The text without what differs from run to run, or is only long."""
    text = _TEMPORARY.sub(lambda match: "" if match[1] else "folder", printable(text).replace(f"{ROOT}/", ""))
    for pattern, replacement in _VOLATILE.items():
        text = re.sub(pattern, replacement, text)
    return text if len(text) <= 600 else f"{text[:600]}…"


_VOLATILE = {
    r"\(([\w.]+\.py), line \d+\)": r"(\1, line …)",
    r"line \d+ column \d+ \(char \d+\)": "line … column …",
    r"127\.0\.0\.1:\d+": "127.0.0.1:…",
    r"<[\w.]+ object at 0x[0-9a-f]+>": "the file",
    r"https://[^\s')]+": "https://…",
    r"(.)\1{19,}": r"\1\1\1…",
}
"""Pattern -> what is shown in its place."""


# The page


def render(messages: Iterable[Message]) -> str:
    """The page. Messages of one place in the code that differ only in names and numbers are one row."""
    rows: dict[tuple[str, str, str], list[Message]] = {}
    for message in sorted(messages):
        rows.setdefault((message.subject, message.site, _masked(message.text)), []).append(message)
    page = Page([INTRODUCTION])
    for subject in SUBJECTS:
        inputs: dict[str, set[str]] = {}
        for (of, *_), same in rows.items():
            if of == subject:
                text = min((message.text for message in same), key=lambda text: (len(text), text))
                inputs.setdefault(text, set()).update(message.input for message in same)
        for text in list(inputs):  # what is wrong with a sample is also a part of the message that refuses it
            if wholes := [other for other in inputs if text in other and text != other]:
                inputs[min(wholes)] |= inputs.pop(text)
        if inputs:
            page.lines += ["", f"## {subject}"]
            page.table(
                ["message", "what to do", "bad input"],
                [(*_parts(text), _list(inputs[text])) for text in sorted(inputs)],
                left=3,
            )
    return "\n".join(page.lines) + "\n"


def _masked(text: str) -> str:
    text = re.sub(r"^(--set )?\S+?(, (line|index) \d+)?(, id \S+)?: ", "…: ", text)
    return re.sub(r"'[^']*'|\"[^\"]*\"|\([^()]*\)|\S*[/.\d]\S*", "…", text)


def _parts(text: str) -> tuple[str, str]:
    """(what is wrong, what to do): a message says the latter after its last semicolon that is not in brackets or quotes."""
    outside = text
    for pattern in (r"(?<!\w)'[^']*'", r"\"[^\"]*\"", r"\([^()]*\)", r"\([^()]*\)"):
        outside = re.sub(pattern, lambda match: "x" * len(match[0]), outside)
    end = outside.rfind("; ")
    return (text, "") if end < 0 else (text[:end], text[end + 2 :])


def _list(inputs: Iterable[str]) -> str:
    """ "a bad line; a bad file: empty, cut off": each test with its cases."""
    cases: dict[str, list[str]] = {}
    for text in sorted(inputs):
        test, _, case = text.partition(": ")
        cases.setdefault(test, []).extend([case] if case else [])
    shown = {
        test: [*names[:MOST], f"{len(names) - MOST} more"] if len(names) > MOST + 1 else names for test, names in cases.items()
    }
    return "; ".join(f"{test}: {', '.join(names)}" if names else test for test, names in shown.items())
