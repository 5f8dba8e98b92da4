"""Runs the suite with each torch of the window, in an environment of its own, and prints a table.

Usage: python tests/versions/matrix.py [--torch VERSION] [--prepare] [TEST ...]

Every row has a folder build/matrix/torch-VERSION with an environment, a clone of the last commit
and the log of its run. An environment takes about 5 GB, because the registry's torch for x86-64
brings CUDA's libraries; the oldest, which CI makes each time, has stubs of them. A second run
reuses all of it, and compiles the extension again only if its sources changed. Exits with 1 if a
test failed."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import xml.etree.ElementTree
from collections import Counter
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from glm_core.versions import tomllib

ROOT = Path(__file__).resolve().parents[2]
OUTCOMES = ("passed", "skipped", "failures", "errors")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One environment of the window."""

    torch: str
    python: str
    """the interpreter's version; where this machine has none of it, the running one is taken"""
    numpy: str
    cuda_stubs: bool = False
    """stubs take the place of CUDA's libraries: a minute less of a core, 2.7 GB less"""

    @property
    def folder(self) -> Path:
        return ROOT / "build" / "matrix" / f"torch-{self.torch}"

    @property
    def interpreter(self) -> str:
        """The environment's Python."""
        return str(self.folder / "env" / "bin" / "python")

    def run(self, *command: str, **env: str) -> int:
        """Runs a command in the row's clone, its output into the row's log; returns its exit
        status."""
        with open(self.folder / "log", "a", encoding="utf-8") as log:
            return subprocess.run(
                command,
                cwd=self.folder / "tree",
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": ""} | env,
            ).returncode

    def must(self, *command: str) -> None:
        """Runs a command as `run` does; ends the program if it fails."""
        if self.run(*command):
            line = " ".join(command)
            raise SystemExit(
                f"torch {self.torch}: failed: {line}; see the end of {self.folder}/log"
            )


ROWS = (
    Row(torch="2.7.1", python="3.10", numpy="1.26.4", cuda_stubs=True),
    Row(torch="2.9.1", python="3.12", numpy="2.2.6"),
    Row(torch="2.11.0", python="3.12", numpy="2.4.6"),
    Row(torch="2.15.0", python="3.13", numpy="2.5.5"),
)


def output(*command: str) -> str:
    """Runs a command in the project's root; returns its standard output, stripped."""
    done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def interpreter(version: str) -> str:
    """Returns the path of this Python version, pyenv's included, or of the running Python."""
    candidates = []
    if pyenv := shutil.which("pyenv"):
        installed = output(pyenv, "versions", "--bare").split()
        matching = [v for v in installed if v.startswith(f"{version}.")]
        candidates += [output(pyenv, "prefix", v) + f"/bin/python{version}" for v in matching]
    candidates += [path] if (path := shutil.which(f"python{version}")) else []
    for candidate in candidates:
        if subprocess.run([candidate, "-c", ""], capture_output=True).returncode == 0:
            return candidate
    return sys.executable


def requirements() -> list[str]:
    """Returns what the tests need. The row's own torch brings the triton that fits it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    names = [*project["dependencies"], *(name for extra in extras.values() for name in extra)]
    return [name for name in names if not name.startswith(("triton", "glm-core"))]


def prepare(row: Row) -> None:
    """Makes the row's environment and clone, and compiles the extension for its torch."""
    tree, environment = row.folder / "tree", row.folder / "env"
    tree.mkdir(parents=True, exist_ok=True)
    (row.folder / "log").write_text("")
    if not (tree / ".git").exists():
        row.must("git", "clone", "-q", "--no-checkout", str(ROOT), ".")
    row.must("git", "fetch", "-q", str(ROOT), "HEAD")
    row.must("git", "reset", "-q", "--hard", "FETCH_HEAD")
    # pip would compile every Python file; what is imported is compiled as it is imported
    pip = [row.interpreter, "-m", "pip", "install", "-q", "--no-compile"]
    versions = [f"torch=={row.torch}", f"numpy=={row.numpy}"]
    ready = environment / "ready"
    if not ready.exists():
        row.must(interpreter(row.python), "-m", "venv", "--clear", str(environment))
        row.must(*pip, "-U", "pip", "setuptools>=77", "wheel", "ninja")
        if row.cuda_stubs and platform.machine() == "x86_64":
            row.must(*pip, "--no-deps", f"torch=={row.torch}")
            [site] = environment.glob("lib/python*/site-packages")
            row.must(row.interpreter, "tests/versions/cuda_stubs.py", str(site))
        row.must(*pip, *versions)
        ready.touch()
    row.must(*pip, *versions, *requirements())
    sources = output("git", "rev-parse", "HEAD:csrc", "HEAD:setup.py")
    built_from = row.folder / "built_from"
    if not built_from.exists() or built_from.read_text() != sources:
        row.must(*pip, "--no-build-isolation", "--no-deps", "-e", ".")
        built_from.write_text(sources)


def test(row: Row, tests: list[str]) -> dict[str, int]:
    """Runs the tests in the row's environment and prints why some were skipped; returns how many
    had each outcome."""
    results = row.folder / "results.xml"
    results.unlink(missing_ok=True)
    pytest = [row.interpreter, "-m", "pytest", "-n", "2", "--dist", "worksteal"]
    row.run(*pytest, f"--junitxml={results}", *tests, OMP_NUM_THREADS="1")
    if not results.exists():
        raise SystemExit(f"torch {row.torch}: no test ran; see the end of {row.folder}/log")
    suite = xml.etree.ElementTree.parse(results).getroot().find("testsuite")
    assert suite is not None
    reasons = Counter(skip.get("message", "") for skip in suite.iter("skipped"))
    for reason, number in reasons.most_common():
        print(f"  torch {row.torch}: {number} skipped: {reason}")
    count = {name: int(suite.get(name, 0)) for name in OUTCOMES[1:]}
    return {"passed": int(suite.get("tests", 0)) - sum(count.values())} | count


def facts(row: Row) -> list[str]:
    """Returns the versions that ran, as the environment reports them."""
    code = "import platform as p, torch as t, numpy as n; "
    code += "print(t.__version__, p.python_version(), n.__version__)"
    return output(row.interpreter, "-c", code).split()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--torch", help="run this row only, such as 2.7.1")
    parser.add_argument("--prepare", action="store_true", help="make the environments, no more")
    parser.add_argument("tests", nargs="*", help="what pytest runs; by default everything")
    options = parser.parse_args()
    rows = [row for row in ROWS if options.torch in (None, row.torch)]
    if not rows:
        known = ", ".join(row.torch for row in ROWS)
        raise SystemExit(f"--torch {options.torch}: the window has no such row; known: {known}")
    table, good = [], True
    for row in rows:
        prepare(row)
        if options.prepare:
            continue
        count = test(row, options.tests)
        good &= count["passed"] > 0 and not count["failures"] + count["errors"]
        table.append([*facts(row), *(str(count[name]) for name in OUTCOMES)])
    if options.prepare:
        return 0
    commit = output("git", "rev-parse", "--short", "HEAD")
    print(f"\n{date.today()}, commit {commit}, {' '.join(options.tests) or 'the whole suite'}\n")
    print(f"| torch | Python | numpy | {' | '.join(OUTCOMES)} |\n|{'---|' * 7}")
    print("\n".join(f"| {' | '.join(cells)} |" for cells in table))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
