"""Builds kernels that deviate from a reference, in one direction or in both, and backends from
them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from glm_core import ops
from glm_core.backends.base import Backend
from glm_core.dispatch import Op
from glm_core.session import Kernel

Function = Callable[..., Any]
"""a kernel that receives every argument by name"""
Kernels = Mapping[str, Function]
"""kernels by op name"""
Arguments = dict[str, Any]
Gradients = dict[str, Tensor | None]
Vjp = Callable[[Arguments, tuple[Tensor, ...]], Gradients]
"""(arguments by name, gradients of the outputs) -> gradients by argument name"""


def backend(name: str, kernels: Kernels) -> Backend:
    """Returns a CPU backend with these kernels, whose other ops are the references."""
    return Backend(
        name=name,
        device_type="cpu",
        verified="deviates on purpose",
        references_only=True,
        kernels={op: Kernel(_by_name(ops.all_ops()[op], f), None) for op, f in kernels.items()},
    )


def _by_name(op: Op, function: Function) -> Function:
    signature = inspect.signature(op.reference)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return function(**bound.arguments)

    return kernel


def changed(op: Op, **changes: Any) -> Function:
    """Returns the reference with some arguments replaced; a callable is called with all arguments
    and returns the new value."""

    def kernel(**a: Any) -> Any:
        return op.reference(**a | {k: v(a) if callable(v) else v for k, v in changes.items()})

    return kernel


def pulled(x: Tensor, pull: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns x itself, whose gradient passes through `pull`."""
    y = x.view_as(x)
    if y.requires_grad:
        y.register_hook(pull)
    return y


def pulled_argument(op: Op, name: str, pull: Callable[[Arguments, Tensor], Tensor]) -> Function:
    """Returns the reference, one argument's gradient replaced by `pull(arguments, gradient)`."""

    def change(a: Arguments) -> Tensor | None:
        return None if a[name] is None else pulled(a[name], lambda g: pull(a, g))

    return changed(op, **{name: change})


def vjp(op: Op, function: Function) -> Vjp:
    """Returns the gradients of `function` by autograd, recomputed from the arguments."""

    def gradients(arguments: Arguments, outputs: tuple[Tensor, ...]) -> Gradients:
        names = [n for n in op.differentiable if isinstance(arguments[n], Tensor)]
        leaves = {n: arguments[n].detach().requires_grad_() for n in names}
        with torch.enable_grad():
            y = function(**arguments | leaves)
        pairs = zip(y if isinstance(y, tuple) else (y,), outputs, strict=True)
        used = [(t, g) for t, g in pairs if t.requires_grad]  # integers are not
        roots, heads = [t for t, _ in used], [g for _, g in used]
        grads = torch.autograd.grad(roots, list(leaves.values()), heads, allow_unused=True)
        return dict(zip(names, grads, strict=True))

    return gradients


class _Splice(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        forward: Function,
        backward: Vjp,
        names: tuple[str, ...],
        rest: Arguments,
        *tensors: Tensor,
    ) -> Any:
        arguments = rest | dict(zip(names, tensors, strict=True))
        ctx.call = backward, names, arguments
        return forward(**arguments)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        backward, names, arguments = ctx.call
        gradients = backward(arguments, outputs)
        return None, None, None, None, *(gradients.get(n) for n in names)


def splice(op: Op, forward: Function, backward: Vjp) -> Function:
    """Returns a kernel with the value of `forward` and the gradients of `backward`."""

    def kernel(**a: Any) -> Any:
        names = tuple(n for n in op.differentiable if isinstance(a[n], Tensor))
        rest = {n: v for n, v in a.items() if n not in names}
        return _Splice.apply(  # type: ignore[no-untyped-call]  # torch leaves apply untyped
            forward, backward, names, rest, *(a[n] for n in names)
        )

    return kernel


def forward_only(op: Op, function: Function) -> Function:
    """Returns a kernel with `function`'s value and the reference's gradients."""
    return splice(op, function, vjp(op, op.reference))


def backward_only(op: Op, function: Function) -> Function:
    """Returns a kernel with the reference's value and `function`'s gradients."""
    return splice(op, op.reference, vjp(op, function))


def with_gradients(op: Op, gradients: Vjp) -> Function:
    """Returns a kernel with the reference's value and these gradients."""
    return splice(op, op.reference, gradients)


def edited(op: Op, edit: Callable[[Arguments, Gradients], Gradients]) -> Function:
    """Returns a kernel with the reference's value and gradients, those that `edit(arguments,
    gradients)` returns replaced."""
    right = vjp(op, op.reference)

    def gradients(arguments: Arguments, outputs: tuple[Tensor, ...]) -> Gradients:
        grads = right(arguments, outputs)
        return grads | edit(arguments, grads)

    return with_gradients(op, gradients)
