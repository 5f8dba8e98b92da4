"""Tests that the GPU sources compile and link for sm_80, sm_90, gfx906 and gfx90a, and that the
machine code holds nothing that machine_code.py finds fault with. The result is not run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import machine_code
import pytest

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
NVIDIA_ONLY = ("tensor_rows",)
"""sources whose kernels HIP does not compile"""
NVCC, HIPCC = shutil.which("nvcc"), shutil.which("hipcc")


def run(command: list[str]) -> str:
    """Returns the command's standard error; fails with it where the command fails."""
    env = os.environ | {"HIP_PLATFORM": "amd"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def look(kernels: list[machine_code.Kernel], *arches: str) -> None:
    """Fails where a kernel is missing for an architecture or holds what it should not."""
    of_arch = {a: {k.name for k in kernels if k.arch == a} for a in arches}
    assert len(of_arch[arches[0]]) >= 100
    assert len({frozenset(names) for names in of_arch.values()}) == 1
    assert not any(not k.mnemonics for k in kernels)
    found = machine_code.faults(kernels)
    assert not found, "\n" + "\n".join(found)


@pytest.mark.long
@pytest.mark.skipif(NVCC is None, reason="no nvcc (CUDA toolkit)")
def test_cuda_compiles_links_and_machine_code_is_clean(tmp_path: Path) -> None:
    flags = [
        "-std=c++17",
        "-O3",
        "-fmad=false",
        f"-I{CSRC}/include",
        "-Xcompiler=-fPIC",
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=[sm_90,compute_90]",
        "-Werror=all-warnings",
        "-Xptxas=-v",
    ]
    objects = [tmp_path / f"{s.stem}.o" for s in SOURCES]
    commands = [
        [str(NVCC), *flags, "-c", str(s), "-o", str(o)]
        for s, o in zip(SOURCES, objects, strict=True)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        messages = "".join(pool.map(run, commands))
    assert set(re.findall(r"for 'sm_(\d+)'", messages)) == {"80", "90"}
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill stores", messages)]
    assert len(spilled) >= 2 * len(SOURCES)
    assert not any(spilled)
    target = tmp_path / "kernels.so"
    run(
        [
            str(NVCC),
            "-shared",
            "-cudart=static",
            *map(str, objects),
            "-o",
            str(target),
            "-Xlinker=-z,defs",
        ]
    )
    assert target.stat().st_size
    if not machine_code.nvidia_tool("cuobjdump"):
        pytest.skip("compiles and links; no cuobjdump to look at the code (pip install triton)")
    look([k for o in objects for k in machine_code.cuda_kernels(o)], "sm_80", "sm_90")


@pytest.mark.long
@pytest.mark.skipif(HIPCC is None, reason="no hipcc (Debian: hipcc rocm-device-libs lld)")
def test_hip_compiles_links_and_machine_code_is_clean(tmp_path: Path) -> None:
    flags = [
        "-std=c++17",
        "-O3",  # as it is built: what the compiler makes depends on it
        "-fPIC",
        "-ffp-contract=off",
        f"-I{CSRC}/include",
        "-Wall",
        "-Werror",
        "--offload-arch=gfx906",
        "--offload-arch=gfx90a",
    ]
    commands = [
        [str(HIPCC), *flags, "-c", "-x", "hip", str(s), "-o", str(tmp_path / f"{s.stem}.o")]
        for s in SOURCES
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, commands))
    for source in SOURCES:
        built = (tmp_path / f"{source.stem}.o").read_bytes()
        for arch in (b"gfx906", b"gfx90a"):
            assert (arch in built) is (source.stem not in NVIDIA_ONLY)
    objects = [tmp_path / f"{s.stem}.o" for s in SOURCES]
    target = str(tmp_path / "kernels.so")
    run([str(HIPCC), "-shared", *map(str, objects), "-o", target, "-Wl,-z,defs"])
    if not shutil.which("llvm-objdump"):
        pytest.skip("compiles and links; no llvm-objdump to look at the code (Debian: llvm)")
    objects = [o for o in objects if o.stem not in NVIDIA_ONLY]
    look([k for o in objects for k in machine_code.hip_kernels(o)], "gfx906", "gfx90a")
