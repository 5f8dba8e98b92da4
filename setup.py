"""Builds the extensions. GLM_CORE_BUILD = auto (default: the CPU's, go on without it where it does
not compile) | off | cpu | cuda | rocm (the CPU's and that one; an error where it does not compile).
GLM_CORE_ARCHES = 80,90 or gfx90a,gfx942: what the GPU kernels are compiled for."""

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))
from glm_core import environment, errors  # noqa: E402

try:
    environment.check()
    CHOICE = environment.build()
except errors.ConfigError as error:
    raise SystemExit(str(error)) from None

GPU_KERNELS = ["activation", "embedding", "loss", "norm", "optim", "quant", "rope"]
GPU_BINDINGS = ["library", "ops", "quant", "training"]
KERNELS = [
    "activation", "attention", "attention_decode", "embedding", "linear", "loss", "norm", "optim",
    "quant", "rope", "table",
]  # fmt: skip
BINDINGS = ["attention", "library", "linear", "norm", "pointwise", "product", "training"]
X86 = platform.machine() in ("x86_64", "AMD64")
ISAS = {"scalar": []} | (
    {
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "avx512": ["-mavx2", "-mfma", "-mf16c", *(f"-mavx512{s}" for s in ("f", "bw", "vl", "dq")),
                   "-mprefer-vector-width=512"],
    } if X86 else {}
)  # fmt: skip
FLAGS = [
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno",
    "-fno-trapping-math", "-Wall", "-Wextra", "-Icsrc/include",
]  # fmt: skip


def gpu_compiler() -> list[str]:
    """nvcc or hipcc with all its flags; ends the build where there is none."""
    name, home = {"cuda": ("nvcc", "CUDA_HOME"), "rocm": ("hipcc", "ROCM_HOME")}[CHOICE]
    beside = Path(os.environ.get(home, "/nowhere"), "bin", name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise SystemExit(f"GLM_CORE_BUILD={CHOICE}: no {name}; install the toolkit or set {home}")
    arches = environment.arches() or {"cuda": ["80", "90"], "rocm": ["gfx906", "gfx90a"]}[CHOICE]
    flags = ["-std=c++17", "-O3", "-Icsrc/include"]
    if CHOICE == "rocm":
        return [found, *flags, "-fPIC", "-ffp-contract=off",
                *(f"--offload-arch={a}" for a in arches), "-x", "hip"]  # fmt: skip
    codes = [f"arch=compute_{a},code=[sm_{a},compute_{a}]" for a in arches]
    return [found, *flags, "-Xcompiler=-fPIC", "-fmad=false",
            *(x for c in codes for x in ("-gencode", c))]  # fmt: skip


class Build(BuildExtension):
    """The kernels first, without torch's headers: once per instruction set, or by the GPU's
    compiler; then the bindings."""

    def build_extensions(self) -> None:
        folder = Path(self.build_temp).resolve() / "kernels"
        folder.mkdir(parents=True, exist_ok=True)
        for made in self.extensions:
            jobs = self.gpu_jobs(folder) if "cpu" not in made.name else self.cpu_jobs(folder)
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                made.extra_objects = list(pool.map(self.compiled, jobs))
        super().build_extensions()

    def cpu_jobs(self, folder: Path) -> list[list[str]]:
        """Commands that end in their target."""
        compiler = [os.environ.get("CXX", "c++"), *FLAGS]
        jobs = [[*compiler, "-c", "csrc/cpu/isa.cpp", "-o", f"{folder}/isa.o"]]
        return jobs + [
            [*compiler, *flags, f"-DGLM_ISA={isa}", "-c", f"csrc/cpu/{k}.cpp",
             "-o", f"{folder}/{k}_{isa}.o"]
            for k in KERNELS for isa, flags in ISAS.items()
        ]  # fmt: skip

    def gpu_jobs(self, folder: Path) -> list[list[str]]:
        compiler = gpu_compiler()
        command = [*compiler[:-2], "-c", *compiler[-2:]] if CHOICE == "rocm" else [*compiler, "-c"]
        return [[*command, f"csrc/cuda/{k}.cu", "-o", f"{folder}/{k}_{CHOICE}.o"]
                for k in GPU_KERNELS]  # fmt: skip

    def compiled(self, command: list[str]) -> str:
        """Runs a command; returns its target."""
        subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"HIP_PLATFORM": "amd"})
        return command[-1]


def said(*command: str) -> str:
    """Both outputs of a compiler."""
    env = os.environ | {"HIP_PLATFORM": "amd"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env, cwd=ROOT)
    return done.stdout + done.stderr


def toolkit(compiler: str) -> str:
    """Its version, `13.0`."""
    found = re.search(r"(?:release|HIP version:) (\d+\.\d+)", said(compiler, "--version"))
    return found[1] if found else "unknown"


def home(compiler: str) -> Path:
    """The toolkit's folder; nvcc may be a script that lies elsewhere, so it is asked."""
    dry = [compiler, "--dryrun", "-c", "csrc/cuda/norm.cu"] if CHOICE == "cuda" else []
    found = re.search(r"TOP=(\S+)", said(*dry)) if dry else None
    return Path(found[1] if found else Path(compiler).resolve().parents[1])


def gpu_extension() -> Extension:
    """glm_core.backends.cuda._C or rocm._C; the toolkit's runtime is linked, nothing of torch's."""
    compiler = gpu_compiler()[0]
    runtime = ["cudart_static", "rt", "dl", "pthread"] if CHOICE == "cuda" else ["amdhip64"]
    return CppExtension(
        f"glm_core.backends.{CHOICE}._C",
        [f"csrc/bindings/cuda/{name}.cpp" for name in GPU_BINDINGS],
        include_dirs=[str(ROOT / "csrc"), str(ROOT / "csrc" / "include")],
        libraries=runtime,
        library_dirs=[f"{home(compiler)}/lib64", f"{home(compiler)}/lib"],
        extra_compile_args=[
            "-O2",
            "-fvisibility=hidden",
            "-Wall",
            f'-DGLM_TOOLKIT="{toolkit(compiler)}"',
        ],
    )


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
    extensions.append(gpu_extension())
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
