"""Copies the sources, makes environments and writes small wheels: what tests of an installation
need, without a network."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = "setup.py pyproject.toml MANIFEST.in README.md LICENSE csrc backends bench glm_core"
SKIP = shutil.ignore_patterns("__pycache__", "*.so", "_C.*.json", "*.egg-info")


def copy_sources(folder: Path) -> Path:
    """Copies what an installation reads; returns the folder."""
    folder.mkdir()
    for name in SOURCES.split():
        if (path := ROOT / name).is_dir():
            shutil.copytree(path, folder / name, symlinks=True, ignore=SKIP)
        elif path.exists():
            shutil.copy(path, folder)
    return folder


def environment(folder: Path) -> Path:
    """Makes an empty environment with this Python; returns its interpreter."""
    venv.create(folder, with_pip=False, symlinks=True)
    return folder / "bin/python"


def packages(python: Path) -> Path:
    """Returns the environment's site-packages."""
    return (
        python.parents[1] / f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    )


def metadata_only(folder: Path, name: str, version: str) -> None:
    """Writes the metadata of an installed package that has no files."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "INSTALLER").write_text("vendor\n")
    (info / "RECORD").write_text(f"{info.name}/METADATA,,\n{info.name}/RECORD,,\n")


def wheel(folder: Path, name: str, version: str, *requires: str) -> None:
    """Writes a wheel that holds nothing but its metadata."""
    info = f"{name.replace('-', '_')}-{version}"
    lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"]
    lines += [f"Requires-Dist: {r}\n" for r in requires]
    tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = {f"{info}.dist-info/METADATA": "".join(lines), f"{info}.dist-info/WHEEL": tags}
    zipped(folder / f"{info}-py3-none-any.whl", {k: v.encode() for k, v in files.items()})


def installed_wheel(folder: Path, name: str) -> None:
    """Writes the wheel of a pure package that this Python has installed."""
    package = metadata.distribution(name)
    paths = {str(p): Path(str(p.locate())) for p in package.files or () if p.suffix != ".pyc"}
    files = {k: p.read_bytes() for k, p in paths.items() if p.is_file() and ".." not in k}
    files = {k: v for k, v in files.items() if not k.endswith(("RECORD", "INSTALLER"))}
    zipped(folder / f"{name}-{package.version}-py3-none-any.whl", files)


def zipped(path: Path, files: dict[str, bytes]) -> None:
    """Writes a wheel with its RECORD."""
    path.parent.mkdir(parents=True, exist_ok=True)
    [info] = {k.split("/")[0] for k in files if k.split("/")[0].endswith(".dist-info")}
    record = f"{info}/RECORD"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        lines = [f"{k},sha256={digest(v)},{len(v)}\n" for k, v in files.items()]
        archive.writestr(record, "".join([*lines, f"{record},,\n"]))


def digest(content: bytes) -> str:
    """Returns a SHA-256 as wheels write it."""
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def pip(python: Path, *arguments: str, wheels: Path, **variables: str) -> str:
    """Runs this Python's pip for another environment, with a folder of wheels as the only index;
    returns its standard output, and fails with its errors."""
    own = ("PIP_", "GLM_CORE_", "PYTHONPATH", "VIRTUAL_ENV")
    env = {k: v for k, v in os.environ.items() if not k.startswith(own)}
    env |= {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}
    command = [sys.executable, "-m", "pip", "--python", str(python), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=env | variables, cwd=wheels
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    return done.stdout
