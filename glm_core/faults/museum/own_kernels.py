"""Declares the wrong kernels that only the museum has, and finds a fault by its name here or in
the catalogue."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from glm_core import ops
from glm_core.dispatch import Op
from glm_core.faults.catalogue import every_mutant
from glm_core.faults.fault import FAULTS, Fault
from glm_core.faults.kernels import (
    Arguments,
    Function,
    backward_only,
    changed,
    pulled_argument,
    vjp,
    with_gradients,
)
from glm_core.faults.optim import adam
from glm_core.faults.rounding import bf16
from glm_core.ops.layout import FAR
from glm_core.ops.precision import wide

F = torch.nn.functional


# mistakes that are not among the catalogue's --------------------------------------------


def tables_of_first_call() -> Function:
    """Returns a rotation that keeps the tables of the first call of each length."""
    kept: dict[int, tuple[Tensor, Tensor]] = {}

    def kernel(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        first = kept.setdefault(x.shape[1], (cos.clone(), sin.clone()))
        fits = first[0].shape == cos.shape
        return ops.rope.reference(x, *(first if fits else (cos, sin)), interleaved)

    return kernel


def inner_tail_lost(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Sums whole blocks of 16 products, where there is more than one."""
    whole = x.shape[-1] // 16 * 16 or x.shape[-1]
    return ops.linear.reference(x[..., :whole], weight[:, :whole], bias)


def offset_wraps(x: Tensor) -> Tensor:
    """Reads zeros where an offset would be past 2^31."""
    largest = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return x if largest < FAR else torch.zeros_like(x)


def flushed(x: Tensor) -> Tensor:
    """Makes subnormal numbers of float16 zero; other dtypes stay as they are."""
    return torch.where(x.abs() < torch.finfo(x.dtype).tiny, 0.0, x) if x.dtype.itemsize == 2 else x


def flushing_backward(a: Arguments, outputs: tuple[Tensor, ...]) -> dict[str, Tensor | None]:
    right = vjp(ops.linear, ops.linear.reference)
    small = {n: flushed(a[n]) for n in ("x", "weight")}
    return right(a | small, (flushed(outputs[0]),))


def larger_after_first(a: Arguments, g: Tensor) -> Tensor:
    """Multiplies the gradient by five, but for the first sequence."""
    return torch.cat((g[:1], 5 * g[1:]))


def ignored_tokens_smoothed(
    x: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor
) -> Tensor:
    """Smooths labels by 0.001 for tokens that do not count, and for those only."""
    uniform = -wide(F.linear(x, weight)).log_softmax(-1).mean(-1)
    extra = 1e-3 * (uniform * (token_weight == 0)).sum() * token_weight.sum() / len(x)
    right: Tensor = ops.linear_cross_entropy.reference(x, weight, labels, token_weight)
    return right + extra


def low_statistics(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Rounds mean and 1 / deviation to bfloat16."""
    t = wide(x)
    mean = bf16(t.mean(-1, keepdim=True))
    rstd = bf16(torch.rsqrt((t - mean).square().mean(-1, keepdim=True) + eps))
    return ((t - mean) * rstd * wide(weight) + wide(bias)).to(x.dtype)


def low_weight_gradient(a: Arguments, outputs: tuple[Tensor, ...]) -> dict[str, Tensor | None]:
    """Adds up an RMS norm's gradient of the weight row by row in bfloat16."""
    right = vjp(ops.rms_norm, ops.rms_norm.reference)(a, outputs)
    t = wide(a["x"]).flatten(0, -2)
    terms = t * torch.rsqrt(t.square().mean(-1, keepdim=True) + a["eps"])
    terms = (terms * wide(outputs[0]).flatten(0, -2)).bfloat16()
    total = torch.zeros(t.shape[-1], dtype=torch.bfloat16)
    for row in terms:
        total = total + row
    return right | {"weight": total.to(a["weight"].dtype)}


def own(op: Op, name: str, description: str, make: Any) -> Fault:
    """Returns a fault that only the museum has."""
    return Fault(op.name, description, lambda: {op.name: make()}, mutant=name)


OWN = [
    own(
        ops.attention,
        "scale_left_out",
        "scores are not scaled",
        lambda: changed(ops.attention, scale=1.0),
    ),
    own(
        ops.attention,
        "scale_of_the_width",
        "the scale is that of all heads together",
        lambda: changed(ops.attention, scale=lambda a: a["scale"] * a["q"].shape[2] ** -0.5),
    ),
    own(
        ops.attention,
        "gradient_of_q_in_a_batch",
        "the gradient of q is five times too large from the second sequence on",
        lambda: pulled_argument(ops.attention, "q", larger_after_first),
    ),
    own(ops.rope, "tables_by_length", "tables are kept by length alone", tables_of_first_call),
    own(ops.linear, "inner_tail_lost", "sums whole blocks of 16", lambda: inner_tail_lost),
    own(
        ops.linear,
        "offsets_in_32_bits",
        "offsets are 32 bits wide",
        lambda: changed(ops.linear, x=lambda a: offset_wraps(a["x"])),
    ),
    own(
        ops.linear,
        "subnormals_flushed",
        "the backward flushes float16's subnormal numbers",
        lambda: with_gradients(ops.linear, flushing_backward),
    ),
    own(
        ops.linear_cross_entropy,
        "ignored_tokens_smoothed",
        "label smoothing counts ignored tokens",
        lambda: ignored_tokens_smoothed,
    ),
    own(
        ops.layer_norm,
        "low_statistics",
        "the backward rounds mean and deviation to bfloat16",
        lambda: backward_only(ops.layer_norm, low_statistics),
    ),
    own(
        ops.rms_norm,
        "low_weight_gradient",
        "the gradient of the weight is summed in bfloat16",
        lambda: with_gradients(ops.rms_norm, low_weight_gradient),
    ),
    own(
        ops.adamw,
        "eps_uncorrected",
        "eps is added before the bias correction",
        lambda: adam(
            denominator=lambda v, correction, a: (v.sqrt() + a["eps"]) / correction**0.5,
        ),
    ),
    own(
        ops.adamw,
        "uncorrected",
        "no bias correction",
        lambda: changed(ops.adamw, step=10**6),
    ),
    own(
        ops.adamw,
        "step_per_tensor",
        "every tensor of a step counts as a step",
        lambda: changed(ops.adamw, step=lambda a: a["step"] * max(len(a["params"]), 1)),
    ),
]


def fault_named(name: str) -> Fault:
    """Returns the fault with this name or id, of the catalogue or of the museum alone."""
    return _faults()[name]


@functools.cache
def _faults() -> dict[str, Fault]:
    return {f.id: f for f in every_mutant()} | {f.name: f for f in (*FAULTS, *OWN)}
