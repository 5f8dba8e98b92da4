"""Declares the optimizer's arithmetic over lists of tensors: one call per parameter group, not per
tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from glm_core.dispatch import op
from glm_core.ops.layout import gapped
from glm_core.ops.precision import num_bytes, wide
from glm_core.spec import Cost, Draw, Maker, Sample, normal

_LARGE = ((65537,), (257, 129))
_SHAPES = ((3, 5), (7,), (1,), (16, 33), (0,))


def _lists(
    *shapes: tuple[int, ...], std: float = 1.0, wide: bool = False, strided: bool = False
) -> list[Maker]:
    return [normal(*s, std=std, wide=wide, strided=strided) for s in shapes]


def global_norm_samples() -> Iterator[Sample]:
    yield Sample("mixed", {"tensors": _lists(*_SHAPES)})
    yield Sample("one", {"tensors": _lists((1,))})
    yield Sample("none", {"tensors": []})
    yield Sample("mixed-strided", {"tensors": _lists(*_SHAPES, strided=True)})
    yield Sample("mixed-gapped", gapped({"tensors": _lists(*_SHAPES)}))
    yield Sample("mixed-tiny", {"tensors": _lists(*_SHAPES, std=1e-6)})
    yield Sample("mixed-huge", {"tensors": _lists(*_SHAPES, std=1e4)})
    yield Sample("65537", {"tensors": _lists(*_LARGE)}, large=True)
    yield Sample("4096x1024", {"tensors": _lists((4096, 1024))}, real=True)


def global_norm_cost(tensors: Sequence[Tensor]) -> Cost:
    return Cost(2 * sum(t.numel() for t in tensors), num_bytes(*tensors))


@op(samples=global_norm_samples, cost=global_norm_cost)
def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Computes sqrt(sum of all squares) over all tensors; 0 for an empty list.

    Shapes: list of tensors of any shape -> float32 scalar (float64 for float64). Accumulates
    in float32 at least: all squares. Source: Pascanu et al. 2013, section 3.2."""
    if not tensors:
        return torch.zeros(())
    # by halves, as torch sums; its norm adds up one square after another, and loses small ones
    return torch.stack([wide(t).square().sum() for t in tensors]).sum().sqrt()


def adamw_samples() -> Iterator[Sample]:
    scale: Maker = lambda draw: torch.tensor(0.5, device=draw.device)  # noqa: E731

    def positive(*shape: int, std: float) -> Maker:
        make = normal(*shape, std=0.1 * std, wide=True)
        return lambda draw: make(draw).square()

    def make(
        id: str,
        shapes: tuple[tuple[int, ...], ...],
        std: float = 1.0,
        strided: bool = False,
        **rest: float,
    ) -> Sample:
        args = {
            "params": _lists(*shapes, wide=True, strided=strided),
            "grads": _lists(*shapes, std=std, strided=strided),
            "exp_avgs": _lists(*shapes, std=0.1 * std, wide=True),
            "exp_avg_sqs": [positive(*s, std=std) for s in shapes],
            "grad_scale": scale,
            "step": 3,
            "lr": 1e-3,
        }
        return Sample(id, {**args, **rest}, real="4096" in id)

    yield make("mixed", _SHAPES)
    yield make("mixed-decay", _SHAPES, weight_decay=0.1)
    yield make("mixed-tiny", _SHAPES, std=1e-7, eps=1e-6)
    yield make("mixed-huge", _SHAPES, std=1e4)
    yield make("mixed-strided", _SHAPES, strided=True)
    yield Sample("mixed-gapped", gapped(make("", _SHAPES).args))
    yield make("mixed-lr", _SHAPES, lr=0.1, weight_decay=0.5)
    yield make("one", ((1,),))
    yield make("none", ())
    yield make("mixed-step1", _SHAPES, step=1, beta1=0.8, beta2=0.95)
    yield Sample(
        "low-precision-copy",
        {**make("", ((16, 33), (5,))).args, "copies": [_empty(16, 33), _empty(5)]},
    )
    yield Sample("65537", make("", _LARGE).args, large=True)
    yield make("4096x1024", ((4096, 1024),))


def _empty(*shape: int) -> Maker:
    def make(draw: Draw) -> Tensor:
        return torch.zeros(shape, dtype=draw.dtype, device=draw.device)

    return make


def adamw_cost(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    grad_scale: Tensor,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    copies: Sequence[Tensor] | None = None,
) -> Cost:
    moved = 2 * num_bytes(*params, *exp_avgs, *exp_avg_sqs) + num_bytes(*grads, *(copies or ()))
    return Cost(14 * sum(p.numel() for p in params), moved)


@op(samples=adamw_samples, cost=adamw_cost, mutates=("params", "exp_avgs", "exp_avg_sqs", "copies"))
def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    grad_scale: Tensor,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    copies: Sequence[Tensor] | None = None,
) -> None:
    """Computes g = grad_scale * grad; m = b1 m + (1-b1) g; v = b2 v + (1-b2) g^2; p = p (1 - lr wd)
    - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps), with t = step counted from 1.

    Shapes: params, grads, exp_avgs, exp_avg_sqs: lists of equal length whose entries agree in
    shape; grad_scale a float32 scalar (the clip coefficient divided by the loss scale). params,
    exp_avgs and exp_avg_sqs are float32 and changed in place; grads have the working dtype; copies,
    if present, receive the new params rounded to their own dtype. Accumulates nothing. Source:
    Loshchilov & Hutter 2019, algorithm 2."""
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    for i, (p, grad, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        g = grad.to(p.dtype) * grad_scale.to(p.dtype)
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        p.mul_(1 - lr * weight_decay).addcdiv_(
            m / correction1, (v / correction2).sqrt() + eps, value=-lr
        )
        if copies is not None:
            copies[i].copy_(p)
