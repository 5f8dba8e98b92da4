"""GLM_CORE_* variables: known, read in one place, and refused where they are misspelt."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from glm_core import environment
from glm_core.cli import main
from glm_core.errors import ConfigError

ROOT = Path(__file__).parents[2]


def test_an_unknown_variable_is_an_error_with_the_nearest_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GLM_CORE_IAS", "avx2")
    with pytest.raises(
        ConfigError, match=r"'GLM_CORE_IAS'; known: .*\(did you mean GLM_CORE_ISA\?"
    ):
        environment.check()
    assert main(["devices"]) == 2
    assert "GLM_CORE_IAS" in capsys.readouterr().err


def test_builds_are_those_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLM_CORE_BUILD", "cude")
    with pytest.raises(ConfigError, match="allowed are auto, off, cpu, cuda, rocm"):
        environment.build()
    monkeypatch.setenv("GLM_CORE_ARCHES", "80, 90")
    assert environment.arches() == ["80", "90"]


def test_nobody_reads_a_variable_elsewhere() -> None:
    sources = [
        ROOT / "setup.py",
        *(p for d in ("glm_core", "backends", "bench") for p in (ROOT / d).rglob("*.py")),
    ]
    reading = re.compile(r"environ[^\n]*GLM_CORE_")
    found = [p for p in sources if reading.search(p.read_text(encoding="utf-8"))]
    assert found == [] or {p.name for p in found} == {"environment.py"}
