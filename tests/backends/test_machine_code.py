"""Tests that machine_code.py finds what it is there to find: in lines of disassemblies, and in
kernels compiled from planted bugs."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path

import machine_code
import pytest

MISCOMPILED = """\
\tcode for sm_90
\t\tFunction : void glm::gpu::(anonymous namespace)::sum_columns<glm::f16>(glm::SumChunks<glm::f16>)
        /*0310*/                   F2I.U8.F16.TRUNC.NTZ R5, R0 ;  /* 0x0000000000057305 */
  /* 0x000e22000020d000 */
        /*0330*/              @!P0 STG.E.U8 desc[UR4][R2.64], R5 ;  /* 0x0000000502007986 */
"""
HALVES = """\
0000000000001000 <void glm::gpu::(anonymous namespace)::turn_rows<true, glm::f16, 4>(glm::Rope)>:
\tglobal_store_byte v[0:1], v2, off          // 000000001000: DC608000 00000200
\ts_endpgm                                   // 000000001008: BF810000
0000000000002000 <__ockl_hostcall_internal>:
\tbuffer_store_dword v0, off, s[0:3], s32    // 000000002000: E0700000 20000000
"""
PLANTED_CUDA = """\
#include <cuda_fp16.h>
#include <cstring>
struct f16 { unsigned short bits; };
__global__ void one_column(const float* x, f16* y) {
  const __half h = __float2half_rn(x[threadIdx.x]);
  memcpy(y + threadIdx.x, &h, sizeof h);
}
"""
PLANTED_HIP = """\
#include <hip/hip_runtime.h>
__global__ void one_column(const float* x, char* y) { y[threadIdx.x] = char(x[threadIdx.x]); }
"""


def of(name: str, *mnemonics: str) -> list[str]:
    """Returns the faults of one kernel with these instructions."""
    return machine_code.faults([machine_code.Kernel("chip", name, mnemonics)])


def test_finds_what_a_disassembly_holds() -> None:
    kernel, *others = machine_code.from_sass(MISCOMPILED)
    assert not others
    assert machine_code.faults([kernel]) == [
        "sm_90 sum_columns<f16>: converts a half to a byte: 1 x F2I.U8.F16.TRUNC.NTZ",
        "sm_90 sum_columns<f16>: stores a byte: 1 x STG.E.U8",
    ]
    kernel, *others = machine_code.from_amdgpu("gfx90a", HALVES)
    assert not others
    assert machine_code.faults([kernel]) == [
        "gfx90a turn_rows<true, f16, 4>: stores a byte: 1 x global_store_byte"
    ]


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        ("update<f16>", "ST.E.U8", "STG.E.U16"),
        ("update<f16>", "STL.64", "STG.E.64"),
        ("update<f16>", "LDL", "LDS.U8"),
        ("update<f16>", "F2I.U8.F16.TRUNC.NTZ", "F2I.FTZ.U32.TRUNC.NTZ"),
        ("update<f16>", "scratch_load_dword", "global_load_ushort"),
        ("update<f16>", "flat_store_byte", "flat_load_ubyte"),
        ("update<f16>", "global_store_byte_d16_hi", "global_store_short_d16_hi"),
        ("forward_rows<f16, 8>", "LDG.E.U16", "LDG.E.128"),
        ("forward_rows<bf16, 8>", "STG.E.U16", "STG.E"),
        ("forward_rows<f16, 8>", "global_load_short_d16_hi", "global_load_dwordx4"),
        ("as_values<f16, 4, 8>", "LDG.E.U8.CONSTANT", "LDG.E.U16.CONSTANT"),
        ("row_losses<f16, 8>", "STG.E.U8", "global_load_ubyte"),
    ],
)
def test_tells_a_bad_instruction_from_a_good_one(name: str, bad: str, good: str) -> None:
    assert len(of(name, bad, good, "EXIT")) == 1
    assert bad in of(name, bad, good)[0]


def test_exceptions_hold_for_named_kernels_only() -> None:
    assert not of("as_values<f16, 4, 2>", "LDG.E.U8", "LDG.E.U16", "STG.E.U16")
    assert not of("row_losses<f16, 8>", "STL.64", "LDG.E.U16")
    assert of("forward_rows<f16, 8>", "STL.64")
    assert of("other_rows<f16, 8>", "LDG.E.U16")


def test_few_rows_load_sixteen_bytes() -> None:
    name = "few_rows<bf16, bf16, 4, 1, 32>"
    for wide in ("LDG.E.128", "LDG.E.EF.128.CONSTANT", "global_load_dwordx4"):
        assert not of(name, wide, "LDG.E.U16")
    for narrow in ("LDG.E.64", "LDS.128", "global_load_dwordx2"):
        assert of(name, narrow) == [f"chip {name}: loads no 16 bytes at a time"]


def test_takes_a_bundle_apart() -> None:
    names = [b"host-x86_64-unknown-linux", b"hipv4-amdgcn-amd-amdhsa--gfx90a"]
    head = machine_code.BUNDLE + struct.pack("<Q", 2)
    sizes = [(0, 0), (4096, 3)]
    for name, (offset, size) in zip(names, sizes, strict=True):
        head += struct.pack("<QQQ", offset, size, len(name)) + name
    built = b"before" + head.ljust(4096, b"\0") + b"ELF" + b"after"
    assert list(machine_code.hip_parts(built)) == [("gfx90a", b"ELF")]


def planted(folder: Path, compiler: str, source: str, *flags: str) -> Path:
    """Returns the object file that a compiler makes of a source."""
    path, target = folder / "planted.cu", folder / "planted.o"
    path.write_text(source)
    command = [compiler, "-std=c++17", "-O3", "-c", *flags, str(path), "-o", str(target)]
    subprocess.run(command, check=True, env=os.environ | {"HIP_PLATFORM": "amd"})
    return target


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc (CUDA toolkit)")
@pytest.mark.skipif(not machine_code.nvidia_tool("cuobjdump"), reason="pip install triton")
def test_finds_the_stores_that_nvcc_made_of_a_copied_half(tmp_path: Path) -> None:
    built = planted(tmp_path, "nvcc", PLANTED_CUDA, "-arch=sm_90")
    (kernel,) = machine_code.cuda_kernels(built)
    found = machine_code.faults([kernel])
    if not found and "STG.E.U16" in kernel.mnemonics:
        pytest.skip("this nvcc compiles the copy of a half as it should")
    assert kernel.name == "one_column"
    assert any("converts a half to a byte" in line for line in found)
    assert any("stores a byte" in line for line in found)


@pytest.mark.skipif(not shutil.which("hipcc"), reason="no hipcc (Debian: hipcc)")
@pytest.mark.skipif(not shutil.which("llvm-objdump"), reason="no llvm-objdump (Debian: llvm)")
def test_finds_a_byte_that_hip_stores(tmp_path: Path) -> None:
    built = planted(tmp_path, "hipcc", PLANTED_HIP, "--offload-arch=gfx90a", "-x", "hip")
    (kernel,) = machine_code.hip_kernels(built)
    (found,) = machine_code.faults([kernel])
    assert found.startswith("gfx90a one_column: stores a byte")
