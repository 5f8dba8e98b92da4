"""Compiles the GPU sources as they are built, for chips that are not here, links them and judges
their machine code: `python gpu_build.py [cuda|hip ARCH ...]` prints the number of kernels per
architecture and the faults that machine_code finds; by default for all that the project names."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import machine_code

CSRC = Path(__file__).parents[2] / "csrc"
TOGETHER = (
    *("activation", "embedding", "exact_attention", "exact_product", "experts", "loss", "norm"),
    *("optim", "quant", "rope"),
)
"""sources that are compiled as one: the compilers' own headers take most of the time"""
NVIDIA_ONLY = ("tensor_rows",)
"""sources whose kernels HIP does not compile"""
ARCHES = {"cuda": ("80", "90"), "hip": ("gfx906", "gfx90a")}
NVCC, HIPCC = shutil.which("nvcc"), shutil.which("hipcc")
CUDA_FLAGS = [  # nvcc's -O3 is for the host, whose code nobody looks at; chips have it by default
    "-std=c++17",
    "-fmad=false",
    f"-I{CSRC}/include",
    "-Xcompiler=-fPIC",
    "-Werror=all-warnings",
    "-Xptxas=-v",
]
HIP_FLAGS = [
    "-std=c++17",
    "-O3",  # as it is built: what the compiler makes depends on it
    *("-Xarch_host", "-O0"),  # code of the host, which nobody looks at
    "-fPIC",
    "-ffp-contract=off",
    f"-I{CSRC}/include",
    "-Wall",
    "-Werror",
    "-x",
    "hip",
]


def run(command: list[str]) -> str:
    """Returns the command's standard error; fails with it where the command fails."""
    env = os.environ | {"HIP_PLATFORM": "amd"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def sources(folder: Path) -> list[Path]:
    """Returns what is compiled: the sources, those of TOGETHER as one, written into `folder`."""
    together = folder / "together.cu"
    together.write_text("".join(f'#include "{CSRC}/cuda/{name}.cu"\n' for name in TOGETHER))
    return [together, *(s for s in (CSRC / "cuda").glob("*.cu") if s.stem not in TOGETHER)]


def compiled(command: list[str], folder: Path) -> tuple[list[Path], str]:
    """Compiles every source by the command. Returns the objects, and what the compiler said."""
    jobs = {s: folder / f"{s.stem}.o" for s in sources(folder)}
    commands = [[*command, "-c", str(s), "-o", str(o)] for s, o in jobs.items()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(jobs.values()), "".join(pool.map(run, commands))


def cuda(folder: Path, arches: Sequence[str] = ARCHES["cuda"]) -> list[Path]:
    """Returns the objects of nvcc, linked once; fails where something spills."""
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in arches]
    objects, messages = compiled([str(NVCC), *CUDA_FLAGS, *targets], folder)
    assert set(re.findall(r"for 'sm_(\d+)'", messages)) == set(arches)
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill stores", messages)]
    assert len(spilled) >= len(arches) * len(objects)
    assert not any(spilled)
    target = folder / "kernels.so"
    words = ["-shared", "-cudart=static", *map(str, objects), "-o", str(target)]
    run([str(NVCC), *words, "-Xlinker=-z,defs"])
    assert target.stat().st_size
    return objects


def hip(folder: Path, arches: Sequence[str] = ARCHES["hip"]) -> list[Path]:
    """Returns the objects of hipcc that have kernels, linked once."""
    targets = [f"--offload-arch={a}" for a in arches]
    objects, _ = compiled([str(HIPCC), *HIP_FLAGS, *targets], folder)
    for o in objects:
        assert all((a.encode() in o.read_bytes()) is (o.stem not in NVIDIA_ONLY) for a in arches)
    run([str(HIPCC), "-shared", *map(str, objects), "-o", str(folder / "k.so"), "-Wl,-z,defs"])
    return [o for o in objects if o.stem not in NVIDIA_ONLY]


def look(kernels: list[machine_code.Kernel], *arches: str) -> None:
    """Fails where a kernel is missing for an architecture or holds what it should not."""
    of_arch = {a: {k.name for k in kernels if k.arch == a} for a in arches}
    assert len(of_arch[arches[0]]) >= 100
    assert len({frozenset(names) for names in of_arch.values()}) == 1
    assert not any(not k.mnemonics for k in kernels)
    found = machine_code.faults(kernels)
    assert not found, "\n" + "\n".join(found)


def main(kind: str = "", *arches: str) -> None:
    for maker in (kind,) if kind else ARCHES:
        chosen = arches or ARCHES[maker]
        with tempfile.TemporaryDirectory() as name:
            if maker == "cuda":
                objects = cuda(Path(name), chosen)
                kernels = [k for o in objects for k in machine_code.cuda_kernels(o)]
                look(kernels, *(f"sm_{a}" for a in chosen))
            else:
                kernels = [k for o in hip(Path(name), chosen) for k in machine_code.hip_kernels(o)]
                look(kernels, *chosen)
        print(maker, dict(Counter(k.arch for k in kernels)), "no faults")


if __name__ == "__main__":
    main(*sys.argv[1:])
