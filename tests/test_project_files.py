"""The files that others read: citation, image, containers of the example, workflow and templates agree with the project."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import fedmllm

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def load(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_files_of_the_forge_are_valid(path: Path) -> None:
    table = yaml.safe_load(path.read_text())
    if path.parent.name == "ISSUE_TEMPLATE" and path.stem != "config":
        assert {"name", "description", "body"} <= table.keys()
        named = [field["id"] for field in table["body"] if field["type"] != "markdown"]
        assert len(named) == len(set(named)) > 0


def test_the_citation_is_of_this_version() -> None:
    citation = load("CITATION.cff")
    assert (citation["version"], citation["license"]) == (fedmllm.__version__, PROJECT["license"])
    assert citation["references"][0]["identifiers"][0]["value"] == "arXiv:2411.14717"


def test_the_workflow_tests_the_versions_of_python_that_the_project_names() -> None:
    named = {c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)}
    jobs = load(".github/workflows/ci.yml")["jobs"]
    oldest = jobs["all"]["steps"][1]["with"]["python-version"]
    assert {oldest, *jobs["tests"]["strategy"]["matrix"]["python"]} == named
    assert PROJECT["requires-python"] == f">={oldest}"
    assert jobs["all"]["steps"][-1]["run"] == ".ci/run"


def test_the_image_is_made_from_files_that_exist() -> None:
    text = (ROOT / "Dockerfile").read_text()
    copied = [name for line in re.findall(r"^COPY (?!--)(.*) \S+$", text, re.MULTILINE) for name in line.split()]
    kept = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(copied) == kept
    assert all((ROOT / name).exists() for name in copied)
    (extras,) = re.findall(r"whl\)\[([a-z,]+)\]", text)
    assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()
    assert set(re.findall(r"python:([\d.]+)-", text)) <= set(
        load(".github/workflows/ci.yml")["jobs"]["tests"]["strategy"]["matrix"]["python"]
    )


def test_the_containers_are_the_parties_of_the_example() -> None:
    services = load("examples/hospitals/compose.yaml")["services"]
    sites = tomllib.loads((ROOT / "examples" / "hospitals" / "federation.toml").read_text())["sites"]
    assert services.keys() == {"prepare", "server", *sites}
    for name in ("server", *sites):
        assert services[name]["volumes"] == [f"./federation/{name}:/party"], "no party sees another's folder"
    assert {services[name]["command"] for name in sites} == {"client site.toml"}
