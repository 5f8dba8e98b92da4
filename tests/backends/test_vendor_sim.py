"""Tests the example of a port, `examples/vendor_sim`: it builds, installs beside glm_core, is found
by its entry point and passes its own tests. It runs in processes of its own, since a process of
torch holds one out-of-tree device."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import workers

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "examples" / "vendor_sim"
PARTS = ("csrc", "vendor_sim", "setup.py", "pyproject.toml")


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder that pip installed the package into; kept until its sources change."""
    digest = hashlib.sha256(f"{torch.__version__} {sys.version}".encode())
    for path in sorted(p for part in PARTS for p in [PACKAGE / part, *(PACKAGE / part).glob("*")]):
        if path.is_file():
            digest.update(path.name.encode() + path.read_bytes())
    target = ROOT / ".cache" / "vendor_sim" / digest.hexdigest()[:16]
    target.parent.mkdir(parents=True, exist_ok=True)
    with workers.locked(target):
        if not target.exists():
            _install(tmp_path_factory.mktemp("vendor_sim"), target)
    return target


def _install(folder: Path, target: Path) -> None:
    source, fresh = folder / "source", target.with_name(f"{target.name}.{os.getpid()}")
    shutil.copytree(PACKAGE, source, ignore=shutil.ignore_patterns("build", "*.egg-info", "*.so"))
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # ninja
    command = [*pip, "--target", str(fresh), str(source)]
    done = subprocess.run(
        command, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    fresh.replace(target)


def _python(installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": f"{installed}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.long
@pytest.mark.timeout(900)  # all its tests, and the commands they run
def test_its_own_tests_pass(installed: Path, tmp_path: Path) -> None:
    tests = str(PACKAGE / "tests")
    done = _python(installed, tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests)
    assert done.returncode == 0, done.stdout + done.stderr


def test_installed_it_is_a_device_of_torch_and_a_backend_of_ours(
    installed: Path, tmp_path: Path
) -> None:
    """torch and the registry find it by its entry points, without an import."""
    code = (
        "import torch; from glm_core.backends import registry\n"
        "print(torch.ones(2, device='sim').sum().item(), registry.usable('sim').device())"
    )
    assert _python(installed, tmp_path, "-c", code).stdout.split() == ["2.0", "sim:0"]


def test_absent_it_is_unknown(tmp_path: Path) -> None:
    code = "from glm_core.backends import registry; print('sim' in registry.names())"
    assert _python(tmp_path, tmp_path, "-c", code).stdout.split() == ["False"]
