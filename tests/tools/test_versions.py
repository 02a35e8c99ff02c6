"""The rows of `make test-versions`, and the workflows that run them and other tasks."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from tools.versions import ROOT, ROWS, Row

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def commands(path: Path) -> list[str]:
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values()
    return [step["run"] for job in jobs for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_tasks_of_the_makefile(workflow: Path) -> None:
    tasks = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    found = re.findall(r"make (?:PYTHON=python )?([a-z-]+)", "\n".join(commands(workflow)))
    assert found
    assert set(found) <= tasks


def test_the_workflow_of_documents_builds_the_site() -> None:
    assert any("docs-site" in command for command in commands(ROOT / ".github/workflows/docs.yml"))


def test_the_workflow_runs_every_row() -> None:
    text = (ROOT / ".github/workflows/versions.yml").read_text(encoding="utf-8")
    (job,) = yaml.safe_load(text)["jobs"].values()
    assert job["strategy"]["matrix"]["row"] == [row.name for row in ROWS]


def test_the_lowest_row_is_the_lowest_that_the_project_allows() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    least = {one.name: one.specifier for one in map(Requirement, project["dependencies"])}
    (row,) = (row for row in ROWS if row.name == "lowest-torch")
    for name, version in [*(pin.split("==") for pin in row.pins), ["torch", str(row.torch)]]:
        release = version.removesuffix(".*")
        major, minor = map(int, release.split("."))
        below = f"{major}.{minor - 1}" if minor else f"{major - 1}.99"
        assert release in least[name], name
        assert below not in least[name], name
    assert [row.pins for row in ROWS if row.name == "lowest"] == [row.pins]


def test_a_row_frees_what_its_versions_decide_and_keeps_torch() -> None:
    lowest, newest = (next(row for row in ROWS if row.name == name) for name in ("lowest", "newest"))
    lines = lowest.constraints().splitlines()
    assert [line for line in lines if line.startswith(("transformers", "peft"))] == list(lowest.pins)
    assert not [line for line in lines if line.startswith(("tokenizers", "huggingface_hub"))]
    for row in (lowest, newest):
        kept = [line for line in row.constraints().splitlines() if line.startswith("torch==")]
        assert len(kept) == 1
    assert "numpy" not in newest.constraints()
    assert Row(name="other", torch="2.6.*").constraints().count("torch==") == 1


def test_a_row_that_cannot_run_says_why() -> None:
    assert Row(name="other", python="2.0").missing(everything=True) == "no Python 2.0"
    assert Row(name="other", torch="2.6.*").missing(everything=False) == "torch 2.6.* (--all)"
