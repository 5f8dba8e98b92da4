"""Declares the glm_core backend `sim`: a few kernels; every other op's reference runs on the
device. Shapes: B batch, L sequence, D width, F ffn width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from glm_core import ops
from glm_core.backends.base import Backend
from glm_core.spec import SUPPORTED, Support, unsupported
from vendor_sim import device, faults

_sim = torch.ops.sim
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class SimBackend(Backend):
    """A backend that also reports what its runtime sent to the host."""

    def runtime_fallbacks(self) -> dict[str, int]:
        """Returns how many calls this runtime has sent to the host, by aten op."""
        return device.fallback_counts()


backend = SimBackend(
    name="sim",
    device_type="sim",
    collective="simccl",
    verified="run on the simulated device",
    dtypes=tuple(d for d in _DTYPES if not faults.missing(d)),
)


def _contiguous(**tensors: Tensor) -> Support:
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            return unsupported(
                f"{name} is not contiguous: shape {tuple(tensor.shape)}, stride {tensor.stride()}"
            )
    return SUPPORTED


@backend.implements(ops.linear)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Calls aten's linear, which runs the vendor's matrix product."""
    return torch.nn.functional.linear(x, weight, bias)


@backend.implements(ops.geglu, supports=lambda x: _contiguous(x=x))
def geglu(x: Tensor) -> Tensor:
    return _sim.geglu(x)


def _geglu_backward(context: Any, dy: Tensor) -> Tensor:
    return _sim.geglu_backward(dy.contiguous(), *context.saved_tensors)


torch.library.register_autograd(
    "sim::geglu",
    _geglu_backward,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def _norm_takes(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, alpha: float = 1.0
) -> Support:
    return _contiguous(x=x, residual=residual)


@backend.implements(ops.add_layer_norm, supports=_norm_takes)
def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, alpha: float = 1.0
) -> tuple[Tensor, Tensor]:
    y, total, _, _ = _sim.add_layer_norm(x, residual, weight, bias, eps, alpha)
    return y, total


def _norm_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, total, mean, rstd = output
    ctx.save_for_backward(total, inputs[2], mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.alpha = inputs[5]


def _norm_backward(
    context: Any, dy: Tensor, dtotal: Tensor, *_: Tensor
) -> tuple[Tensor | None, ...]:
    grads = _sim.add_layer_norm_backward(
        dy.contiguous(), dtotal.contiguous(), *context.saved_tensors, context.alpha
    )
    return (*grads, None, None)


torch.library.register_autograd("sim::add_layer_norm", _norm_backward, setup_context=_norm_context)


def _adamw_takes(
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
) -> Support:
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        if param.dtype != torch.float32 or grad.dtype not in _DTYPES:
            return unsupported(f"params[{i}] is {param.dtype}, its gradient {grad.dtype}")
        if copies and copies[i].dtype != grad.dtype:
            return unsupported(f"copies[{i}] is {copies[i].dtype}, its gradient {grad.dtype}")
        support = _contiguous(**{f"params[{i}]": param, f"grads[{i}]": grad})
        if not support.ok:
            return support
    return SUPPORTED


@backend.implements(ops.adamw, supports=_adamw_takes)
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
    lists = [list(params), list(grads), list(exp_avgs), list(exp_avg_sqs)]
    _sim.adamw(*lists, grad_scale, list(copies or ()), step, lr, beta1, beta2, eps, weight_decay)
