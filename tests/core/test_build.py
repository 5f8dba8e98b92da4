"""What setup.py does without a compiler, with one that fails, without torch, and with GPU toolkits:
it goes on with a reason, or ends in one line."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from glm_core.backends.cpu import built

ROOT = Path(__file__).parents[2]
COMPILER = """#!/bin/sh
case "$*" in *{fails}*) echo "x.cpp:1: internal compiler error: killed" >&2; exit 1;; esac
for last; do :; done; : > "$last"
"""
HIPCC = """#!/bin/sh
case "$*" in
  *--version*) echo "HIP version: 6.3.25211";;
  *gfx936*|*gfx906*) test -n "$LD_LIBRARY_PATH" || exit 1;;
  *) echo "clang: error: invalid target ID" >&2; exit 1;;
esac
"""


def script(path: Path, text: str) -> Path:
    """Writes a program."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def build(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs setup.py's build_ext into a folder of its own."""
    known = {k: v for k, v in os.environ.items() if not k.startswith("GLM_CORE_")}
    into = ["--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    command = [sys.executable, "setup.py", "-q", "build_ext", *into]
    env = known | variables
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def built_in(folder: Path) -> Path:
    """The folder of the CPU's extension."""
    return folder / "lib/glm_core/backends/cpu"


@pytest.mark.parametrize("choice", ["auto", "cpu"])
def test_no_compiler_is_one_line(tmp_path: Path, choice: str) -> None:
    done = build(tmp_path, GLM_CORE_BUILD=choice, CXX="/nowhere/c++")
    fact = "no C++ compiler /nowhere/c++; install g++ or clang, or set CXX"
    assert [line for line in done.stderr.splitlines() if fact in line] == [
        done.stderr.strip().splitlines()[-1]
    ]
    assert "Traceback" not in done.stderr
    assert (done.returncode == 0) == (choice == "auto")
    if choice == "auto":
        assert built.trouble(built_in(tmp_path), "BUILD") == f"not built: {fact}; BUILD"


def test_a_compiler_that_fails_midway_leaves_no_extension(tmp_path: Path) -> None:
    stale = built_in(tmp_path) / f"_C{built.EXTENSION_SUFFIXES[0]}"
    script(stale, "of another torch")
    compiler = script(tmp_path / "c++", COMPILER.format(fails="loss.cpp"))
    done = build(tmp_path, CXX=str(compiler))
    assert done.returncode == 0
    assert not stale.exists()
    why = built.trouble(built_in(tmp_path), "BUILD")
    assert why.startswith(f"not built: {compiler} failed on loss.cpp: x.cpp:1: internal compiler")


def test_the_note_names_the_torch_that_was_compiled_for(tmp_path: Path) -> None:
    compiler = script(tmp_path / "c++", COMPILER.format(fails="NOTHING"))
    assert build(tmp_path, CXX=f"{compiler} -m64", GLM_CORE_BUILD="cpu").returncode == 0
    assert built.trouble(built_in(tmp_path), "BUILD") == ""
    [note] = built_in(tmp_path).glob("*.json")
    assert json.loads(note.read_text())["torch"] == torch.__version__.partition("+")[0]


def test_off_needs_no_torch_and_no_compiler(tmp_path: Path) -> None:
    script(tmp_path / "no/torch.py", "raise SystemExit('torch was imported')")
    path = str(tmp_path / "no")
    done = build(tmp_path, GLM_CORE_BUILD="off", CXX="/nowhere/c++", PYTHONPATH=path)
    assert done.returncode == 0
    assert not done.stderr
    assert not built_in(tmp_path).exists()


def test_a_torch_that_is_too_old_ends_the_build_before_pip_replaces_it(tmp_path: Path) -> None:
    old = "__version__ = '2.6.0+das.dtk2504'\ncompiled_with_cxx11_abi = lambda: True\n"
    script(tmp_path / "old/torch/__init__.py", old)
    done = build(tmp_path, PYTHONPATH=str(tmp_path / "old"))
    assert done.returncode == 1
    words = "torch 2.6.0+das.dtk2504 is too old; install torch 2.7 or newer first"
    assert done.stderr.strip().splitlines()[-1] == words


def test_a_torch_that_does_not_load_is_named(tmp_path: Path) -> None:
    script(tmp_path / "bad/torch.py", "raise OSError('libgalaxyhip.so.5: cannot open it')")
    done = build(tmp_path, PYTHONPATH=str(tmp_path / "bad"))
    assert done.returncode == 0
    reason = built.trouble(built_in(tmp_path), "BUILD")
    assert reason.startswith("not built: torch cannot be imported: OSError: libgalaxyhip.so.5")
    assert "source the toolkit's env.sh" in reason


def test_torch_is_looked_for_without_the_isolation(tmp_path: Path) -> None:
    """pip hides the environment's packages by a sitecustomize.py on PYTHONPATH."""
    hiding = "import sys\nsys.path = [p for p in sys.path if 'site-packages' not in p]\n"
    script(tmp_path / "site/sitecustomize.py", hiding)
    code = "import torch"
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    hidden = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=False)
    if hidden.returncode == 0:
        pytest.skip("torch lies in no site-packages here")
    code = "from csrc import compiling; print(compiling.torch_here().version)"
    packages = Path(torch.__file__).parents[1]
    code = (
        f"import sys; sys.path.append({str(packages)!r}); import setuptools; sys.path.pop(); {code}"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == torch.__version__, done.stderr


def gpu(code: str, root: Path, **variables: str) -> str:
    """Runs code with csrc.gpu, whose toolkits lie below `root`; returns what it prints."""
    kept = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "ROCM_HOME", "ROCM_PATH")}
    program = f"""
from pathlib import Path
from csrc import gpu
gpu.SEARCH_ROOT = Path({str(root)!r})
try:
    print({code})
except gpu.CompileError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=kept | {"PATH": "/usr/sbin"} | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip() + done.stderr.strip()


@pytest.fixture
def dtk(tmp_path: Path) -> Path:
    """A tree like DTK's, below the folder that is returned."""
    home = tmp_path / "opt/dtk-26.04"
    script(home / "bin/hipcc", HIPCC)
    for folder in ("dcc/lib", "aillvm/lib", "hip/lib"):
        (home / folder).mkdir(parents=True)
    (tmp_path / "opt/dtk").symlink_to(home)
    return tmp_path


def test_dtk_is_found_where_it_lies(dtk: Path) -> None:
    assert gpu("gpu.compiler_path('rocm')", dtk) == f"{dtk}/opt/dtk/bin/hipcc"
    flags = gpu("gpu.link_flags('rocm'), gpu.toolkit('rocm')", dtk)
    for words in ("dcc/lib", "aillvm/lib", "hip/lib", "-lamdhip64", "6.3"):
        assert words in flags
    assert "dcc/lib" in gpu("gpu.variables('rocm')['LD_LIBRARY_PATH']", dtk)


def test_a_variable_comes_before_the_usual_folders(dtk: Path, tmp_path: Path) -> None:
    script(tmp_path / "mine/bin/hipcc", HIPCC)
    mine = gpu("gpu.compiler_path('rocm')", dtk, ROCM_PATH=str(tmp_path / "mine"))
    assert mine == f"{tmp_path}/mine/bin/hipcc"


def test_architectures_that_the_compiler_does_not_know_are_left_out(dtk: Path) -> None:
    words = gpu("gpu.arches('rocm')", dtk)
    assert "('gfx906', 'gfx936')" in words
    assert "hipcc 6.3 does not know gfx908, gfx90a, gfx942, gfx950, gfx926, gfx928" in words


def test_an_architecture_that_nobody_knows_is_an_error(dtk: Path) -> None:
    assert gpu("gpu.arches('rocm')", dtk, GLM_CORE_ARCHES="gfx906,gfx999") == (
        "GLM_CORE_ARCHES=gfx906,gfx999: hipcc 6.3 does not know gfx999; use gfx906, gfx936, "
        "or set ROCM_HOME to a toolkit that knows it"
    )


@pytest.mark.parametrize(("choice", "home"), [("cuda", "CUDA_HOME"), ("rocm", "ROCM_HOME")])
def test_no_toolkit_is_an_error_before_anything_is_compiled(
    tmp_path: Path, choice: str, home: str
) -> None:
    name = {"cuda": "nvcc", "rocm": "hipcc"}[choice]
    want = f"GLM_CORE_BUILD={choice}: no {name}; install the toolkit or set {home}"
    assert gpu(f"gpu.arches({choice!r})", tmp_path) == want
