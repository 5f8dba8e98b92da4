"""Lists published peak figures by device name: dense tensor-core rates for half precision, float32
without TF32, and memory bandwidth.

The figures come from the data sheets named. In November 2026 those of H100, H200, A100, V100,
MI300X, MI250X and MI50 were compared with public tables and were equal; RTX 4090, MI210 and MI60
were not compared."""

from __future__ import annotations

from typing import NamedTuple

import torch

from glm_core.backends.base import Peak


class Chip(NamedTuple):
    """A chip's TFLOPS by dtype (bfloat16 None where it has none), GB/s, and the data sheet."""

    float16: float
    bfloat16: float | None
    float32: float
    gb_s: float
    source: str


CHIPS = {
    "H200": Chip(989.4, 989.4, 66.9, 4800, "NVIDIA H200 data sheet (SXM), dense"),
    "H100 PCIe": Chip(756.4, 756.4, 51.2, 2039, "NVIDIA H100 architecture paper (PCIe), dense"),
    "H100": Chip(989.4, 989.4, 66.9, 3352, "NVIDIA H100 architecture paper (SXM5), dense"),
    "A100-SXM4-40GB": Chip(312, 312, 19.5, 1555, "NVIDIA A100 architecture paper (40 GB), dense"),
    "A100-PCIE-40GB": Chip(312, 312, 19.5, 1555, "NVIDIA A100 architecture paper (40 GB), dense"),
    "A100 80GB PCIe": Chip(312, 312, 19.5, 1935, "NVIDIA A100 data sheet (80 GB PCIe), dense"),
    "A100": Chip(312, 312, 19.5, 2039, "NVIDIA A100 data sheet (80 GB SXM), dense"),
    "RTX 4090": Chip(165.2, 165.2, 82.6, 1008, "NVIDIA Ada architecture paper, float32 sums"),
    "V100-PCIE": Chip(112, None, 14.0, 900, "NVIDIA V100 data sheet (PCIe)"),
    "V100": Chip(125, None, 15.7, 900, "NVIDIA V100 data sheet (SXM2)"),
    "MI300X": Chip(1307.4, 1307.4, 163.4, 5300, "AMD Instinct MI300X data sheet, dense"),
    "MI250X": Chip(191.5, 191.5, 23.95, 1638, "AMD Instinct MI250X data sheet, one of two dies"),
    "MI210": Chip(181, 181, 22.6, 1638, "AMD Instinct MI210 data sheet"),
    "MI60": Chip(29.5, None, 14.7, 1024, "AMD Radeon Instinct MI60 data sheet"),
    "MI50": Chip(26.5, None, 13.3, 1024, "AMD Radeon Instinct MI50 data sheet"),
}
"""keys are parts of the name that the runtime reports; the first that occurs in it counts"""


def peak(name: str, dtype: torch.dtype) -> Peak | None:
    """Returns the peak of a device, None where it is not listed or does not compute in the
    dtype."""
    chip = next((chip for part, chip in CHIPS.items() if part.lower() in name.lower()), None)
    tflops = getattr(chip, str(dtype).removeprefix("torch."), None)
    return None if chip is None or tflops is None else Peak(tflops, chip.gb_s, chip.source)
