"""Computes an operator's steps as honest kernels do whose errors have a direction: elementary
functions by polynomials, attention with rounded exponentials."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glm_core.align.statistics import EPS
from glm_core.conformance.oracle import EagerMode

aten = torch.ops.aten

ULPS = 2.0
"""units in the last place by which a library's exp, erf, log, tanh or rsqrt may be off: the largest
error that NVIDIA's table of them admits for float32 (CUDA C++ Programming Guide, "Mathematical
Functions"); torch's own on a CPU stay below"""
ERF = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)
"""coefficients of Abramowitz and Stegun 7.1.26, with p = 0.3275911: off by 1.5e-7 at most. Torch's
vectors and oneDNN compute GELU with it"""
FUNCTIONS = {
    aten.exp.default,
    aten.exp2.default,
    aten.expm1.default,
    aten.log.default,
    aten.log1p.default,
    aten.tanh.default,
    aten.sigmoid.default,
    aten.rsqrt.default,
    aten.sin.default,
    aten.cos.default,
}


class LibraryFunctions(EagerMode):
    """Computes elementary functions as another library would: erf by a polynomial, the others off
    by ULPS units. The errors of a polynomial have a direction; two functions of one operator lean
    to the same side (`signs` 1) or by turns to opposite sides (-1)."""

    def __init__(self, signs: float) -> None:
        super().__init__()
        self.signs = signs
        self.lean = 1.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is aten.erf.default:
            return polynomial_erf(args[0])
        out = func(*args, **(kwargs or {}))
        if func not in FUNCTIONS:
            return out
        self.lean *= self.signs
        return out * (1 + self.lean * ULPS * EPS)


def polynomial_erf(x: Tensor) -> Tensor:
    """Returns erf by Abramowitz and Stegun 7.1.26."""
    size = x.abs()
    t = 1 / (1 + 0.3275911 * size)
    total = torch.zeros_like(t)
    for coefficient in reversed(ERF):
        total = (total + coefficient) * t
    return torch.copysign(1 - total * torch.exp(-size * size), x)


class RoundedExponentials(EagerMode):
    """Computes the softmax inside attention as kernels do that multiply with `dtype` (Dao et al.
    2022): exponentials below the largest logit so far are rounded for the product with the values,
    and are divided afterwards by the sum of those that were not rounded. Keys come in blocks of
    `block`."""

    def __init__(self, dtype: torch.dtype, block: int) -> None:
        super().__init__()
        self.dtype, self.block = dtype, block

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket is not aten._softmax:
            return func(*args, **(kwargs or {}))
        x = args[0]
        peaks = [part.amax(-1, keepdim=True) for part in x.split(self.block, -1)]
        so_far = torch.cat(peaks, -1).cummax(-1).values.clamp(min=torch.finfo(x.dtype).min)
        peak = so_far.repeat_interleave(self.block, -1)[..., : x.shape[-1]]
        weights = torch.exp(x - peak).to(self.dtype).to(x.dtype) * torch.exp(
            peak - so_far[..., -1:]
        )
        return weights / torch.exp(x - so_far[..., -1:]).sum(-1, keepdim=True)
