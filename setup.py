"""Builds the extensions. GLM_CORE_BUILD = auto (default: the CPU's, go on without it where it does
not compile) | off | cpu | cuda | rocm (the CPU's and that one; an error where it does not compile).
GLM_CORE_ARCHES = 80,90 or gfx90a,gfx942: what the GPU kernels are compiled for."""

import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))
from csrc import gpu  # noqa: E402
from glm_core import environment, errors  # noqa: E402

try:
    environment.check()
    CHOICE = environment.build()
except errors.ConfigError as error:
    raise SystemExit(str(error)) from None

KERNELS = [
    "activation",
    "attention",
    "attention_decode",
    "embedding",
    "linear",
    "loss",
    "norm",
    "optim",
    "quant",
    "rope",
    "table",
]
BINDINGS = [
    "attention",
    "decode_step",
    "library",
    "linear",
    "norm",
    "pointwise",
    "product",
    "training",
]
X86 = platform.machine() in ("x86_64", "AMD64")
ISAS = {"scalar": []} | (
    {
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "avx512": [
            "-mavx2",
            "-mfma",
            "-mf16c",
            *(f"-mavx512{s}" for s in ("f", "bw", "vl", "dq")),
            "-mprefer-vector-width=512",
        ],
    }
    if X86
    else {}
)
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    "-Icsrc/include",
]
# GCC would keep the arrays of pointers there in vectors: 12 % slower
OF_KERNEL = {"quant": ["-fno-tree-slp-vectorize"]}


class Build(BuildExtension):
    """The kernels first, without torch's headers: once per instruction set, or by the GPU's
    compiler; then the bindings."""

    def build_extensions(self) -> None:
        folder = Path(self.build_temp).resolve() / "kernels"
        folder.mkdir(parents=True, exist_ok=True)
        for made in self.extensions:
            jobs = gpu.jobs(CHOICE, folder) if "cpu" not in made.name else self.cpu_jobs(folder)
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                made.extra_objects = list(pool.map(self.compiled, jobs))
        super().build_extensions()

    def cpu_jobs(self, folder: Path) -> list[list[str]]:
        """Commands that end in their target."""
        compiler = [os.environ.get("CXX", "c++"), *FLAGS]
        jobs = [[*compiler, "-c", "csrc/cpu/isa.cpp", "-o", f"{folder}/isa.o"]]
        return jobs + [
            [
                *compiler,
                *flags,
                *OF_KERNEL.get(k, []),
                f"-DGLM_ISA={isa}",
                "-c",
                f"csrc/cpu/{k}.cpp",
                "-o",
                f"{folder}/{k}_{isa}.o",
            ]
            for k in KERNELS
            for isa, flags in ISAS.items()
        ]

    def compiled(self, command: list[str]) -> str:
        """Runs a command; returns its target."""
        subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"HIP_PLATFORM": "amd"})
        return command[-1]


def extension() -> Extension:
    """glm_core.backends.cpu._C; optional under GLM_CORE_BUILD=auto."""
    made = CppExtension(
        "glm_core.backends.cpu._C",
        [f"csrc/bindings/{name}.cpp" for name in BINDINGS],
        include_dirs=[str(ROOT / "csrc" / "include")],
        # OpenMP: without it at::parallel_for runs on one thread and says nothing
        extra_compile_args=["-O2", "-fvisibility=hidden", "-Wall", "-fopenmp"],
        extra_link_args=["-fopenmp"],
    )
    made.optional = CHOICE == "auto"
    return made


extensions = [] if CHOICE == "off" else [extension()]
if CHOICE in ("cuda", "rocm"):
    extensions.append(gpu.extension(CHOICE))
ours = find_packages(include=["glm_core", "glm_core.*"])
split = [
    f"glm_core.{p}" for p in find_packages(include=["backends", "backends.*", "bench", "bench.*"])
]
setup(
    packages=[p for p in ours if not p.startswith(("glm_core.backends", "glm_core.bench"))] + split,
    package_dir={"glm_core.backends": "backends", "glm_core.bench": "bench"},
    ext_modules=extensions,
    cmdclass={"build_ext": Build},
)
