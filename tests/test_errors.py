"""What a message of an error may look like, whatever it quotes."""

from __future__ import annotations

from pathlib import Path

import pytest

from commands import call
from fedmllm import config
from fedmllm.config import parse_override
from fedmllm.errors import ConfigError, DataError, RunError, UserError
from fedmllm.remote.protocol import ProtocolError


@pytest.mark.parametrize("kind", [UserError, ConfigError, DataError, RunError, ProtocolError])
@pytest.mark.parametrize("hostile", ["a\nb", "\x1b[2J", "\u202e", "\ud800", "x" * 10_000])
def test_a_message_is_one_short_line(kind: type[Exception], hostile: str) -> None:
    message = str(kind(f"here.toml: {hostile!s} is not possible; choose another."))
    assert message.isprintable()
    assert message.startswith("here.toml: ")
    assert len(message) <= 1200
    if kind is not ProtocolError:
        assert message.endswith(" is not possible; choose another."), "what to do is never cut"


DEEP = {
    "arrays": "x = " + "[" * 5_000 + "]" * 5_000,
    "tables": "x = " + "{a = " * 5_000 + "1" + "}" * 5_000,
    "a dotted key": "x" + ".a" * 5_000 + " = 1",
    "a header": "[x" + ".a" * 900 + "]",
    "moderately deep": "x = " + "[" * 60 + "]" * 60,
}


@pytest.mark.parametrize("case", DEEP)
def test_a_file_of_deep_tables_is_refused(tmp_path: Path, case: str) -> None:
    (tmp_path / "e.toml").write_text(DEEP[case])
    with pytest.raises(ConfigError, match=r"e\.toml: .*more than 50 deep"):
        config.read(tmp_path / "e.toml")


def test_a_deep_setting_is_text_or_refused() -> None:
    assert parse_override("name=" + "[" * 5_000)[1] == "[" * 5_000
    assert parse_override("name=" + "[" * 5_000 + "]" * 5_000)[1] == "[" * 5_000 + "]" * 5_000
    with pytest.raises(ConfigError, match="more than 50 deep"):
        parse_override("name=" + "[" * 60 + "]" * 60)


@pytest.mark.parametrize("command", [["compare"], ["eval"], ["check"], ["report", "--out", "page.md"], ["sweep"]])
def test_a_name_that_is_too_long_is_bad_input(command: list[str]) -> None:
    done = call(*command, "x" * 300)
    assert done.exit_code == 2
    assert "File name too long" in done.stderr
    assert done.stderr.startswith("error: ")
