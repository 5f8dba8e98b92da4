"""Builds csrc/cuda and its bindings for the CPU, one fiber per thread, under AddressSanitizer and
UBSan. The result is kept in .cache until the sources change."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import workers

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
TORCH = Path(torch.__file__).parent
COMPILER = os.environ.get("CXX", "g++")
SANITIZERS = [
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    # what these two would see AddressSanitizer sees too, and its checks as calls compile faster
    "-fno-sanitize=object-size,pointer-overflow",
    "--param=asan-instrumentation-with-call-threshold=0",
]
FOLDERS = [f"-I{CSRC}/include", f"-I{CSRC}/fibers"]
BINDINGS = ("exact", "experts", "ops", "quant", "training")
KERNEL = [
    "-std=c++17",
    "-O1",
    "-g1",
    "-fPIC",
    "-DGLM_FIBERS",
    *FOLDERS,
    "-Wall",
    "-Wextra",
    "-Werror",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    *SANITIZERS,
    "-x",
    "c++",
]
SCHEDULER = [*(flag for flag in KERNEL if flag not in SANITIZERS), "-O2", "-D__SANITIZE_ADDRESS__"]
"""it tells AddressSanitizer of every switch, but is not examined itself: it runs all the time"""
BINDING = [
    "-std=c++20",
    "-O0",
    "-fPIC",
    "-DGLM_FIBERS",
    f"-I{CSRC}",
    f"-I{CSRC}/bindings/cuda",
    *FOLDERS,
    f"-I{sysconfig.get_path('include')}",
    f"-I{TORCH}/include",
    f"-I{TORCH}/include/torch/csrc/api/include",
]


def sources(folder: Path) -> dict[Path, list[str]]:
    """Returns every source with its flags. The bindings are one source, written into `folder`:
    torch's headers are read once."""
    kernels = sorted((CSRC / "cuda").glob("*.cu"))
    bindings = folder / "bindings.cpp"
    bindings.write_text("".join(f'#include "{name}.cpp"\n' for name in BINDINGS))
    scheduler = CSRC / "fibers" / "fibers.cpp"
    return {**dict.fromkeys(kernels, KERNEL), scheduler: SCHEDULER, bindings: BINDING}


def run(command: list[str]) -> None:
    """Runs a command; raises RuntimeError with the compiler's message."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-3000:]}")


def link(objects: list[Path], target: Path) -> Path:
    """Links the objects to a shared library."""
    torch_libraries = [f"-L{TORCH}/lib", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{TORCH}/lib"]
    run([COMPILER, "-shared", *SANITIZERS, *map(str, objects), *torch_libraries, "-o", str(target)])
    return target


def library() -> Path:
    """Returns libfibers.so, whose objects lie beside it; one process builds it, others wait."""
    digest = hashlib.sha256(f"{torch.__version__} {KERNEL} {SCHEDULER} {BINDING}".encode())
    parts = (CSRC / part for part in ("bindings", "cuda", "fibers", "include"))
    for path in sorted(p for part in parts for p in part.rglob("*") if p.is_file()):
        digest.update(path.name.encode() + path.read_bytes())
    folder = ROOT / ".cache" / "fibers" / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "libfibers.so"
    with workers.locked(target):
        if not target.exists():
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(lambda s: compiled(*s, folder), sources(folder).items()))
            link(objects, folder / "new.so").replace(target)
    return target


def compiled(source: Path, flags: list[str], folder: Path) -> Path:
    """Compiles a source; returns the object file."""
    target = folder / f"{source.stem}{source.suffix}.o"
    run([COMPILER, *flags, "-c", str(source), "-o", str(target)])
    return target


def spoiled(source: str, edits: Sequence[tuple[str, str, str]], folder: Path) -> Path:
    """Builds the library with csrc/cuda/`source` compiled again after `right` was replaced by
    `wrong` in csrc/cuda/`file`, for each (file, right, wrong). `planted(1)` in it is true where the
    environment says PLANTED=1."""
    shutil.copytree(CSRC / "cuda", folder / "cuda")
    for file, right, wrong in edits:
        text = (folder / "cuda" / file).read_text()
        assert text.count(right) == 1, f"{file}: {text.count(right)} times {right!r}"
        (folder / "cuda" / file).write_text(text.replace(right, wrong))
    switch = folder / "planted.h"
    switch.write_text(
        "#include <cstdlib>\ninline bool planted(int bug) {\n"
        '  static const int chosen = std::atoi(std::getenv("PLANTED"));\n'
        "  return bug == chosen;\n}\n"
    )
    fresh = compiled(folder / "cuda" / source, [*KERNEL, "-include", str(switch)], folder)
    others = [p for p in library().parent.glob("*.o") if p.name != fresh.name]
    return link([fresh, *others], folder / "spoiled.so")


def instrumented() -> dict[str, str]:
    """Returns the environment of a Python that loads the library: it preloads the sanitizers'
    runtimes."""
    runtimes = (
        subprocess.run(
            [COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    )
    # torch holds memory until the end, which is no leak
    options = {"LD_PRELOAD": " ".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0"}
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'shared'}"
    return {**os.environ, **options, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
