"""Builds the extensions with the compiled kernels.

GLM_CORE_BUILD chooses which ones: auto (the default) builds the CPU's and goes on without it where
it does not compile; off builds none; cpu, cuda and rocm build the CPU's and the one named, and fail
where one does not compile. GLM_CORE_ARCHES names the GPUs to compile for, such as 80,90."""

import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
sys.path.insert(0, str(ROOT))
from csrc import gpu  # noqa: E402
from glm_core import environment, errors  # noqa: E402

try:
    environment.check()
    CHOICE = environment.build()
except errors.ConfigError as error:
    raise SystemExit(str(error)) from None

CPU = "glm_core.backends.cpu._C"
# the slowest to compile first
KERNELS = (
    "quant attention attention_decode linear quant_input norm activation loss optim rope embedding"
    " table"
)
# Reading torch's headers takes most of a compilation. The bindings are included into two files, one
# for each core of a small machine, so that the headers are read twice instead of eight times.
BINDINGS = ["attention library norm pointwise", "decode_step linear product training"]
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512"
X86 = platform.machine() in ("x86_64", "AMD64")
ISAS = {"scalar": ""} | ({"avx2": AVX2, "avx512": AVX512} if X86 else {})
FLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno"
    " -fno-trapping-math -Wall -Wextra"
)
# GCC would keep the arrays of pointers there in vectors: 12 % slower
KERNEL_FLAGS = {"quant": "-fno-tree-slp-vectorize"}


class Build(BuildExtension):
    """Compiles the kernels first, without torch's headers: once per instruction set, or with the
    GPU's compiler. Then compiles the bindings and links both."""

    def build_extensions(self) -> None:
        folder = Path(self.build_temp).resolve() / "glm_core"
        folder.mkdir(parents=True, exist_ok=True)
        for extension in self.extensions:
            cpu = extension.name == CPU
            jobs = cpu_jobs(folder) if cpu else gpu.jobs(CHOICE, folder)
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                extension.extra_objects = list(pool.map(compiled, jobs))
            if cpu:
                extension.sources = [binding_unit(folder, names) for names in BINDINGS]
        super().build_extensions()


def cpu_jobs(folder: Path) -> list[list[str]]:
    """Returns the compiler's commands; each ends in the object file it writes."""
    compiler = [os.environ.get("CXX", "c++"), *FLAGS.split(), f"-I{CSRC}/include"]
    jobs = [[*compiler, "-c", f"{CSRC}/cpu/isa.cpp", "-o", f"{folder}/isa.o"]]
    for kernel in KERNELS.split():
        for isa, isa_flags in ISAS.items():
            flags = [*isa_flags.split(), *KERNEL_FLAGS.get(kernel, "").split(), f"-DGLM_ISA={isa}"]
            target = f"{folder}/{kernel}_{isa}.o"
            jobs.append([*compiler, *flags, "-c", f"{CSRC}/cpu/{kernel}.cpp", "-o", target])
    return jobs


def compiled(command: list[str]) -> str:
    """Runs a compiler's command; returns the object file."""
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"HIP_PLATFORM": "amd"})
    return command[-1]


def binding_unit(folder: Path, names: str) -> str:
    """Writes a source file that includes these bindings; returns its path."""
    path = folder / f"bindings_{names.replace(' ', '_')}.cpp"
    path.write_text("".join(f'#include "{CSRC}/bindings/{name}.cpp"\n' for name in names.split()))
    return str(path)


def cpu_extension() -> Extension:
    """Returns the CPU's extension; optional under GLM_CORE_BUILD=auto."""
    extension = CppExtension(
        CPU,
        [f"csrc/bindings/{name}.cpp" for names in BINDINGS for name in names.split()],
        include_dirs=[str(CSRC / "include")],
        # torch's autograd headers would include every operator of torch otherwise
        define_macros=[("AT_PER_OPERATOR_HEADERS", None)],
        # Python's own flags ask for debug information, of which torch's headers make 30 MB. Without
        # OpenMP, at::parallel_for silently runs on one thread.
        extra_compile_args=["-O2", "-g0", "-fvisibility=hidden", "-Wall", "-fopenmp"],
        extra_link_args=["-fopenmp"],
    )
    extension.optional = CHOICE == "auto"
    return extension


extensions = [] if CHOICE == "off" else [cpu_extension()]
if CHOICE in ("cuda", "rocm"):
    extensions.append(gpu.extension(CHOICE))
core = find_packages(include=["glm_core", "glm_core.*"])
roots = find_packages(include=["backends", "backends.*", "bench", "bench.*"])
setup(
    license="Apache-2.0",
    packages=[p for p in core if not p.startswith(("glm_core.backends", "glm_core.bench"))]
    + [f"glm_core.{p}" for p in roots],
    package_dir={"glm_core.backends": "backends", "glm_core.bench": "bench"},
    ext_modules=extensions,
    cmdclass={"build_ext": Build},
)
