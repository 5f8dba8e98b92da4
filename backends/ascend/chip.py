"""Tells which Ascend chip this is, what it lacks and its published peaks."""

from __future__ import annotations

import functools
import re

import torch

from glm_core.backends.base import Peak


@functools.cache
def name() -> str:
    """Returns CANN's name of the first device's chip: Ascend910A, Ascend910B3, Ascend910_9391,
    ..."""
    return str(torch.get_device_module("npu").get_device_name(0))


def is_first_generation() -> bool:
    """Returns whether the chip is the Ascend 910 of 2019 ("Atlas training series"), which lacks
    bfloat16 and most fused operators. Its last variant is called Ascend910B; the later Ascend910B1
    to B4 are another chip ("Atlas A2 training series")."""
    return bool(re.fullmatch(r"Ascend910(A|B|ProA|ProB|PremiumA)?", name()))


_A2 = (
    "Ascend/msmodeling tensor_cast/device.py, profile ATLAS_800_A2_{}T_64G; that {} is the chip of "
    "that profile follows from its 24 or 20 cores and clock, not from a statement"
)
_910A = (
    "Huawei, 23 August 2019; the bandwidth is derived: four HBM2 stacks (Linley Newsletter, "
    "8 October 2019) of 1024 pins at 2.4 Gbit/s"
)
_FLOAT32, _BFLOAT16, _FLOAT16 = torch.float32, torch.bfloat16, torch.float16
_TFLOPS: dict[str, tuple[dict[torch.dtype, float], float, str]] = {
    "Ascend910A": ({_FLOAT16: 256.0}, 1229.0, _910A),
    "Ascend910B2": (
        {_FLOAT32: 99.5, _BFLOAT16: 353.9, _FLOAT16: 376.0},
        1759.0,
        _A2.format(376, "910B2"),
    ),
    "Ascend910B3": (
        {_FLOAT32: 83.0, _BFLOAT16: 294.9, _FLOAT16: 313.0},
        1759.0,
        _A2.format(313, "910B3"),
    ),
    "Ascend910B4": (
        {_FLOAT32: 75.0, _BFLOAT16: 245.8, _FLOAT16: 280.0},
        1759.0,
        _A2.format(280, "910B4"),
    ),
}


def peak(dtype: torch.dtype) -> Peak | None:
    """Returns this chip's published matrix TFLOPS and memory GB/s, None where no public figure is
    known (Ascend910B1, Ascend910C)."""
    tflops, gb_s, source = _TFLOPS.get(name(), ({}, 0.0, ""))
    return Peak(tflops[dtype], gb_s, source) if dtype in tflops else None
