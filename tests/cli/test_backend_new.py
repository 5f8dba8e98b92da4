"""`glm-core backend new` writes the package of a backend. A test that runs docs/porting.md shows
that the package passes conformance and trains to an aligned curve."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from glm_core.backends import registry
from glm_core.cli import main

MAX_LINES = 80


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_skeleton_is_short_typed_and_in_style(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backend", "new", "acme", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["folder"] == "glm-core-acme"
    files = {str(p.relative_to("glm-core-acme")): p for p in Path("glm-core-acme").rglob("*.*")}
    assert set(facts["lines"]) == set(files)
    for name, path in files.items():
        assert facts["lines"][name] == len(path.read_text().splitlines())
    total = sum(facts["lines"].values())
    assert total <= MAX_LINES
    guide = Path(__file__).parents[2] / "docs" / "porting.md"
    assert f"The folder holds {total} lines" in guide.read_text(encoding="utf-8")
    style = ["--isolated", "--line-length=100", "--target-version=py311"]
    check = ["check", "--select=E,F,W,I,B,UP,RUF,PT,SIM,ANN", "--ignore=ANN401"]
    for command in (check, ["format", "--check"]):
        subprocess.run(
            [sys.executable, "-m", "ruff", *command, *style, "glm-core-acme"], check=True
        )


def test_device_and_folder_are_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backend", "new", "a1", "--device", "npu", "--dir", "deep/down"]) == 0
    source = Path("deep/down/glm_core_a1/__init__.py").read_text()
    space: dict[str, object] = {}
    exec(compile(source, "glm_core_a1", "exec"), space)
    backend = space["backend"]
    assert (backend.name, backend.device_type) == ("a1", "npu")  # type: ignore[attr-defined]  # the module is written by the test
    state = backend.probe()  # type: ignore[attr-defined]  # the module is written by the test
    assert not state.ok
    assert "torch cannot use device 'npu'" in state.reason
    assert "lines; next: cd deep/down && pip install -e ." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my-npu", "e.g. my_npu"),
        ("Acme", "e.g. acme"),
        ("2fast", "e.g. my_2fast"),
        ("class", "e.g. my_class"),
        ("...", "e.g. my_npu"),
        ("", "e.g. my_npu"),
        ("a\nb", "e.g. a_b"),
        ("größe", "must be a lower-case Python identifier"),
        ("cpu", "backend name 'cpu': taken; choose one other than"),
        ("onnxrt", "taken"),
    ],
)
def test_names_that_cannot_be(name: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backend", "new", name]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1, err
    assert not list(Path.cwd().iterdir())


def test_device_must_be_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backend", "new", "acme", "--device", 'x"; import os']) == 2
    assert "device type" in capsys.readouterr().err
    assert not list(Path.cwd().iterdir())


def test_a_package_that_is_here_already(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("glm_core_acme").mkdir()
    monkeypatch.syspath_prepend(str(Path.cwd()))
    assert main(["backend", "new", "acme"]) == 2
    assert "a package glm_core_acme is here already" in capsys.readouterr().err


def test_nothing_is_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backend", "new", "acme"]) == 0
    mine = Path("glm-core-acme/glm_core_acme/__init__.py")
    mine.write_text("precious")
    assert main(["backend", "new", "acme"]) == 2
    assert "glm-core-acme: exists; choose another folder with --dir" in capsys.readouterr().err
    assert mine.read_text() == "precious"
    Path("file").touch()
    assert main(["backend", "new", "acme", "--dir", "file"]) == 2
    Path("empty").mkdir()
    assert main(["backend", "new", "acme", "--dir", "empty"]) == 0


@pytest.mark.parametrize("place", ["file/below", "/proc/nowhere/x"])
def test_nothing_is_half_written(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").touch()
    assert main(["backend", "new", "acme", "--dir", place]) == 2
    err = capsys.readouterr().err
    assert "cannot be written" in err
    assert err.count("\n") == 1
    assert os.listdir() == ["file"]


def test_disk_full_in_the_middle(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: list[Path] = []
    before = Path.write_text

    def write_text(path: Path, *args: object, **rest: object) -> int:
        if written:
            raise OSError(28, "No space left on device")
        written.append(path)
        return before(path, *args, **rest)  # type: ignore[arg-type]  # keyword values of several types

    monkeypatch.setattr(Path, "write_text", write_text)
    assert main(["backend", "new", "acme"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert written
    assert not os.listdir()


def test_a_name_that_is_free_stays_free() -> None:
    """`new` writes files only; the backend exists after the package is installed."""
    assert main(["backend", "new", "acme"]) == 0
    assert "acme" not in registry.names()
