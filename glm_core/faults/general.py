"""Makes the mistakes that a kernel of any op can make: gradients, strides, memory, precision,
repetition."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from glm_core import ops
from glm_core.dispatch import Op
from glm_core.faults.fault import Fault, fault
from glm_core.faults.kernels import Function, changed, pulled
from glm_core.faults.rounding import Edit, rounds, truncated

CUT_OFF = (
    ops.add_layer_norm,
    ops.add_rms_norm,
    ops.attention,
    ops.geglu,
    ops.gelu,
    ops.grouped_linear,
    ops.layer_norm,
    ops.quantized_grouped_linear,
    ops.quantized_linear,
    ops.rms_norm,
    ops.rope,
    ops.swiglu,
    ops.unpermute,
)
for _op in CUT_OFF:
    cut = rounds(_op, truncated)
    fault(_op, "bfloat16 results are cut off, not rounded", cut, mutant="truncated")


def general(op: Op) -> Iterator[Fault]:
    """Yields the general mutants of one op, all made from its reference."""

    def made(name: str, description: str, kernel: Function) -> Fault:
        return Fault(op.name, description, lambda: {op.name: kernel}, mutant=name)

    def argument(name: str, edit: Edit) -> Function:
        return changed(op, **{name: lambda a: _each(a[name], edit)})

    def result(edit: Edit) -> Function:
        return lambda **a: _each(op.reference(**a), edit)

    for name in op.differentiable:
        for suffix, (text, edit) in GRADIENTS.items():
            title = f"gradient_of_{name}_{suffix}"
            yield made(title, f"the gradient of {name} {text}", argument(name, edit))
    for name in _tensors(op):
        text = f"reads {name} as if it were contiguous"
        yield made(f"strides_of_{name}_ignored", text, argument(name, _dense))
        if name not in op.mutates:
            text = f"leaves scratch values in {name}"
            yield made(f"{name}_overwritten", text, _scribbling(op, name))
    if not op.mutates:
        for title, (text, edit) in RESULTS.items():
            yield made(title, text, result(edit))
        text = "every call returns the same memory"
        yield Fault(op.name, text, lambda: {op.name: _reusing(op)}, mutant="stale_buffer")


def _tensors(op: Op) -> list[str]:
    """Returns the parameters that are tensors with dimensions, or lists of them, in the op's first
    sample."""
    made = next(iter(op.samples())).make(torch.float32, "meta")
    single = {k: v[0] if isinstance(v, list) and v else v for k, v in made.items()}
    return [k for k, v in single.items() if isinstance(v, Tensor) and v.dim()]


def _each(value: Any, edit: Edit) -> Any:
    """Applies `edit` to a tensor, or to every tensor of a list or tuple."""
    if isinstance(value, (list, tuple)):
        return type(value)(_each(v, edit) for v in value)
    return edit(value) if isinstance(value, Tensor) else value


def _scribbling(op: Op, name: str) -> Function:
    def kernel(**a: Any) -> Any:
        y = op.reference(**a)
        _each(a[name], lambda x: x.detach().zero_())
        return y

    return kernel


def _reusing(op: Op) -> Function:
    """Returns the reference, whose results are copied into the buffers of the first call of that
    shape."""
    buffers: dict[Any, Tensor] = {}

    def reuse(y: Tensor) -> Tensor:
        buffer = buffers.setdefault((y.shape, y.dtype), torch.empty_like(y))
        buffer.copy_(y.detach())
        shared: Tensor = _Borrowed.apply(y, buffer)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
        return shared

    return lambda **a: _each(op.reference(**a), reuse)


class _Borrowed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, buffer: Tensor) -> Tensor:
        return buffer.view_as(buffer)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _last_dropped(g: Tensor) -> Tensor:
    factor = torch.ones_like(g)
    factor[..., -1:] = 0
    return g * factor


def _first_row_twice(g: Tensor) -> Tensor:
    factor = torch.ones_like(g)
    factor[slice(1) if g.dim() else ...] = 2
    return g * factor


GRADIENTS: dict[str, tuple[str, Edit]] = {
    "one_percent_large": ("is 1 % too large", lambda x: pulled(x, lambda g: g * 1.01)),
    "missing": ("is zero", torch.detach),
    "last_dropped": ("misses its last column", lambda x: pulled(x, _last_dropped)),
    "first_row_twice": ("counts its first row twice", lambda x: pulled(x, _first_row_twice)),
}


def _dense(x: Tensor) -> Tensor:
    if x.is_contiguous():
        return x
    return x.as_strided(x.shape, torch.empty(x.shape, device="meta").stride())


def _noisy(y: Tensor) -> Tensor:
    if not y.is_floating_point():
        return y
    up = torch.rand(y.shape, device=y.device) < 0.5
    return torch.where(up, y * (1 + torch.finfo(y.dtype).eps), y)


RESULTS: dict[str, tuple[str, Edit]] = {
    "two_percent_large": ("results are 2 % too large", lambda y: y * 1.02),
    "first_result_doubled": ("the first result is doubled", _first_row_twice),
    "nan_swallowed": ("NaN and infinity become numbers", torch.nan_to_num),
    "other_bits_each_time": ("the last bit is left to chance", _noisy),
    "wrong_dtype": ("results are float64", torch.Tensor.double),
    "extra_dimension": ("results have one dimension more", lambda y: y.unsqueeze(0)),
}
