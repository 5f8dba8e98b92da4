"""Declares the wrong and benign kernels of the optimizer: AdamW and the global gradient norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from glm_core.faults.fault import ONLY_BFLOAT16, benign, fault, mutant
from glm_core.faults.kernels import Arguments, Function, changed
from glm_core.faults.rounding import Edit, bf16, double, precise, truncated
from glm_core.ops import adamw, global_norm
from glm_core.ops.precision import wide

# global_norm, wrong ---------------------------------------------------------------------


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """Returns the norm of each tensor, [number of tensors]."""
    return torch.stack([torch.linalg.vector_norm(wide(t)) for t in tensors] or [torch.zeros(())])


@mutant(global_norm, "the largest entry")
def largest(tensors: Sequence[Tensor]) -> Tensor:
    return max((wide(t).abs().max() for t in tensors if t.numel()), default=torch.zeros(()))


@mutant(global_norm, "squares in the working dtype")
def narrow_squares(tensors: Sequence[Tensor]) -> Tensor:
    total = torch.zeros(())
    for t in tensors:
        total = total + wide(t.square()).sum()
    return total.sqrt()


@mutant(global_norm, "squares summed in float32 one after another")
def sequential_sum(tensors: Sequence[Tensor]) -> Tensor:
    total = torch.zeros(())
    for t in tensors:
        if t.numel():
            squares = wide(t).flatten().square().numpy()
            # numpy's cumsum adds in its dtype, torch's in float64
            total = total + float(squares.cumsum(dtype=squares.dtype)[-1])
    return total.sqrt()


fault(
    global_norm,
    "the square root is left out",
    lambda tensors: global_norm.reference(tensors).square(),
    mutant="squared",
)
fault(
    global_norm,
    "only the first 2^20 elements of a tensor count",
    changed(global_norm, tensors=lambda a: [t.flatten()[: 2**20] for t in a["tensors"]]),
    mutant="counter_overflows",
)
fault(
    global_norm,
    "the last tensor is left out",
    changed(global_norm, tensors=lambda a: [t for t in a["tensors"] if t.numel()][:-1]),
    mutant="last_left_out",
    planted="norm-last-tensor-lost",
    kind="optimizer",
    direction="update",
)
fault(
    global_norm,
    "the sum of the norms",
    lambda tensors: norms(tensors).sum(),
    mutant="sum_of_norms",
    planted="norm-sum-of-norms",
    kind="optimizer",
    direction="update",
)
fault(
    global_norm,
    "the norm of each tensor is rounded to bfloat16",
    lambda tensors: norms(tensors).bfloat16().float().norm(),
    planted="norm-bfloat16",
    kind="dtype",
    direction="update",
)


# adamw --------------------------------------------------------------------------------

Gradient = Callable[[Tensor, Tensor, Arguments], Tensor]
"""(gradient, parameter, arguments) -> gradient"""
Denominator = Callable[[Tensor, float, Arguments], Tensor]
"""(second moment, its bias correction, arguments) -> what the first moment is divided by"""


def adam(
    gradient: Gradient = lambda g, p, a: g,
    squared: Callable[[Tensor, Tensor], Tensor] = lambda g, grad: g,
    denominator: Denominator = lambda v, correction, a: (v / correction).sqrt() + a["eps"],
    keep: Edit = lambda x: x,
    store: Edit = lambda x: x,
    decoupled: bool = True,
    decay_first: bool = True,
    copy_first: bool = False,
    correct_first_moment: bool = True,
) -> Callable[..., None]:
    """Returns AdamW with places for mistakes: `squared(gradient, unclipped gradient)` feeds the
    second moment, `keep` is applied to the stored moments, `store` to the copies."""

    def kernel(**a: Any) -> None:
        b1, b2, step = a["beta1"], a["beta2"], a["step"]
        correction = 1 - b1**step if correct_first_moment else 1.0
        shrink = 1 - a["lr"] * a["weight_decay"] if decoupled else 1.0
        lists = (a[n] for n in ("params", "grads", "exp_avgs", "exp_avg_sqs"))
        for i, (p, grad, m, v) in enumerate(zip(*lists, strict=True)):
            old = p.clone()
            g = gradient(grad.to(p.dtype) * a["grad_scale"].to(p.dtype), p, a)
            h = squared(g, grad.to(p.dtype))
            m.mul_(b1).add_(g, alpha=1 - b1).copy_(keep(m))
            v.mul_(b2).addcmul_(h, h, value=1 - b2).copy_(keep(v))
            d = denominator(v, 1 - b2**step, a)
            if decay_first:
                p.mul_(shrink)
            p.addcdiv_(m / correction, d, value=-a["lr"])
            if not decay_first:
                p.mul_(shrink)
            if a["copies"] is not None:
                a["copies"][i].copy_(old if copy_first else store(p))

    return kernel


def wrong_adamw(description: str, kernel: Function, **rest: Any) -> None:
    """Declares a fault of the update; the other arguments are Fault's fields."""
    fault(adamw, description, kernel, **{"kind": "optimizer", "direction": "update"} | rest)


@mutant(adamw, "elements past the last whole vector of 8 are not updated")
def tail_skipped(**a: Any) -> None:
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs")
    if a["copies"] or not all(t.is_contiguous() for n in names for t in a[n]):
        adamw.reference(**a)
    else:
        whole = {n: [t.reshape(-1)[: t.numel() // 8 * 8] for t in a[n]] for n in names}
        adamw.reference(**a | whole)


wrong_adamw(
    "eps is added under the root",
    adam(denominator=lambda v, correction, a: (v / correction + a["eps"]).sqrt()),
    mutant="eps_inside_root",
    planted="adamw-eps-inside-root",
    kind="eps",
)
wrong_adamw(
    "weight decay goes through the moments, as in Adam",
    adam(gradient=lambda g, p, a: g + a["weight_decay"] * p, decoupled=False),
    mutant="decay_coupled",
    planted="adamw-coupled-decay",
)
wrong_adamw(
    "weight decay after the update, not before it",
    adam(decay_first=False),
    mutant="decay_late",
    planted="adamw-decay-after-update",
)
wrong_adamw(
    "norms and biases decay too",
    changed(adamw, weight_decay=lambda a: a["weight_decay"] or 0.1),
    planted="adamw-vectors-decay",
)
wrong_adamw("no weight decay", changed(adamw, weight_decay=0.0), mutant="decay_left_out")
wrong_adamw(
    "no bias correction of the first moment",
    adam(correct_first_moment=False),
    mutant="first_moment_uncorrected",
)
wrong_adamw(
    "no bias correction of the second moment",
    adam(denominator=lambda v, correction, a: v.sqrt() + a["eps"]),
    mutant="second_moment_uncorrected",
    planted="adamw-v-uncorrected",
)
wrong_adamw(
    "the second moment sees the unclipped gradient",
    adam(squared=lambda g, grad: grad),
    mutant="square_unscaled",
)
wrong_adamw(
    "the gradient is not clipped",
    changed(adamw, grad_scale=lambda a: torch.ones_like(a["grad_scale"])),
    mutant="grad_scale_ignored",
    planted="adamw-no-clip",
)
wrong_adamw(
    "moments are stored in bfloat16",
    adam(keep=bf16),
    mutant="moments_bfloat16",
    planted="adamw-bfloat16-moments",
    kind="dtype",
)
wrong_adamw(
    "the low-precision copies are not written",
    changed(adamw, copies=None),
    mutant="copies_unwritten",
)
wrong_adamw(
    "the copies receive the parameters before the update",
    adam(copy_first=True),
    mutant="copies_old",
    planted="adamw-copies-stale",
    kind="stale",
    **ONLY_BFLOAT16,
)
wrong_adamw(
    "the copies are cut to bfloat16",
    adam(store=truncated),
    planted="adamw-copies-truncated",
    kind="rounding",
    **ONLY_BFLOAT16,
)
wrong_adamw("beta1 is 0.9 whatever was asked", changed(adamw, beta1=0.9), mutant="beta1_fixed")
wrong_adamw(
    "beta2 is 0.999 whatever was asked",
    changed(adamw, beta2=0.999),
    mutant="beta2_fixed",
    planted="adamw-beta2-0.999",
)
wrong_adamw("beta2 is 0.9999", changed(adamw, beta2=0.9999), mutant="beta2_large")
wrong_adamw("eps is 1e-8 whatever was asked", changed(adamw, eps=1e-8), mutant="eps_fixed")
wrong_adamw(
    "eps is 1e-6",
    changed(adamw, eps=1e-6),
    mutant="eps_large",
    planted="adamw-eps-1e-6",
    kind="eps",
)
wrong_adamw(
    "the step counts from 0",
    changed(adamw, step=lambda a: max(a["step"] - 1, 1)),
    mutant="step_from_zero",
)
wrong_adamw(
    "bias correction is one step late",
    changed(adamw, step=lambda a: a["step"] + 1),
    planted="adamw-step-off-by-one",
)


# benign -------------------------------------------------------------------------------


def flat_norm(tensors: Sequence[Tensor]) -> Tensor:
    flat = [wide(t).flatten() for t in tensors] or [torch.zeros(0)]
    return torch.cat(flat).square().sum().sqrt()


def reversed_norm(tensors: Sequence[Tensor]) -> Tensor:
    total = torch.zeros(())
    for t in reversed(tensors):
        total = total + wide(t).square().sum()
    return total.sqrt()


def foreach_adamw(**a: Any) -> None:
    """Does the arithmetic of torch.optim.AdamW's foreach path: corrections folded into step size
    and root."""
    ps, gs, ms, vs = (list(a[n]) for n in ("params", "grads", "exp_avgs", "exp_avg_sqs"))
    if not ps:
        return  # torch's foreach functions refuse empty lists
    grads = [g.to(p.dtype) * a["grad_scale"] for p, g in zip(ps, gs, strict=True)]
    torch._foreach_mul_(ps, 1 - a["lr"] * a["weight_decay"])
    torch._foreach_lerp_(ms, grads, 1 - a["beta1"])
    torch._foreach_mul_(vs, a["beta2"])
    torch._foreach_addcmul_(vs, grads, grads, 1 - a["beta2"])
    roots = list(torch._foreach_sqrt(vs))
    torch._foreach_div_(roots, math.sqrt(1 - a["beta2"] ** a["step"]))
    torch._foreach_add_(roots, a["eps"])
    torch._foreach_addcdiv_(ps, ms, roots, -a["lr"] / (1 - a["beta1"] ** a["step"]))
    for copy, p in zip(a["copies"] or (), ps, strict=bool(a["copies"])):
        copy.copy_(p)


def precise_adamw(**a: Any) -> None:
    """Computes everything in float64 and rounds each result once."""
    up = {k: double(v) for k, v in a.items()} | {"copies": None}
    adamw.reference(**up)
    for name in ("params", "exp_avgs", "exp_avg_sqs"):
        for to, value in zip(a[name], up[name], strict=True):
            to.copy_(value)
    for copy, p in zip(a["copies"] or (), a["params"], strict=bool(a["copies"])):
        copy.copy_(p)


folded = adam(denominator=lambda v, correction, a: v.sqrt() / math.sqrt(correction) + a["eps"])
# one number a step, which sums by halves get right to the last bit or nearly so
benign("norm-flat", global_norm, "one sum over everything", flat_norm, neutral=True)
benign("norm-reversed", global_norm, "from the last tensor", reversed_norm, neutral=True)
benign("norm-float64", global_norm, "float64 inside", precise(global_norm), neutral=True)
benign("adamw-foreach", adamw, "torch.optim.AdamW's foreach arithmetic", foreach_adamw)
benign("adamw-float64", adamw, "float64 inside", precise_adamw)
benign("adamw-folded", adamw, "sqrt(v) / sqrt(correction)", folded)
