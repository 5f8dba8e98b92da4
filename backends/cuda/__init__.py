"""NVIDIA GPUs: our CUDA kernels (csrc/cuda), attention by torch's fused kernels, products by
cuBLAS, collectives by NCCL. Compiled for sm_80 and sm_90, every kernel executed on the CPU against
the float64 reference, whole training steps dry-run on fake tensors; never run on hardware by us.
Not deterministic: torch's attention sums its gradients by atomics."""

from __future__ import annotations

from glm_core.backends.cuda import probe
from glm_core.backends.cuda.device import GpuBackend
from glm_core.backends.cuda.kernels import equip

backend = GpuBackend(
    name="cuda",
    device_type="cuda",
    collective="nccl",
    deterministic=False,
    verified="compiled, kernels executed on the CPU, dry-run; not run on hardware by us",
    probe=lambda: probe.cuda(probe.facts()),
)
equip(backend, "glm_core.backends.cuda._C")
