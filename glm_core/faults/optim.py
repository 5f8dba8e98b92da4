"""Wrong optimizer arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from glm_core.faults.mutant import mutant
from glm_core.ops import adamw, global_norm
from glm_core.ops.precision import wide


@mutant(global_norm, wrong="the sum of the norms")
def sum_of_norms(tensors: Sequence[Tensor]) -> Tensor:
    return sum((torch.linalg.vector_norm(wide(t)) for t in tensors), torch.zeros(()))


@mutant(global_norm, wrong="the last tensor is left out")
def last_left_out(tensors: Sequence[Tensor]) -> Tensor:
    return global_norm.reference([t for t in tensors if t.numel()][:-1])


@mutant(global_norm, wrong="the largest entry")
def largest(tensors: Sequence[Tensor]) -> Tensor:
    return max((wide(t).abs().max() for t in tensors if t.numel()), default=torch.zeros(()))


@mutant(global_norm, wrong="the square root is left out")
def squared(tensors: Sequence[Tensor]) -> Tensor:
    return global_norm.reference(tensors).square()


@mutant(global_norm, wrong="squares in the working dtype")
def narrow_squares(tensors: Sequence[Tensor]) -> Tensor:
    total = torch.zeros(())
    for t in tensors:
        total = total + wide(t.square()).sum()
    return total.sqrt()


@mutant(global_norm, wrong="squares summed in float32 one after another")
def sequential_sum(tensors: Sequence[Tensor]) -> Tensor:
    total = torch.zeros(())
    for t in tensors:
        if t.numel():
            squares = wide(t).flatten().square().numpy()
            # numpy's cumsum adds in its dtype, torch's in float64
            total = total + float(squares.cumsum(dtype=squares.dtype)[-1])
    return total.sqrt()


@mutant(global_norm, wrong="only the first 2^20 elements of a tensor count")
def counter_overflows(tensors: Sequence[Tensor]) -> Tensor:
    return global_norm.reference([t.flatten()[: 2**20] for t in tensors])


def _step(a: dict[str, Any], **fault: Any) -> None:
    """AdamW with places to go wrong."""
    lr, step, decay = a["lr"], a["step"], a.get("weight_decay", 0.0)
    b1, b2, eps = a.get("beta1", 0.9), a.get("beta2", 0.999), a.get("eps", 1e-8)
    c1 = 1 - b1**step if fault.get("correct1", True) else 1.0
    c2 = 1 - b2**step if fault.get("correct2", True) else 1.0
    lists = (a["params"], a["grads"], a["exp_avgs"], a["exp_avg_sqs"])
    for i, (p, grad, m, v) in enumerate(zip(*lists, strict=True)):
        g = grad.to(p.dtype) * a["grad_scale"]
        if fault.get("coupled"):
            g = g + decay * p
        m.mul_(b1).add_(g, alpha=1 - b1)
        squared = g if not fault.get("unscaled_square") else grad.to(p.dtype)
        v.mul_(b2).addcmul_(squared, squared, value=1 - b2)
        if fault.get("narrow_moments"):
            m.copy_(m.bfloat16()), v.copy_(v.bfloat16())
        root = (v / c2 + eps).sqrt() if fault.get("eps_inside") else (v / c2).sqrt() + eps
        before = p.clone()
        late, plain = fault.get("decay_late"), fault.get("coupled")
        if not late and not plain:
            p.mul_(1 - lr * decay)
        p.addcdiv_(m / c1, root, value=-lr)
        if late:
            p.mul_(1 - lr * decay)
        if a.get("copies") is not None and not fault.get("no_copy"):
            a["copies"][i].copy_(before if fault.get("old_copy") else p)


FAULTS: dict[str, tuple[str, dict[str, Any]]] = {
    "first_moment_uncorrected": ("no bias correction of the first moment", {"correct1": False}),
    "second_moment_uncorrected": ("no bias correction of the second moment", {"correct2": False}),
    "eps_inside_root": ("eps is added under the root", {"eps_inside": True}),
    "decay_coupled": ("weight decay goes through the moments, as in Adam", {"coupled": True}),
    "decay_late": ("weight decay after the update, not before it", {"decay_late": True}),
    "square_unscaled": ("the second moment sees the unclipped gradient", {"unscaled_square": True}),
    "moments_bfloat16": ("moments are kept in bfloat16", {"narrow_moments": True}),
    "copies_unwritten": ("the low-precision copies are not written", {"no_copy": True}),
    "copies_old": ("the copies receive the parameters before the update", {"old_copy": True}),
}


def _faulty(name: str, text: str, fault: dict[str, Any]) -> None:
    def kernel(**a: Any) -> None:
        _step(a, **fault)

    kernel.__name__ = name
    mutant(adamw, wrong=text)(kernel)


for _name, (_text, _fault) in FAULTS.items():
    _faulty(_name, _text, _fault)


def _with(text: str, name: str, **changes: Any) -> None:
    def kernel(**a: Any) -> None:
        adamw.reference(**{**a, **{k: f(a) for k, f in changes.items()}})

    kernel.__name__ = name
    mutant(adamw, wrong=text)(kernel)


_with("the step counts from 0", "step_from_zero", step=lambda a: max(a["step"] - 1, 1))
_with("beta1 is 0.9 whatever was asked", "beta1_fixed", beta1=lambda a: 0.9)
_with("beta2 is 0.999 whatever was asked", "beta2_fixed", beta2=lambda a: 0.999)
_with("beta2 is 0.9999", "beta2_large", beta2=lambda a: 0.9999)
_with("eps is 1e-8 whatever was asked", "eps_fixed", eps=lambda a: 1e-8)
_with("eps is 1e-6", "eps_large", eps=lambda a: 1e-6)
_with("no weight decay", "decay_left_out", weight_decay=lambda a: 0.0)
_with(
    "the gradient is not clipped",
    "grad_scale_ignored",
    grad_scale=lambda a: torch.ones_like(a["grad_scale"]),
)


@mutant(adamw, wrong="elements past the last whole vector of 8 are not updated")
def tail_skipped(**a: Any) -> None:
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs")
    whole = {n: [t.reshape(-1)[: t.numel() // 8 * 8] for t in a[n]] for n in names}
    shapes = a["params"]
    if all(t.is_contiguous() for n in names for t in a[n]) and not a.get("copies"):
        adamw.reference(**{**a, **whole})
    else:
        assert shapes is not None
        adamw.reference(**a)
