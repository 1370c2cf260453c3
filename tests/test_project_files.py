"""Workflows, templates, citation, changelog and constraints: they parse, and name what exists."""

import re
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import peft_prune


tomllib = pytest.importorskip("tomllib")  # Python 3.11

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
YAML = [*WORKFLOWS, *(ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"), ROOT / ".pre-commit-config.yaml"]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("path", [*YAML, ROOT / "CITATION.cff"], ids=lambda path: path.name)
def test_yaml_parses(path):
    assert isinstance(yaml.safe_load(path.read_text()), dict)


@pytest.mark.parametrize("path", [*WORKFLOWS, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_workflows_call_make_targets_that_exist(path):
    text = re.sub(r"(?m)#.*$", "", path.read_text())
    called = set(re.findall(r"\bmake ([a-z-]+)", text))
    if path.suffix == ".yml":
        for job in yaml.safe_load(text)["jobs"].values():
            called |= set(job.get("strategy", {}).get("matrix", {}).get("target", []))
    assert called <= TARGETS, called - TARGETS
    assert called, "it calls none"


def test_only_the_step_that_publishes_may_ask_pypi_for_a_token():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())["jobs"]
    assert [name for name, job in jobs.items() if "id-token" in job.get("permissions", {})] == ["publish"]
    assert not any("run" in step for step in jobs["publish"]["steps"])  # no code of ours runs with it


def test_citation_is_of_this_version_and_names_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == peft_prune.__version__
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    for paper in citation["references"]:
        assert {"type", "title", "authors"} <= set(paper) and paper["url"].startswith("https://"), paper
        assert all("family-names" in author or "name" in author for author in paper["authors"]), paper


def test_the_changelog_has_this_version():
    assert f"\n## {peft_prune.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def constraints(name: str) -> dict[str, str]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return dict(line.split("==") for line in lines if line)


def test_the_lowest_versions_are_the_bounds():
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    bounds = {r.name: next(iter(r.specifier)).version for r in map(Requirement, wanted)}
    lowest = constraints("constraints-lowest.txt")
    assert set(lowest) == set(bounds)
    for name, bound in bounds.items():
        if name != "torch":  # one version is at hand
            assert (lowest[name] + ".0.0").startswith(bound + "."), f"{name}: {bound} is allowed, {lowest[name]} tried"
