"""How a deviating backend is made: the references, with some kernels replaced, forward and backward
apart."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from glm_core import ops
from glm_core.backends.base import Backend
from glm_core.dispatch import Op
from glm_core.session import Kernel

Function = Callable[..., Any]
Arguments = dict[str, Any]
Gradients = dict[str, Tensor | None]
Vjp = Callable[[Arguments, tuple[Tensor, ...]], Gradients]
"""(arguments by name, gradients of the outputs) -> gradients by argument name"""


def backend(name: str, kernels: Mapping[str, Function]) -> Backend:
    """A backend on the CPU whose ops are the references except for these; a kernel receives every
    argument by name."""
    return Backend(
        name=name,
        device_type="cpu",
        verified="made to deviate; only the sensitivity figures use it",
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
    """The reference with some arguments replaced; a callable change receives all arguments."""

    def kernel(**a: Any) -> Any:
        return op.reference(**a | {k: v(a) if callable(v) else v for k, v in changes.items()})

    return kernel


def vjp(op: Op, function: Function) -> Vjp:
    """The gradients of `function` by autograd, recomputed from the arguments."""

    def gradients(arguments: Arguments, outputs: tuple[Tensor, ...]) -> Gradients:
        names = [n for n in op.differentiable if isinstance(arguments[n], Tensor)]
        leaves = {n: arguments[n].detach().requires_grad_() for n in names}
        with torch.enable_grad():
            y = function(**arguments | leaves)
        found = torch.autograd.grad(y, list(leaves.values()), outputs, allow_unused=True)
        return dict(zip(names, found, strict=True))

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
        ctx.made = backward, names, arguments
        return forward(**arguments)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        backward, names, arguments = ctx.made
        gradients = backward(arguments, outputs)
        return None, None, None, None, *(gradients.get(n) for n in names)


def splice(op: Op, forward: Function, backward: Vjp) -> Function:
    """A kernel whose value comes from `forward` and whose gradients come from `backward`."""

    def kernel(**a: Any) -> Any:
        names = tuple(n for n in op.differentiable if isinstance(a[n], Tensor))
        rest = {n: v for n, v in a.items() if n not in names}
        return _Splice.apply(  # type: ignore[no-untyped-call]  # torch leaves apply untyped
            forward, backward, names, rest, *(a[n] for n in names)
        )

    return kernel


def forward_only(op: Op, function: Function) -> Function:
    """`function`'s value with the reference's gradients."""
    return splice(op, function, vjp(op, op.reference))


def backward_only(op: Op, function: Function) -> Function:
    """The reference's value with `function`'s gradients."""
    return splice(op, op.reference, vjp(op, function))


def edited(op: Op, edit: Callable[[Arguments, Gradients], Gradients]) -> Function:
    """The reference's value, and its gradients after `edit(arguments, gradients)` replaced some."""
    right = vjp(op, op.reference)

    def gradients(arguments: Arguments, outputs: tuple[Tensor, ...]) -> Gradients:
        found = right(arguments, outputs)
        return found | edit(arguments, found)

    return splice(op, op.reference, gradients)


Kind = Literal[
    "formula",
    "gradient",
    "optimizer",
    "mask",
    "position",
    "dtype",
    "eps",
    "scale",
    "rounding",
    "rows",
    "stale",
    "rare shape",
]
Direction = Literal["forward", "backward", "both", "update"]
Kernels = Mapping[str, Function]
BOTH = ("float32", "bfloat16")
FLOAT32 = ("float32",)
BFLOAT16 = ("bfloat16",)


@dataclasses.dataclass(frozen=True, slots=True)
class Bug:
    """One mistake, planted in a backend that is the reference otherwise."""

    name: str
    kind: Kind
    op: str
    direction: Direction
    """where the mistake is; `both`: the gradients are those of the wrong formula"""
    description: str
    kernels: Callable[[], Kernels]
    """fresh kernels by op: some bugs have a memory"""
    setup: str = ""
    """the small model it is planted in (`catalogue.SETUPS`); empty = the one for its op"""
    dtypes: tuple[str, ...] = BOTH
    """working dtypes in which it is a bug"""
    reason: str = ""
    """why it is none in the other dtype"""

    def backend(self) -> Backend:
        """The deviating backend, without memory of earlier calls."""
        return backend(f"bug:{self.name}", self.kernels())
