"""The registry of model families: every one is tested, a plug-in can add one, and others get the defaults."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from fedmllm.models.families import Family, families, family_of
from fedmllm.registry import PLUGINS
from tiny_families import FAMILIES


def test_every_registered_family_is_tested() -> None:
    assert set(families.names()) <= set(FAMILIES)


def test_an_unregistered_family_has_the_defaults() -> None:
    assert family_of("unregistered") == Family()


def test_a_family_can_be_a_plug_in(tmp_path: Path) -> None:
    """One file adds a family, also in a process that is started from this one."""
    plugin = tmp_path / "new_family.py"
    plugin.write_text(
        "from fedmllm.models.families import Family, families\n"
        "@families.register('new_vl')\n"
        "def new_vl() -> Family:\n"
        '    """NewVL 1."""\n'
        "    return Family(first_position=7)\n"
    )
    code = "from fedmllm.models.families import *; print(family_of('new_vl').first_position, families.describe('new_vl'))"
    environment = {**os.environ, PLUGINS: str(plugin)}
    output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout
    assert output == "7 NewVL 1.\n"
