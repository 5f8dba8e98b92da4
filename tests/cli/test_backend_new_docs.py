"""Runs the documentation: all shell blocks of a page, in order, in one shell, with the package
under test and a Python of its own into which `pip install` may install."""

from __future__ import annotations

import json
import os
import re
import site
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import command_server
import pytest

import glm_core

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FAILING = re.compile(r"^! (.*)$", re.MULTILINE)


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Gives the environment of a shell whose Python is new, sees this one's packages and installs
    offline, and whose glm-core is a client of the command server."""
    home, path = tmp_path / "python", str(tmp_path / "commands")
    venv.create(home, symlinks=True)
    [packages] = (home / "lib").glob("python*/site-packages")
    lines = [f"import site; site.addsitedir({p!r})" for p in site.getsitepackages()]
    (packages / "outer.pth").write_text("\n".join(lines))
    command = home / "bin" / "glm-core"
    command.write_text(command_server.CLIENT.format(python=home / "bin" / "python", socket=path))
    command.chmod(0o755)
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0"}
    environment = {
        **os.environ,
        **offline,
        "PATH": f"{home}/bin{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(Path(glm_core.__file__).parents[1]),
        "PYTHONWARNINGS": "ignore",
    }
    words = [str(home / "bin" / "python"), command_server.__file__, path, str(packages)]
    server = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout
        assert server.stdout.readline() == "ready\n"
        yield environment
    finally:
        server.kill()
        server.communicate()


def script(page: str) -> str:
    """Returns the page's shell blocks as a script; a command after `! ` must fail."""
    blocks = BLOCK.findall((DOCS / page).read_text(encoding="utf-8"))
    assert blocks, page
    expected = FAILING.sub(
        r"if \1; then echo 'did not fail: \1' >&2; exit 99; fi", "\n".join(blocks)
    )
    return f"set -eux\n{expected}"


def run(page: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    folder.mkdir()
    done = subprocess.run(
        ["bash", "-c", script(page)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    return done


@pytest.mark.long
def test_porting(tmp_path: Path, environment: dict[str, str]) -> None:
    done = run("porting.md", tmp_path / "work", environment)
    folder = tmp_path / "work" / "glm-core-acme"
    assert {"report.html", "acme-float32.trace"} <= {
        p.name for p in (folder / "runs/acme").iterdir()
    }
    assert (folder / "report.html").exists()
    assert re.search(r"\d+ passed, \d+ skipped", done.stdout)  # the skeleton's own conformance run
    verdicts = re.findall(r"^(.*); report: runs/", done.stdout, re.MULTILINE)
    assert verdicts == ["aligned", "diverged (without curve)"]
    assert "op geglu forward in layer 0" in done.stdout  # the one that was broken
    guilty = json.loads((folder / "guilty.json").read_text())
    named = {"op": "geglu", "direction": "forward", "dtype": "float32", "layer": "0"}
    assert named.items() <= guilty.items()
    assert guilty["rerun"].startswith("glm-core conformance --backend acme --id geglu-float32-")


def test_ci(tmp_path: Path, environment: dict[str, str]) -> None:
    run("ci.md", tmp_path / "work", environment)
    verdict = json.loads((tmp_path / "work" / "verdict.json").read_text())
    assert verdict["verdict"] == "aligned"
    assert (verdict["reference"], verdict["candidate"]) == ("reference", "cpu")
    assert json.loads((tmp_path / "work" / "fallbacks.json").read_text())["backend"] == "cpu"


def test_the_blocks_are_found_and_failures_are_demanded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page fails if a command fails, or if one that must fail succeeds."""
    monkeypatch.setattr(sys.modules[__name__], "DOCS", tmp_path)
    for name, block, code in (("a", "! true", 99), ("b", "false\ntrue", 1), ("c", "! false", 0)):
        (tmp_path / f"{name}.md").write_text(f"text\n```sh\n{block}\n```\n")
        done = subprocess.run(["bash", "-c", script(f"{name}.md")], capture_output=True)
        assert done.returncode == code, name
