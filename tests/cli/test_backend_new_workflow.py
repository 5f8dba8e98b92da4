"""The reusable workflow, which only GitHub can run, has the right structure and shell, and the
commands of the shell recipe, which a test runs."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from glm_core.cli import parser

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
FILE = ROOT / ".github" / "workflows" / "align.yml"
EXPRESSION = re.compile(r"\$\{\{\s*(.*?)\s*\}\}")


def workflow() -> dict[Any, Any]:
    content: dict[Any, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return content


def steps() -> list[dict[str, Any]]:
    return [step for job in workflow()["jobs"].values() for step in job["steps"]]


def commands() -> list[list[str]]:
    """Returns every glm-core command of the workflow, variables unexpanded."""
    lines = [step["run"] for step in steps() if "run" in step]
    return [shlex.split(x)[1:] for x in lines if x.startswith("glm-core")]


def test_every_file_is_yaml() -> None:
    files = list(FILE.parent.iterdir())
    assert FILE in files
    for file in files:
        assert isinstance(yaml.safe_load(file.read_text(encoding="utf-8")), dict), file


def test_inputs_are_declared_described_and_used() -> None:
    inputs = workflow()[True]["workflow_call"]["inputs"]  # YAML 1.1 reads `on` as true
    text = FILE.read_text(encoding="utf-8")
    used = set(re.findall(r"inputs\.(\w+)", text))
    assert used == set(inputs)
    for name, facts in inputs.items():
        assert facts["type"] in ("string", "number", "boolean"), name
        assert facts.get("required") or "default" in facts, name
        assert facts["description"], name


def test_jobs_and_steps_are_what_the_runner_takes() -> None:
    jobs = workflow()["jobs"]
    assert list(jobs) == ["reference", "candidate", "compare"]
    for name, job in jobs.items():
        assert set(job) <= {"needs", "runs-on", "timeout-minutes", "steps"}, name
        assert set(job.get("needs", [])) <= set(jobs)
        assert 0 < job["timeout-minutes"] <= 360
    for step in steps():
        assert ("run" in step) != ("uses" in step), step
        assert set(step) <= {"run", "uses", "with", "if", "name"}, step
        assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step.get("uses", "a/b@v1")), step


def test_artefacts_travel_between_jobs() -> None:
    up = {s["with"]["name"] for s in steps() if "upload-artifact" in s.get("uses", "")}
    down = {s["with"]["name"] for s in steps() if "download-artifact" in s.get("uses", "")}
    prefix = "${{ inputs.name }}"
    assert up == {f"{prefix}-{x}" for x in ("reference", "candidate", "verdict")}
    assert down == up - {f"{prefix}-verdict"}
    upload = workflow()["jobs"]["compare"]["steps"][-1]
    assert (
        upload["if"] == "${{ !cancelled() }}"
    )  # the verdict is uploaded even if it is `diverged`, exit 1


def test_no_input_is_pasted_into_a_shell() -> None:
    """Values reach the shell through environment variables, so they cannot become commands."""
    for step in steps():
        assert not EXPRESSION.search(step.get("run", "")), step


def test_shell_is_valid() -> None:
    for step in steps():
        done = subprocess.run(["bash", "-n", "-c", step.get("run", ":")], capture_output=True)
        assert done.returncode == 0, (step, done.stderr)


def test_commands_exist_and_are_those_of_the_recipe() -> None:
    known = parser()
    values = {"$CONTROLS": "8", "$DTYPE": "float32"}
    for words in commands():
        plain = [values.get(w, w) for w in words if not w.startswith((">", "verdict.json"))]
        known.parse_args(plain)  # exits with usage for an unknown option
    recipe = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
    mine = [shlex.split(line)[1:] for line in recipe.splitlines() if line.startswith("glm-core ")]
    here = [kind(words) for words in commands() if words[0] == "align"]
    assert here == [kind(words) for words in mine if words[0] == "align"]


def kind(words: list[str]) -> list[str]:
    """Returns the command with its files and options, without those that the recipe leaves out."""
    text = " ".join(words).replace("--dtype $DTYPE ", "").replace("$CONTROLS", "8")
    return text.split()
