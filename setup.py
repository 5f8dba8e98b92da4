"""Builds the extensions with the compiled kernels, for the torch that is already installed.

GLM_CORE_BUILD chooses which ones: auto (the default) builds the CPU's and goes on without it, with
the reason, where it cannot be built; off builds none; cpu, cuda and rocm build the CPU's and the
one named, and fail where one cannot be built. GLM_CORE_ARCHES names the GPUs to compile for, such
as 80,90 or gfx936."""

import json
import platform
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
sys.path.insert(0, str(ROOT))
try:
    from csrc import compiling, gpu
    from glm_core import environment, errors
except ImportError as error:  # Python or torch is too old
    raise SystemExit(str(error)) from None
try:
    environment.check()
    CHOICE = environment.build()
except errors.ConfigError as error:
    raise SystemExit(str(error)) from None

CPU = "glm_core.backends.cpu._C"
# the slowest to compile first
KERNELS = (
    "quant attention attention_decode linear quant_input norm activation loss optim rope embedding"
    " experts table"
)
# compiled once more per instruction set, with vectors of 16 lanes (docs/exact.md)
EXACT = "attention exact attention_decode linear norm activation loss optim rope embedding experts"
EXACT_FLAGS = "-DGLM_EXACT -Wno-psabi"
# Reading torch's headers takes most of a compilation. The bindings are included into two files, one
# for each core of a small machine, so that the headers are read twice instead of eight times.
BINDINGS = ["attention experts library norm pointwise", "decode_step linear product training"]
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512"
X86 = {"avx2": AVX2, "avx512": AVX512}
ARM = {
    "neon": "-march=armv8-a",
    "dotprod": "-march=armv8.2-a+dotprod",
    "i8mm": "-march=armv8.2-a+dotprod+i8mm+bf16",
}
MACHINES = {"x86_64": X86, "AMD64": X86, "aarch64": ARM, "arm64": ARM}
ISAS = {"scalar": ""} | MACHINES.get(platform.machine(), {})
FLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno"
    " -fno-trapping-math -Wall -Wextra"
)
# GCC would keep the arrays of pointers there in vectors: 12 % slower
KERNEL_FLAGS = {"quant": "-fno-tree-slp-vectorize"}


class Build(build_ext):
    """Compiles the kernels without torch's headers, once per instruction set or with the GPU's
    compiler, and the bindings with them; links both. A note beside each extension says which torch
    it was built for, or why it was not built: it is read before the extension is loaded."""

    def run(self) -> None:
        self.notes: dict[str, dict[str, object]] = {}
        if CHOICE in gpu.COMPILERS:  # before minutes are spent on the CPU's
            gpu.arches(CHOICE)
        super().run()
        for name, note in self.notes.items():
            target = Path(self.get_ext_fullpath(name))
            if "torch" in note or not target.exists():
                target.with_suffix(".json").write_text(json.dumps(note), encoding="utf-8")

    def build_extension(self, extension: Extension) -> None:
        folder = Path(self.build_temp).resolve() / "glm_core"
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        for made in (folder, target.parent):
            made.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        cpu = extension.name == CPU
        try:
            jobs = cpu_jobs(folder) if cpu else gpu.jobs(CHOICE, folder)
            objects = compiling.run_all(jobs, None if cpu else gpu.variables(CHOICE))
            extra = [] if cpu else gpu.link_flags(CHOICE)
            compiling.run(compiling.link_command(objects, str(target), extra))
        except CompileError as error:
            self.notes[extension.name] = {"trouble": str(error)}
            raise
        self.notes[extension.name] = compiling.torch_here().note()


def cpu_jobs(folder: Path) -> list[list[str]]:
    """Returns the compiler's commands; each ends in the object file it writes."""
    binding = compiling.binding_command()
    jobs = [
        [*binding, "-c", binding_unit(folder, names), "-o", f"{folder}/bindings_{i}.o"]
        for i, names in enumerate(BINDINGS)
    ]
    kernel_compiler = [*compiling.compiler(), *FLAGS.split(), f"-I{CSRC}/include"]
    jobs.append([*kernel_compiler, "-c", f"{CSRC}/cpu/isa.cpp", "-o", f"{folder}/isa.o"])
    variants = [(kernel, isa, "") for kernel in KERNELS.split() for isa in ISAS]
    variants += [(kernel, isa, "_exact") for kernel in f"{EXACT} table".split() for isa in ISAS]
    for kernel, isa, kind in variants:
        exact = f"{EXACT_FLAGS} -DGLM_FAST={isa}" if kind else ""
        flags = f"{ISAS[isa]} {KERNEL_FLAGS.get(kernel, '')} {exact} -DGLM_ISA={isa}{kind}".split()
        target = f"{folder}/{kernel}_{isa}{kind}.o"
        jobs.append([*kernel_compiler, *flags, "-c", f"{CSRC}/cpu/{kernel}.cpp", "-o", target])
    return jobs


def binding_unit(folder: Path, names: str) -> str:
    """Writes a source file that includes these bindings; returns its path."""
    path = folder / f"bindings_{names.replace(' ', '_')}.cpp"
    path.write_text("".join(f'#include "{CSRC}/bindings/{name}.cpp"\n' for name in names.split()))
    return str(path)


# the sources are listed for the sdist and for pip; Build has the commands
sources = [f"csrc/bindings/{name}.cpp" for names in BINDINGS for name in names.split()]
extensions = [] if CHOICE == "off" else [Extension(CPU, sources, optional=CHOICE == "auto")]
if CHOICE in gpu.COMPILERS:
    extensions.append(Extension(f"glm_core.backends.{CHOICE}._C", gpu.SOURCES))
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
