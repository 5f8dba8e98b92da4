"""Declares the backend for NVIDIA GPUs. Our CUDA kernels (csrc/cuda) run most ops, torch's fused
kernels run attention, cuBLAS the products and NCCL the collectives.

Verified: the kernels compile for sm_80 and sm_90, each was executed on the CPU against the float64
reference, and whole training steps were dry-run on fake tensors. We never ran it on hardware. It is
not deterministic: torch's attention sums its gradients with atomics."""

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
