"""Workflows and the list of tested versions: they name what exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.utils import canonicalize_name

from tests.support.newest import declared, installed

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text("utf-8"), re.M)


def read(path: Path) -> dict[str, Any]:
    # YAML 1.1 reads the key `on` as true.
    content: dict[Any, Any] = yaml.safe_load(path.read_text("utf-8"))
    return {("on" if key is True else key): value for key, value in content.items()}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_what_there_is(path: Path) -> None:
    workflow = read(path)
    assert workflow["name"] == path.stem
    assert workflow["on"]
    assert "contents" in workflow["permissions"]
    jobs = workflow["jobs"]
    for job in jobs.values():
        assert {job.get("needs", next(iter(jobs)))} <= set(jobs)
        if "uses" in job:
            assert (ROOT / job["uses"]).is_file()
            continue
        assert job["steps"][0]["uses"].startswith("actions/checkout@")
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)
            command = step.get("run", "")
            for target in re.findall(r"\bmake ([a-z-]+)", command):
                assert target in TARGETS
            for file in re.findall(r"\.ci/\S+|tests/\S+", command):
                assert (ROOT / file).exists()


def test_there_is_a_workflow_for_tests_docs_and_release() -> None:
    assert [path.stem for path in WORKFLOWS] == ["checks", "docs", "release"]


def read_newest() -> dict[str, str]:
    lines = (ROOT / "tests" / "newest.txt").read_text("utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_tested_versions_are_those_that_are_admitted() -> None:
    newest = read_newest()
    assert list(newest) == sorted(newest)
    for requirement in declared():
        version = newest[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), requirement


def test_tested_versions_name_everything_that_is_installed_with_them() -> None:
    newest, found = read_newest(), installed()
    if {name: found.get(name) for name in newest} != newest:
        pytest.skip("other versions are installed, which may need other packages")
    assert found.keys() == newest.keys()
