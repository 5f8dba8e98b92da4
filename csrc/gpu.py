"""The GPU half of the build: which compiler, which flags, what is linked. For setup.py alone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension
from torch.utils.cpp_extension import CppExtension

from glm_core import environment

ROOT = Path(__file__).parents[1]
KERNELS = ["activation", "embedding", "loss", "norm", "optim", "quant", "rope"]
BINDINGS = ["library", "ops", "quant", "training"]


def compiler(choice: str) -> list[str]:
    """nvcc or hipcc with all its flags; ends the build where there is none."""
    name, home = {"cuda": ("nvcc", "CUDA_HOME"), "rocm": ("hipcc", "ROCM_HOME")}[choice]
    beside = Path(os.environ.get(home, "/nowhere"), "bin", name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise SystemExit(f"GLM_CORE_BUILD={choice}: no {name}; install the toolkit or set {home}")
    arches = environment.arches() or {"cuda": ["80", "90"], "rocm": ["gfx906", "gfx90a"]}[choice]
    flags = ["-std=c++17", "-O3", "-Icsrc/include"]
    if choice == "rocm":
        return [
            found,
            *flags,
            "-fPIC",
            "-ffp-contract=off",
            *(f"--offload-arch={a}" for a in arches),
            "-x",
            "hip",
        ]
    codes = [f"arch=compute_{a},code=[sm_{a},compute_{a}]" for a in arches]
    return [
        found,
        *flags,
        "-Xcompiler=-fPIC",
        "-fmad=false",
        *(x for c in codes for x in ("-gencode", c)),
    ]


def jobs(choice: str, folder: Path) -> list[list[str]]:
    """Commands that end in their target."""
    found = compiler(choice)
    command = [*found[:-2], "-c", *found[-2:]] if choice == "rocm" else [*found, "-c"]
    return [[*command, f"csrc/cuda/{k}.cu", "-o", f"{folder}/{k}_{choice}.o"] for k in KERNELS]


def said(*command: str) -> str:
    """Both outputs of a compiler."""
    env = os.environ | {"HIP_PLATFORM": "amd"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env, cwd=ROOT)
    return done.stdout + done.stderr


def toolkit(nvcc_or_hipcc: str) -> str:
    """Its version, `13.0`."""
    found = re.search(r"(?:release|HIP version:) (\d+\.\d+)", said(nvcc_or_hipcc, "--version"))
    return found[1] if found else "unknown"


def home(choice: str, path: str) -> Path:
    """The toolkit's folder; nvcc may be a script that lies elsewhere, so it is asked."""
    dry = [path, "--dryrun", "-c", "csrc/cuda/norm.cu"] if choice == "cuda" else []
    found = re.search(r"TOP=(\S+)", said(*dry)) if dry else None
    return Path(found[1] if found else Path(path).resolve().parents[1])


def extension(choice: str) -> Extension:
    """glm_core.backends.cuda._C or rocm._C; the toolkit's runtime is linked, nothing of torch's."""
    path = compiler(choice)[0]
    runtime = ["cudart_static", "rt", "dl", "pthread"] if choice == "cuda" else ["amdhip64"]
    return CppExtension(
        f"glm_core.backends.{choice}._C",
        [f"csrc/bindings/cuda/{name}.cpp" for name in BINDINGS],
        include_dirs=[str(ROOT / "csrc"), str(ROOT / "csrc" / "include")],
        libraries=runtime,
        library_dirs=[f"{home(choice, path)}/lib64", f"{home(choice, path)}/lib"],
        extra_compile_args=[
            "-O2",
            "-fvisibility=hidden",
            "-Wall",
            f'-DGLM_TOOLKIT="{toolkit(path)}"',
        ],
    )
