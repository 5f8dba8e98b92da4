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
# Each string is compiled as one file, since reading the headers takes long. Those that stand alone
# use names that others use too, or come out otherwise in company.
SHARED = "attention experts activation embedding norm linear optim rope"
KERNELS = ("quant", f"{SHARED} quant_input table", "attention_decode", "loss")
# compiled once more per instruction set, with vectors of 16 lanes (docs/exact.md)
EXACT = (f"{SHARED} table", "attention_decode", "exact", "loss", "quant")
EXACT_FLAGS = "-DGLM_EXACT -Wno-psabi"
# torch's headers take most of a compilation
BINDINGS = "attention decode_step experts library linear norm pointwise product training"
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
    jobs = [
        [*compiling.binding_command(), *unit("bindings", BINDINGS), "-o", f"{folder}/bindings.o"]
    ]
    kernel_compiler = [*compiling.compiler(), *FLAGS.split(), f"-I{CSRC}/include"]
    jobs.append([*kernel_compiler, "-c", f"{CSRC}/cpu/isa.cpp", "-o", f"{folder}/isa.o"])
    variants = [(names, isa, "") for names in KERNELS for isa in ISAS]
    variants += [
        (names, isa, "_exact")
        for names in EXACT
        for isa in ISAS
        if (names, isa) != ("quant", "avx512")  # that product is exact as it is
    ]
    for names, isa, kind in variants:
        first = names.split()[0]
        exact = f"{EXACT_FLAGS} -DGLM_FAST={isa}" if kind else ""
        flags = f"{ISAS[isa]} {KERNEL_FLAGS.get(first, '')} {exact} -DGLM_ISA={isa}{kind}".split()
        target = f"{folder}/{first}_{isa}{kind}.o"
        jobs.append([*kernel_compiler, *flags, *unit("cpu", names), "-o", target])
    return jobs


def unit(room: str, names: str) -> list[str]:
    """Returns the compiler's arguments that compile these sources of a folder as one file."""
    *before, last = [f"{CSRC}/{room}/{name}.cpp" for name in names.split()]
    return [*(word for path in before for word in ("-include", path)), "-c", last]


# the sources are listed for the sdist and for pip; Build has the commands
sources = [f"csrc/bindings/{name}.cpp" for name in BINDINGS.split()]
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
