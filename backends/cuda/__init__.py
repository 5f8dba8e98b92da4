"""Declares the backend for NVIDIA GPUs. Our CUDA kernels (csrc/cuda) run most ops, our Triton
kernels attention and layers of experts, cuBLAS the products and NCCL the collectives.

Verified: the kernels compile for sm_80 and sm_90, each was executed on the CPU against the float64
reference, and whole training steps were dry-run on fake tensors. It ran once on hardware, an H100
80GB, on 2026-11-28 at commit ad8d9e9. There the cases of conformance passed in float32 and
bfloat16, but for attention of odd head sizes, grouped heads in float32 and the gradient of huge
scores, by torch's kernels. Our Triton kernels of attention and of experts have run in Triton's
interpreter only. Some float16 kernels were miscompiled there. With the cure tried by hand on that
H100, the 67 cases that had failed for it passed. The source is mended now: a test looks at its
machine code for sm_90, a script (tests/backends/gpu_build.py) for sm_80 too. Products of few rows,
products with codes, layers of experts, exact kernels and recorded decode steps are newer than that
run, the steps simulated on the CPU. This build has not run on hardware again. The backend does not
claim to be deterministic: no GPU has repeated the attention kernels' bits yet."""

from __future__ import annotations

from glm_core.backends.cuda import probe
from glm_core.backends.cuda.device import GpuBackend
from glm_core.backends.cuda.kernels import equip

backend = GpuBackend(
    name="cuda",
    device_type="cuda",
    collective="nccl",
    deterministic=False,
    verified="compiled, kernels executed on the CPU, dry-run; run once on an H100 (2026-11-28, "
    "ad8d9e9): float32 and bfloat16 right but for some attention, float16 wrong; both mended "
    "since and not run again; recorded decode steps, products of few rows, products with codes, "
    "layers of experts and exact kernels never run on a GPU; witness: tests/conformance/witness",
    probe=lambda: probe.cuda(probe.facts()),
)
equip(backend, "glm_core.backends.cuda._C")
