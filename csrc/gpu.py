"""Chooses compiler, architectures and libraries of the GPU extensions. Used only by setup.py."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from setuptools.errors import CompileError

from csrc import compiling
from glm_core import environment

ROOT = Path(__file__).resolve().parents[1]
KERNELS = "activation embedding exact_attention exact_product experts few_rows loss norm optim"
KERNELS += " quant rope tensor_rows"
BINDINGS = "exact experts library ops quant training"
SOURCES = [f"csrc/bindings/cuda/{name}.cpp" for name in BINDINGS.split()]
COMPILERS = {"cuda": "nvcc", "rocm": "hipcc"}
HOMES = {"cuda": ("CUDA_HOME",), "rocm": ("ROCM_HOME", "ROCM_PATH")}
"""variables that name a toolkit's folder"""
FOLDERS = {"cuda": ("usr/local/cuda",), "rocm": ("opt/dtk", "opt/dtk-*", "opt/rocm")}
"""where toolkits lie that neither a variable nor PATH names; Hygon's before AMD's"""
SEARCH_ROOT = Path("/")
ARCHES = {
    "cuda": ("80", "90"),
    "rocm": (
        *("gfx906", "gfx908", "gfx90a", "gfx942", "gfx950"),  # AMD's
        *("gfx926", "gfx928", "gfx936", "gfx938"),  # Hygon's, beside gfx906
    ),
}
"""built for by default, as far as the compiler knows them"""
LIBRARY_FOLDERS = ("lib64", "lib", "hip/lib", "dcc/lib", "aillvm/lib", "llvm/lib")
"""where a toolkit keeps libraries; hip/lib, dcc/lib and aillvm/lib are DTK's"""


def compiler_path(choice: str, root: Path | None = None) -> str:
    """Returns the path of nvcc or hipcc: in the folder that a variable names, on PATH, or in a
    folder below `root` where toolkits usually lie. CompileError where there is none."""
    root = root or SEARCH_ROOT
    name = COMPILERS[choice]
    named = [Path(os.environ[v], "bin", name) for v in HOMES[choice] if os.environ.get(v)]
    usual = [p / "bin" / name for f in FOLDERS[choice] for p in sorted(root.glob(f), reverse=True)]
    on_path = [Path(found)] if (found := shutil.which(name)) else []
    for path in (*named, *on_path, *usual):
        if path.exists():
            return str(path)
    raise CompileError(
        f"GLM_CORE_BUILD={choice}: no {name}; install the toolkit or set {HOMES[choice][0]}"
    )


def variables(choice: str, path: str = "") -> dict[str, str]:
    """Returns the environment of nvcc or hipcc. DTK's hipcc does not start without its libraries,
    which DTK's own env.sh names in part."""
    home = Path(path or compiler_path(choice)).parents[1]
    added = {"HIP_PLATFORM": "amd"}  # hipcc would use nvcc where there is one
    if choice == "rocm" and (home / "dcc").is_dir():
        libraries = [str(p) for f in LIBRARY_FOLDERS if (p := home / f).is_dir()]
        before = os.environ.get("LD_LIBRARY_PATH")
        added["LD_LIBRARY_PATH"] = ":".join([*libraries, *([before] if before else [])])
        added["ROCM_PATH"] = str(home)
    return os.environ | added


def output(choice: str, *arguments: str) -> str:
    """Runs nvcc or hipcc, whether or not it fails; returns its standard output and error."""
    command, env = [compiler_path(choice), *arguments], variables(choice)
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    return done.stdout + done.stderr


@cache
def arches(choice: str) -> tuple[str, ...]:
    """Returns the architectures to compile for. Of the default ones, those that the compiler does
    not know are left out and named; CompileError for one that the user named."""
    named = tuple(a.removeprefix("sm_") for a in environment.arches())
    wanted = named or ARCHES[choice]
    known = known_arches(choice, wanted)
    if unknown := [a for a in wanted if a not in known]:
        fact = f"{COMPILERS[choice]} {toolkit(choice)} does not know {', '.join(unknown)}"
        if named or not known:
            usual = ", ".join(known_arches(choice, ARCHES[choice])) or "others"
            raise CompileError(
                f"GLM_CORE_ARCHES={','.join(wanted)}: {fact}; use {usual}, or set "
                f"{HOMES[choice][0]} to a toolkit that knows it"
            )
        print(f"glm_core: {fact}: no kernels for them", file=sys.stderr)
    return known


def known_arches(choice: str, wanted: Sequence[str]) -> tuple[str, ...]:
    """Returns those architectures that the compiler takes; it compiles nothing for that."""
    if choice == "cuda":
        takes = output(choice, "--list-gpu-arch").split()
        return tuple(a for a in wanted if f"compute_{a}" in takes)

    def known(arch: str) -> bool:
        trial = ["-###", f"--offload-arch={arch}", "-x", "hip", "-c", os.devnull, "-o", os.devnull]
        return "error:" not in output(choice, *trial)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return tuple(a for a, ok in zip(wanted, pool.map(known, wanted), strict=True) if ok)


def jobs(choice: str, folder: Path) -> list[list[str]]:
    """Returns the compiler's commands; each ends in the object file it writes."""
    command = [compiler_path(choice), "-std=c++17", "-O3", f"-I{ROOT}/csrc/include"]
    if choice == "rocm":
        targets = [f"--offload-arch={a}" for a in arches(choice)]
        command += ["-fPIC", "-ffp-contract=off", *targets, "-x", "hip"]
    else:
        targets = [f"-gencode=arch=compute_{a},code=[sm_{a},compute_{a}]" for a in arches(choice)]
        command += ["-Xcompiler=-fPIC", "-fmad=false", *targets]
    binding = [*compiling.binding_command(), f'-DGLM_TOOLKIT="{toolkit(choice)}"']
    sources = [(binding, ROOT / source) for source in SOURCES]
    sources += [(command, ROOT / f"csrc/cuda/{kernel}.cu") for kernel in KERNELS.split()]
    return [
        [*command, "-c", str(source), "-o", f"{folder}/{source.name}_{choice}.o"]
        for command, source in sources
    ]


def link_flags(choice: str) -> list[str]:
    """Returns the flags that link the toolkit's runtime, instead of torch's."""
    runtime = ["cudart_static", "rt", "dl", "pthread"] if choice == "cuda" else ["amdhip64"]
    home = toolkit_home(choice)
    folders = [f"-L{home}/{f}" for f in LIBRARY_FOLDERS if (home / f).is_dir()]
    return [*folders, *(f"-l{name}" for name in runtime)]


@cache
def toolkit(choice: str) -> str:
    """Returns the toolkit's version, such as 13.0."""
    match = re.search(r"(?:release|HIP version:) (\d+\.\d+)", output(choice, "--version"))
    return match[1] if match else "unknown"


def toolkit_home(choice: str) -> Path:
    """Returns the toolkit's folder. nvcc may be a script outside it, so a dry run names the
    folder."""
    dry_run = ["--dryrun", "-c", "csrc/cuda/norm.cu"]
    match = re.search(r"TOP=(\S+)", output(choice, *dry_run)) if choice == "cuda" else None
    return Path(match[1] if match else Path(compiler_path(choice)).resolve().parents[1])
