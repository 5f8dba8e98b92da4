"""Tests that exact runs have the same bits on backend `cpu` and in the GPU kernels, whose sources
are executed on the CPU, one fiber per thread; and that nvcc and hipcc make no other arithmetic of
them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import fibers_build
import gpu_build
import pytest
import torch

from glm_core import ops
from glm_core.backends import registry
from glm_core.backends.base import Backend
from glm_core.backends.cuda.kernels import exact_kernels, share
from glm_core.backends.cuda.supports import EXACT, EXACT_DTYPES
from glm_core.backends.registry import probe
from glm_core.config import RunConfig, TrainConfig
from glm_core.conformance.case import dtype_name
from glm_core.errors import ConfigError, UnsupportedOpError
from glm_core.model.presets import preset
from glm_core.training.parallel import SingleProcess, require_exact

built = pytest.mark.skipif(not probe("cpu").ok, reason=probe("cpu").reason)


@built
@pytest.mark.long
@pytest.mark.skipif(
    shutil.which(fibers_build.COMPILER) is None, reason=f"no compiler {fibers_build.COMPILER}"
)
def test_the_same_bits_as_the_cpu() -> None:
    """Every op with exact kernels, forward and backward, and a step of training."""
    script = Path(__file__).with_name("exact_judge.py")
    words = (str(fibers_build.library()), "64", "1", "tiny-moe:bfloat16")
    done = subprocess.run(
        [sys.executable, str(script), *words],
        env=fibers_build.instrumented(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answer: dict[str, Any] = json.loads(done.stdout)
    assert not {id: what for id, what in answer["found"].items() if what}
    assert not {name: what for name, what in answer["models"].items() if what}
    assert {tuple(id.split("-")[:2]) for id in answer["found"]} == {
        (op, dtype_name(dtype)) for op in EXACT for dtype in EXACT_DTYPES
    }
    # the other arithmetic must differ, or nothing above could fail
    assert answer["fast"]["swiglu"]
    assert answer["fast"]["rms_norm"]


OTHER_ARITHMETIC = re.compile(
    r"\b(fma\.rn\.f(?:32|64)|mad\.\w*\.f\d+|\w+\.approx\S*|\w+\.full\S*|\w+\.\S*ftz\S*)"
)
FAST = ("alone", "gated", "row_losses")
"""kernels of fast runs that call CUDA's expf, erfcf and logf"""


@pytest.mark.long
@pytest.mark.skipif(gpu_build.NVCC is None, reason="no nvcc (CUDA toolkit)")
def test_nvcc_multiplies_and_adds_at_once_only_where_it_is_written(tmp_path: Path) -> None:
    """Our fmaf is replaced by one that rounds towards zero: no other fma may be left, nothing
    approximate and nothing that flushes denormals, but in the fast kernels."""
    odd, target = tmp_path / "odd.h", tmp_path / "together.ptx"
    odd.write_text("#include <cuda_fp16.h>\n#include <cuda_runtime.h>\n#define fmaf __fmaf_rz\n")
    flags = [f for f in gpu_build.CUDA_FLAGS if f != "-Xptxas=-v"]
    command = [str(gpu_build.NVCC), *flags, "-arch=compute_90", "-include", str(odd), "-ptx"]
    gpu_build.run([*command, str(gpu_build.sources(tmp_path)[0]), "-o", str(target)])
    written, found = 0, set()
    for kernel in target.read_text().split(".entry ")[1:]:
        written += kernel.count("fma.rz.f32")
        if OTHER_ARITHMETIC.search(kernel):
            name = kernel.partition("(")[0]
            found.add(next((f for f in FAST if f in name and "exact" not in name), name))
    assert found == set(FAST)
    assert written > 1000


ODD_FMA = """\
#include <hip/hip_runtime.h>
extern "C" __device__ __attribute__((const)) float odd_fma(float, float, float);
#define fmaf odd_fma
"""
LOOSE = re.compile(
    r"(?:= f\w+|call) (?:fast|nnan|ninf|nsz|arcp|contract|afn|reassoc)\b|fmuladd|!fpmath"
    r"|llvm\.(?:exp|log|sin|cos|pow|amdgcn\.(?:rcp|rsq\.f32|exp|log|fdiv|sqrt))\w*"
)
ROOTS = {"fma.f32": ("llvm.sqrt.f32", 2), "fma.f64": ("amdgcn.rsq.f64", 7)}
"""the fused multiply-adds of a root: the intrinsic it begins with, and how many there are"""


@pytest.mark.long
@pytest.mark.skipif(gpu_build.HIPCC is None, reason="no hipcc (Debian: hipcc)")
def test_hipcc_multiplies_and_adds_at_once_only_where_it_is_written(tmp_path: Path) -> None:
    """Our fmaf is replaced by a call: in LLVM's form of the kernels the fused multiply-adds of
    square roots are left alone. Divisions are rounded correctly, and denormals are kept."""
    odd, target = tmp_path / "odd.h", tmp_path / "together.ll"
    odd.write_text(ODD_FMA)
    flags = [f for f in gpu_build.HIP_FLAGS if f not in ("-Xarch_host", "-O0")]
    command = [str(gpu_build.HIPCC), "-w", *flags, "--offload-arch=gfx90a", "--cuda-device-only"]
    command += ["-emit-llvm", "-S", "-include", str(odd), str(gpu_build.sources(tmp_path)[0])]
    gpu_build.run([*command, "-o", str(target)])
    text = target.read_text()
    assert "denormal-fp-math" not in text
    written, found = 0, set()
    for kernel in text.split("amdgpu_kernel void @")[1:]:
        name, body = kernel.partition("(")[0], kernel.partition("\n}\n")[0]
        written += body.count("@odd_fma(")
        counts = [(body.count(f), most * body.count(r)) for f, (r, most) in ROOTS.items()]
        if LOOSE.search(body) or any(fused != allowed for fused, allowed in counts):
            found.add(next((f for f in FAST if f in name and "exact" not in name), name))
    assert found <= set(FAST)
    assert written > 1000


def test_refused_by_name_before_the_run() -> None:
    backend = Backend(name="elsewhere", device_type="meta", verified="shapes only")
    backend.exact = exact_kernels(backend)._replace(switch=registry.nullcontext)
    share(backend)
    train = TrainConfig(exact=True, dtype="float16")
    which = "elsewhere sums exactly in float32, bfloat16, not in float16"
    with pytest.raises(ConfigError, match=which):
        SingleProcess(RunConfig(model=preset("tiny"), train=train), backend)
    balanced = preset("tiny-moe", balance_weight=1e-4)
    lack = "has no exact kernel of balance_weight; use backend cpu"
    with pytest.raises(ConfigError, match=lack):
        SingleProcess(RunConfig(model=balanced, train=TrainConfig(exact=True)), backend)
    dense = RunConfig(model=preset("tiny"), train=TrainConfig(exact=True))
    with pytest.raises(ConfigError, match="in one process alone"):
        require_exact(dense, backend, plan=True)
    x = torch.empty(4, 8, device="meta")
    codes = x.to(torch.int8), x[:, :1].half()
    with (
        registry.use(backend, exact=True),
        pytest.raises(UnsupportedOpError, match=r"quantized_linear.*no exact kernel of it"),
    ):
        ops.quantized_linear(x, *codes)
