"""Builds the one optional extension. GLM_CORE_BUILD = auto (default: go on without it where it
does not compile) | off | cpu (an error where it does not compile)."""

import os
import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
CHOICES = ("auto", "off", "cpu")
CHOICE = os.environ.get("GLM_CORE_BUILD", "auto")
if CHOICE not in CHOICES:
    raise SystemExit(f"GLM_CORE_BUILD={CHOICE!r}: allowed are {', '.join(CHOICES)}")

KERNELS = ["activation", "attention", "embedding", "loss", "norm", "optim", "rope", "table"]
BINDINGS = ["attention", "library", "norm", "pointwise", "training"]
X86 = platform.machine() in ("x86_64", "AMD64")
ISAS = {"scalar": []} | (
    {
        "avx2": ["-mavx2", "-mfma"],
        "avx512": ["-mavx2", "-mfma", *(f"-mavx512{s}" for s in ("f", "bw", "vl", "dq")),
                   "-mprefer-vector-width=512"],
    } if X86 else {}
)  # fmt: skip
FLAGS = [
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno",
    "-fno-trapping-math", "-Wall", "-Wextra", "-Icsrc/include",
]  # fmt: skip


class Build(BuildExtension):
    """The kernels once per instruction set, without torch's headers; then the bindings."""

    def build_extensions(self) -> None:
        if self.extensions:
            folder = Path(self.build_temp).resolve() / "kernels"
            folder.mkdir(parents=True, exist_ok=True)
            jobs = [("isa", "", [])]
            jobs += [(k, isa, flags) for k in KERNELS for isa, flags in ISAS.items()]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(lambda job: self.kernel(folder, *job), jobs))
            self.extensions[0].extra_objects = objects
        super().build_extensions()

    def kernel(self, folder: Path, name: str, isa: str, flags: list[str]) -> str:
        """Compiles csrc/cpu/NAME.cpp for one instruction set; returns the object file."""
        target = str(folder / f"{name}_{isa}.o")
        source = f"csrc/cpu/{name}.cpp"
        named = [f"-DGLM_ISA={isa}"] if isa else []
        compiler = os.environ.get("CXX", "c++")
        subprocess.run(
            [compiler, *FLAGS, *flags, *named, "-c", source, "-o", target], check=True, cwd=ROOT
        )
        return target


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


ours = find_packages(include=["glm_core", "glm_core.*"])
split = [
    f"glm_core.{p}" for p in find_packages(include=["backends", "backends.*", "bench", "bench.*"])
]
setup(
    packages=[p for p in ours if not p.startswith(("glm_core.backends", "glm_core.bench"))] + split,
    package_dir={"glm_core.backends": "backends", "glm_core.bench": "bench"},
    ext_modules=[] if CHOICE == "off" else [extension()],
    cmdclass={"build_ext": Build},
)
