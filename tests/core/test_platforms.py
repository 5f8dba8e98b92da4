"""Simulates systems that nobody here has: without what only Linux or POSIX offer, everything
imports, and the reference backend conforms and trains."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rooms import MODULES, ROOT

from glm_core.training import checkpoint


def test_the_python_path_asks_linux_for_nothing(tmp_path: Path) -> None:
    paths = [str(ROOT), str(ROOT / "tests/shared")]
    subprocess.run(
        [sys.executable, str(Path(__file__).with_name("elsewhere.py")), "macos", "windows"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        check=True,
    )
    for system in ("macos", "windows"):
        log = (tmp_path / system / "log").read_text(encoding="utf-8")
        lines = log.splitlines()
        modules = next((line for line in lines if line.startswith("modules: ")), log)
        assert int(modules.split()[1]) > len(MODULES) / 2
        codes = [line.split()[1] for line in lines if line.startswith("exit ")]
        assert codes == ["0"] * 4, log
        assert "noise: this system has no record of what other processes did" in lines
        assert f"cpu known: True memory: {system == 'macos'}" in lines
        assert (tmp_path / system / "run/checkpoints/step-00000002.safetensors").exists()


def test_windows_flushes_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, flags = tmp_path / "a", []
    file.write_bytes(b"a")
    plain_open = os.open
    monkeypatch.setattr(os, "open", lambda p, f: (flags.append(f), plain_open(p, f))[1])
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(os, "name", "nt")
        checkpoint.flush(file)
        checkpoint.flush(tmp_path)
    assert flags == [os.O_RDWR]


def texts_without_encoding(source: str) -> list[int]:
    """Returns the lines that open a file as text and leave the encoding to the system."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(k.arg == "encoding" for k in node.keywords):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
        modes = [a.value for a in node.args[:2] if isinstance(a, ast.Constant)]
        binary = any("b" in m for m in modes if isinstance(m, str))
        mode = any(isinstance(m, str) and set(m) <= set("rwax+t") for m in modes)
        if name in ("read_text", "write_text") or (
            not binary and (ast.unparse(node.func) == "open" or (name == "open" and mode))
        ):
            found.append(node.lineno)
    return found


def test_text_files_are_utf8_on_every_system() -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in MODULES.values()}
    wrong = [f"{path}:{line}" for path, t in texts.items() for line in texts_without_encoding(t)]
    assert not wrong


def test_a_text_file_without_encoding_is_seen() -> None:
    wrong = 'p.read_text()\np.open("w")\nopen(p)\nopen(p, "rb")\np.open("ab")\nos.open(p, 0)\n'
    assert texts_without_encoding(wrong) == [1, 2, 3]
