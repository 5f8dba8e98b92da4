"""Finds the torch to compile for, and runs the compiler's commands. Used only by setup.py."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from setuptools.errors import CompileError

from glm_core import versions

ROOT = Path(__file__).resolve().parents[1]
NO_ISOLATION = "pip install --no-build-isolation ."
ASK = "import json, torch as t; f = t.compiled_with_cxx11_abi()"
ASK += "; print(json.dumps([t.__version__, f, t.__file__]))"


class Torch(NamedTuple):
    """What the compiler has to know of a torch."""

    version: str
    cxx11_abi: bool
    file: str

    @property
    def numbers(self) -> tuple[int, ...]:
        """The first two numbers of the version."""
        return tuple(int(part) for part in self.version.split(".")[:2])

    @property
    def folder(self) -> Path:
        """The folder with torch's headers and libraries."""
        return Path(self.file).parent

    @property
    def include(self) -> list[str]:
        """The folders of torch's headers."""
        return [f"{self.folder}/include", f"{self.folder}/include/torch/csrc/api/include"]

    @property
    def release(self) -> str:
        """The version without what a vendor adds to it: 2.9.0, not 2.9.0+das.opt1."""
        return versions.release(self.version)

    def note(self) -> dict[str, Any]:
        """Returns what backends/cpu/built.py compares with the torch that runs."""
        return {"torch": self.release, "cxx11_abi": self.cxx11_abi}


def new_enough(torch: Torch) -> Torch:
    """Returns the torch; ends the build where it is too old, before pip replaces it."""
    if torch.numbers < versions.TORCH:
        oldest = ".".join(map(str, versions.TORCH))
        raise SystemExit(f"torch {torch.version} is too old; install torch {oldest} or newer first")
    return torch


@cache
def torch_here() -> Torch:
    """Returns the torch of the environment that is installed into; CompileError where it has none.

    Build isolation hides that environment by PYTHONPATH: its own interpreter, run without
    PYTHONPATH, still sees it. A tool that builds in an environment of its own has no torch there.
    """
    env = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    folder = Path(sys.executable).parent  # has no modules that would hide others
    for options in ([], ["-E"]):
        command = [sys.executable, *options, "-c", ASK]
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder)
        if done.returncode == 0:
            return new_enough(Torch(*json.loads(done.stdout.splitlines()[-1])))
        if "No module named 'torch'" not in done.stderr:
            last = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
            raise CompileError(
                f"torch cannot be imported: {last}; source the toolkit's env.sh or reinstall torch"
            )
    raise CompileError(
        f"no torch to compile for in {sys.prefix}; install torch first, then: {NO_ISOLATION}"
    )


def compiler() -> list[str]:
    """Returns the C++ compiler's command; CompileError where it or Python's headers are missing."""
    if os.name == "nt":
        raise CompileError("extensions are not built on Windows; the references run there")
    command = shlex.split(os.environ.get("CXX", "c++"))
    if not shutil.which(command[0]):
        raise CompileError(f"no C++ compiler {command[0]}; install g++ or clang, or set CXX")
    if not Path(python_include(), "Python.h").exists():
        raise CompileError(f"no Python.h in {python_include()}; install python3-dev")
    return command


def python_include() -> str:
    """Returns the folder of Python's headers."""
    return sysconfig.get_path("include")


def binding_command() -> list[str]:
    """Returns the command that compiles what includes torch's headers."""
    command, torch = compiler(), torch_here()
    if not any(Path(folder, "ATen", "ATen.h").exists() for folder in torch.include):
        raise CompileError(f"torch {torch.version} has no headers; install a torch that has them")
    return [
        *command,
        f"-std=c++{20 if torch.numbers >= (2, 13) else 17}",
        # glue: -O2 takes 42 s instead of 26 and gives no faster call or decode step
        "-O1",
        "-DNDEBUG",
        "-fPIC",
        "-fvisibility=hidden",
        "-Wall",
        *openmp(torch),
        # torch's autograd headers would include every operator of torch otherwise
        "-DAT_PER_OPERATOR_HEADERS",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.cxx11_abi)}",
        f"-I{ROOT}/csrc",
        f"-I{ROOT}/csrc/include",
        *(f"-isystem{folder}" for folder in (*torch.include, python_include())),
    ]


def openmp(torch: Torch) -> list[str]:
    """Returns the flags for OpenMP; without it at::parallel_for silently runs on one thread.
    Apple's clang has none, but torch's wheels for macOS carry omp.h and the library. Never run."""
    if sys.platform != "darwin":
        return ["-fopenmp"]
    has = any(Path(folder, "omp.h").exists() for folder in torch.include)
    return ["-Xpreprocessor", "-fopenmp"] if has else []


def link_command(objects: Sequence[str], target: str, extra: Sequence[str] = ()) -> list[str]:
    """Returns the command that links a Python extension. Torch's libraries are loaded before it."""
    torch = torch_here()
    mac = sys.platform == "darwin"
    omp = ["-lomp"] if mac and openmp(torch) else [] if mac else ["-fopenmp"]
    libraries = ["-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python", *omp]
    kind = ["-bundle", "-undefined", "dynamic_lookup"] if mac else ["-shared"]
    folder = f"-L{torch.folder}/lib"
    return [*compiler(), *kind, *objects, folder, *libraries, *extra, "-o", target]


def run(command: Sequence[str], env: Mapping[str, str] | None = None) -> str:
    """Runs a compiler's command; returns the file it writes, its last word. CompileError names the
    source and the first error."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    sys.stderr.write(done.stderr)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line]
        first = errors[0] if errors else f"exit {done.returncode}"
        source = command[command.index("-c") + 1] if "-c" in command else command[-1]
        raise CompileError(f"{command[0]} failed on {Path(source).name}: {first}")
    return command[-1]


def run_all(commands: Sequence[Sequence[str]], env: Mapping[str, str] | None = None) -> list[str]:
    """Runs commands on all cores, the first ones first; returns their files. The first that fails
    ends the rest."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = [pool.submit(run, command, env) for command in commands]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in futures:
            future.cancel()
    for future in done:
        future.result()
    return [future.result() for future in futures]
