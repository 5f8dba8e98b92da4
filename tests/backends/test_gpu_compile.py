"""Tests that the GPU sources compile and link for one chip of each maker, and that the machine code
holds nothing that machine_code.py finds fault with. The result is not run. `python gpu_build.py`
looks at the other chips."""

from __future__ import annotations

import shutil
from pathlib import Path

import gpu_build
import machine_code
import pytest


@pytest.mark.long
@pytest.mark.skipif(gpu_build.NVCC is None, reason="no nvcc (CUDA toolkit)")
def test_cuda_compiles_links_and_machine_code_is_clean(tmp_path: Path) -> None:
    objects = gpu_build.cuda(tmp_path, ("90",))
    if not machine_code.nvidia_tool("cuobjdump"):
        pytest.skip("compiles and links; no cuobjdump to look at the code (pip install triton)")
    gpu_build.look([k for o in objects for k in machine_code.cuda_kernels(o)], "sm_90")


@pytest.mark.long
@pytest.mark.skipif(gpu_build.HIPCC is None, reason="no hipcc (Debian: hipcc rocm-device-libs lld)")
def test_hip_compiles_links_and_machine_code_is_clean(tmp_path: Path) -> None:
    objects = gpu_build.hip(tmp_path, ("gfx90a",))
    if not shutil.which("llvm-objdump"):
        pytest.skip("compiles and links; no llvm-objdump to look at the code (Debian: llvm)")
    gpu_build.look([k for o in objects for k in machine_code.hip_kernels(o)], "gfx90a")
