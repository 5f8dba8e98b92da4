"""Finds out whether torch's fused attention runs here: the torch that comes with Hygon's DTK leaves
it to a package that may not be installed."""

from __future__ import annotations

import functools

import torch
from torch.nn.attention import sdpa_kernel

from glm_core.backends.cuda.attention import FUSED

MISSING = "no matching libraries found for"
"""what the error of that torch says, in any case: `No matching libraries found for
flash_attn_2_cuda*.so`"""


@functools.cache
def trouble(device: torch.device, dtype: torch.dtype) -> str:
    """Returns why torch's fused attention cannot run, or ''. One small call is tried per device and
    dtype. Any other error is left to the real call, which reports it as the device's own."""
    q = torch.zeros(1, 1, 16, 64, device=device, dtype=dtype)  # [B, H, L, E]
    try:
        with sdpa_kernel(FUSED):
            torch.nn.functional.scaled_dot_product_attention(q, q, q)
    except RuntimeError as error:
        if MISSING in str(error).lower():
            return (
                "torch's fused attention needs Hygon's flash_attn, which is not installed "
                "(no flash_attn_2_cuda*.so); install the flash_attn wheel of this DTK"
            )
    return ""
