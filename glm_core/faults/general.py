"""Mistakes that a kernel of any op can make: gradients, strides, memory, precision, repetition."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from glm_core.dispatch import Op
from glm_core.faults.mutant import Kernel, Mutant, pulled

Edit = Callable[[Tensor], Tensor]


def general(op: Op) -> Iterator[Mutant]:
    """The general mutants of one op, all made from its reference."""
    for name in op.differentiable:
        for fault, (text, edit) in GRADIENTS.items():
            title = f"gradient_of_{name}_{fault}"
            yield Mutant(title, op, f"the gradient of {name} {text}", _argument(op, name, edit))
    for name in _tensors(op):
        text = f"reads {name} as if it were contiguous"
        yield Mutant(f"strides_of_{name}_ignored", op, text, _argument(op, name, _dense))
    for name in set(_tensors(op)) - set(op.mutates):
        text = f"leaves scratch values in {name}"
        yield Mutant(f"{name}_overwritten", op, text, _scribbling(op, name))
    if not op.mutates:
        for fault, (text, edit) in RESULTS.items():
            yield Mutant(fault, op, text, _result(op, edit))
        yield Mutant("stale_buffer", op, "every call returns the same memory", _reusing(op))


def _tensors(op: Op) -> list[str]:
    """Parameters that are tensors with dimensions, or lists of them, in the op's first sample."""
    made = next(iter(op.samples())).make(torch.float32, "meta")
    single = {k: v[0] if isinstance(v, list) and v else v for k, v in made.items()}
    return [k for k, v in single.items() if isinstance(v, Tensor) and v.dim()]


def _each(value: Any, edit: Edit) -> Any:
    """`edit` on a tensor, or on every tensor of a list or tuple."""
    if isinstance(value, (list, tuple)):
        return type(value)(_each(v, edit) for v in value)
    return edit(value) if isinstance(value, Tensor) else value


def _argument(op: Op, name: str, edit: Edit) -> Kernel:
    """The reference with one argument edited."""
    return lambda **a: op.reference(**{**a, name: _each(a.get(name), edit)})


def _result(op: Op, edit: Edit) -> Kernel:
    """The reference with its outputs edited."""
    return lambda **a: _each(op.reference(**a), edit)


def _scribbling(op: Op, name: str) -> Kernel:
    def kernel(**a: Any) -> Any:
        y = op.reference(**a)
        _each(a[name], lambda x: x.detach().zero_())
        return y

    return kernel


def _reusing(op: Op) -> Kernel:
    """The reference, copied into buffers kept from the first call of that shape."""
    kept: dict[Any, Tensor] = {}

    def reuse(y: Tensor) -> Tensor:
        buffer = kept.setdefault((y.shape, y.dtype), torch.empty_like(y))
        buffer.copy_(y.detach())
        shared: Tensor = _Borrowed.apply(y, buffer)  # type: ignore[no-untyped-call]  # torch's own
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
    kept = torch.ones_like(g)
    kept[..., -1:] = 0
    return g * kept


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
