"""Chooses compiler, flags and libraries of the GPU extensions. Used only by setup.py."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension
from torch.utils.cpp_extension import CppExtension

from glm_core import environment

ROOT = Path(__file__).resolve().parents[1]
KERNELS = "activation embedding loss norm optim quant rope"
BINDINGS = "library ops quant training"


def compiler(choice: str) -> list[str]:
    """Returns nvcc or hipcc with all its flags; ends the build where there is none."""
    name, home = {"cuda": ("nvcc", "CUDA_HOME"), "rocm": ("hipcc", "ROCM_HOME")}[choice]
    in_home = Path(os.environ.get(home, "/nowhere"), "bin", name)
    path = str(in_home) if in_home.exists() else shutil.which(name)
    if path is None:
        raise SystemExit(f"GLM_CORE_BUILD={choice}: no {name}; install the toolkit or set {home}")
    arches = environment.arches() or {"cuda": ["80", "90"], "rocm": ["gfx906", "gfx90a"]}[choice]
    command = [path, "-std=c++17", "-O3", f"-I{ROOT}/csrc/include"]
    if choice == "rocm":
        targets = [f"--offload-arch={a}" for a in arches]
        return [*command, "-fPIC", "-ffp-contract=off", *targets]
    targets = [f"-gencode=arch=compute_{a},code=[sm_{a},compute_{a}]" for a in arches]
    return [*command, "-Xcompiler=-fPIC", "-fmad=false", *targets]


def jobs(choice: str, folder: Path) -> list[list[str]]:
    """Returns the compiler's commands; each ends in the object file it writes."""
    command = [*compiler(choice), "-c", *(["-x", "hip"] if choice == "rocm" else [])]
    return [
        [*command, f"{ROOT}/csrc/cuda/{kernel}.cu", "-o", f"{folder}/{kernel}_{choice}.o"]
        for kernel in KERNELS.split()
    ]


def output(*command: str) -> str:
    """Runs a compiler; returns its standard output and error."""
    env = os.environ | {"HIP_PLATFORM": "amd"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env, cwd=ROOT)
    return done.stdout + done.stderr


def toolkit(nvcc_or_hipcc: str) -> str:
    """Returns the toolkit's version, such as 13.0."""
    match = re.search(r"(?:release|HIP version:) (\d+\.\d+)", output(nvcc_or_hipcc, "--version"))
    return match[1] if match else "unknown"


def home(choice: str, path: str) -> Path:
    """Returns the toolkit's folder. nvcc may be a script outside it, so a dry run names the
    folder."""
    dry_run = [path, "--dryrun", "-c", "csrc/cuda/norm.cu"] if choice == "cuda" else []
    match = re.search(r"TOP=(\S+)", output(*dry_run)) if dry_run else None
    return Path(match[1] if match else Path(path).resolve().parents[1])


def extension(choice: str) -> Extension:
    """Returns glm_core.backends.cuda._C or rocm._C, linked with the toolkit's runtime, not
    torch's."""
    path = compiler(choice)[0]
    runtime = ["cudart_static", "rt", "dl", "pthread"] if choice == "cuda" else ["amdhip64"]
    return CppExtension(
        f"glm_core.backends.{choice}._C",
        [f"csrc/bindings/cuda/{name}.cpp" for name in BINDINGS.split()],
        include_dirs=[f"{ROOT}/csrc", f"{ROOT}/csrc/include"],
        define_macros=[("AT_PER_OPERATOR_HEADERS", None)],  # see setup.py
        libraries=runtime,
        library_dirs=[f"{home(choice, path)}/lib64", f"{home(choice, path)}/lib"],
        extra_compile_args=[
            "-O2",
            "-g0",
            "-fvisibility=hidden",
            "-Wall",
            f'-DGLM_TOOLKIT="{toolkit(path)}"',
        ],
    )
