"""Declares the backend for AMD GPUs and Hygon DCUs. It uses the CUDA sources compiled by hipcc,
attention and layers of experts in Triton, and RCCL for collectives (torch calls it nccl). torch
presents HIP devices as `cuda`.

Verified: the kernels compile for gfx906, gfx908 and gfx90a, each was executed on the CPU with waves
of 64, training steps were dry-run, and recorded decode steps simulated. We never ran it on
hardware, nor compiled it for Hygon's gfx926, gfx928, gfx936 and gfx938, which DTK's compiler alone
knows.

gfx900 and gfx906 have no bfloat16 instructions: train in float16 with a loss scale. A Hygon DCU
needs the torch that comes with its DTK: stock ROCm's libamdhip64 does not work with Hygon's kernel
driver, and DTK 26.04 still has HIP's fifth ABI (seen on a K500SM_AI, gfx928:
github.com/AlphaMine-Tech/alpha-miner, issue 18)."""

from __future__ import annotations

import torch

from glm_core.backends.cuda import probe
from glm_core.backends.cuda.device import GpuBackend
from glm_core.backends.cuda.kernels import equip

WITHOUT_BFLOAT16 = ("gfx900", "gfx906")
DTYPES = (torch.float32, torch.float16)


def dtypes(architecture: str) -> tuple[torch.dtype, ...]:
    """Returns the dtypes that the chip computes in; no name means any chip."""
    return DTYPES if architecture in WITHOUT_BFLOAT16 else (*DTYPES, torch.bfloat16)


def _here() -> tuple[torch.dtype, ...]:
    usable = torch.version.hip is not None and torch.cuda.is_available()
    return dtypes(probe.architecture() if usable else "")


backend = GpuBackend(
    name="rocm",
    device_type="cuda",
    collective="nccl",
    deterministic=False,
    dtypes=_here(),
    verified="compiled, kernels executed on the CPU, dry-run; never run on hardware",
    probe=lambda: probe.rocm(probe.facts()),
)
equip(backend, "glm_core.backends.rocm._C")
