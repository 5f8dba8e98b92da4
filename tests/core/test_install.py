"""An installation into a vendor's container changes no package that is there."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import installing
import pytest

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("pip", "setuptools"))),
    reason="this Python has no pip and setuptools",
)
VENDOR = {"torch": "2.9.0+das.opt1.dtk2604", "triton": "3.5.1+das", "numpy": "1.26.4"}
INDEX = {
    "torch": ("2.14.1", "triton==3.8.0", "nvidia-cublas==13.1"),
    "triton": ("3.8.0",),
    "nvidia-cublas": ("13.1",),
    "numpy": ("2.4.6",),
    "safetensors": ("0.7.0",),
    "sentencepiece": ("0.2.1",),
    "jinja2": ("3.1.7",),
    "tomli": ("2.3.0",),
}
"""an index that would give what the real one gives"""
FORMS = {
    "isolated": ["."],
    "not isolated": ["--no-build-isolation", "."],
    "editable": ["--no-build-isolation", "-e", "."],
}


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of wheels: the index, and setuptools for builds."""
    folder = tmp_path_factory.mktemp("wheels")
    installing.installed_wheel(folder, "setuptools")
    for name, (version, *requires) in INDEX.items():
        installing.wheel(folder, name, version, *requires)
    return folder


@pytest.fixture(scope="module")
def container(tmp_path_factory: pytest.TempPathFactory, wheels: Path) -> Path:
    """The Python of an environment with the metadata of a vendor's packages."""
    python = installing.environment(tmp_path_factory.mktemp("container") / "env")
    for name, version in VENDOR.items():
        installing.metadata_only(installing.packages(python), name, version)
    installing.pip(python, "install", "-q", "setuptools", wheels=wheels)
    return python


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources, outside the clone."""
    return installing.copy_sources(tmp_path_factory.mktemp("sources") / "glm")


def would_install(python: Path, wheels: Path, arguments: list[str]) -> set[str]:
    """Returns the names in pip's report of a dry run."""
    arguments = ["install", "--dry-run", "-q", "--report", "-", *arguments]
    report = json.loads(installing.pip(python, *arguments, wheels=wheels))
    return {entry["metadata"]["name"].lower() for entry in report["install"]}


@pytest.mark.parametrize("form", FORMS)
def test_a_vendor_s_packages_stay(form: str, container: Path, wheels: Path, sources: Path) -> None:
    arguments = [str(sources) if a == "." else a for a in FORMS[form]]
    names = would_install(container, wheels, arguments)
    assert names - {"tomli"} == {"glm-core", "jinja2", "safetensors", "sentencepiece"}


def test_a_narrower_window_would_be_seen(container: Path, wheels: Path, tmp_path: Path) -> None:
    copy = installing.copy_sources(tmp_path / "glm")
    project = copy / "pyproject.toml"
    project.write_text(project.read_text().replace('"torch>=2.7"', '"torch>=2.13"'))
    names = would_install(container, wheels, ["--no-build-isolation", str(copy)])
    assert {"torch", "triton", "nvidia-cublas"} <= names


def test_without_torch_the_package_says_what_it_lacks(
    container: Path, wheels: Path, sources: Path
) -> None:
    arguments = ["install", "--no-deps", "--no-build-isolation", str(sources)]
    installing.pip(container, *arguments, wheels=wheels)
    [note] = installing.packages(container).glob("glm_core/backends/cpu/_C.*.json")
    trouble = json.loads(note.read_text())["trouble"]
    assert trouble.startswith(f"no torch to compile for in {container.parents[1]}; install torch")
    assert trouble.endswith("then: pip install --no-build-isolation .")
