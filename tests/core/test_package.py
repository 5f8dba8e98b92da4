"""An sdist and the wheel built from it hold what they need, and run outside the clone."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import installing
import pytest

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("pip", "setuptools"))),
    reason="this Python has no pip and setuptools",
)
SDIST = "from setuptools import build_meta; import sys; build_meta.build_sdist(sys.argv[1])"


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist of sources in which an extension of this machine lies."""
    folder = tmp_path_factory.mktemp("sdist")
    sources = installing.copy_sources(folder / "sources")
    for name in ("_C.cpython-311-x86_64-linux-gnu.so", "_C.cpython-311-x86_64-linux-gnu.json"):
        (sources / "backends/cpu" / name).write_text("of this machine")
    command = [sys.executable, "-W", "ignore", "-c", SDIST, str(folder)]
    env = {k: v for k, v in os.environ.items() if not k.startswith("GLM_CORE_")}
    subprocess.run(command, cwd=sources, env=env, check=True, capture_output=True)
    [built] = folder.glob("*.tar.gz")
    return built


def test_the_sdist_has_what_a_build_needs_and_no_binaries(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(p.relative_to(installing.ROOT)) for p in (installing.ROOT / "csrc").rglob("*")}
    wanted = {n for n in sources if n.endswith((".cpp", ".cu", ".h", ".py", ".sh"))}
    assert not (wanted | {"setup.py", "backends/cpu/built.py", "bench/step.py"}) - names
    assert not [n for n in names if n.endswith((".so", ".pyc")) or Path(n).name.startswith("_C.")]


def test_the_wheel_of_the_sdist_runs_outside_the_clone(sdist: Path, tmp_path: Path) -> None:
    arguments = ["wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    python = Path(sys.executable)
    off = {"GLM_CORE_BUILD": "off"}
    installing.pip(python, *arguments, str(sdist), wheels=tmp_path, **off)
    [wheel] = tmp_path.glob("glm_core-*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert "glm_core/planner/published.csv" in names
    assert not [n for n in names if n.startswith(("csrc", "tests", "backends", "bench"))]
    devices, cases = run(
        tmp_path, "devices", "conformance --backend reference --op rms_norm --mode test"
    ).split(END)
    assert "its C++ extension is not built; pip install" in devices
    assert "pass" in cases


END = "END OF COMMAND"


def run(folder: Path, *commands: str) -> str:
    """Runs commands of the package in `folder`/site in one process; returns their standard
    output, with END between them."""
    code = "import sys\nfrom glm_core.cli import main\n"
    calls = [f"code = main({command.split()!r})\nif code: sys.exit(code)\n" for command in commands]
    code += f"print({END!r})\n".join(calls)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder / "site")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
