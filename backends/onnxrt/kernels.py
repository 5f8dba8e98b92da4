"""Wraps every op in torch custom ops that run on ONNX Runtime and that autograd and torch.compile
see.

The gradients use `Library.impl` with an autograd.Function of our own:
torch.library.register_autograd costs 330 us more per forward and backward (420 us against 90 us for
an op that does nothing, one thread, torch 2.13)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from glm_core.backends.onnxrt import engine
from glm_core.backends.onnxrt.call import (
    BranchesOnNumberError,
    Call,
    Direction,
    export_obstacle,
    flatten,
    positions,
    unflatten,
)
from glm_core.dispatch import Op
from glm_core.errors import ShapeError, UnsupportedOpError
from glm_core.spec import SUPPORTED, Support, unsupported

NAMESPACE = "glm_core_onnxrt"
_library = torch.library.Library(NAMESPACE, "DEF")
_ops: dict[str, Op] = {}
_branching: set[Op] = set()
"""in-place ops whose reference branches on a number, discovered at the first export"""
_REST = "Scalar[] numbers, str layout, str provider"


def ready(
    op: Op,
    direction: Direction,
    tensors: Sequence[Tensor],
    numbers: Sequence[float],
    layout: str,
    provider: str,
) -> engine.Program:
    """Returns the loaded program of a call. Numbers of in-place ops change every step (learning
    rate, step), so they are inputs of the program, unless the reference branches on one: then each
    new value costs an export."""
    constants = tuple(numbers)
    specs = tuple((t.dtype, t.shape) for t in tensors)
    threads = torch.get_num_threads()
    if direction == "update" and op not in _branching:
        try:
            return engine.program(Call(op, direction, layout, None, specs), provider, threads)
        except BranchesOnNumberError:
            _branching.add(op)
    return engine.program(Call(op, direction, layout, constants, specs), provider, threads)


def define(op: Op) -> None:
    """Defines the op's custom ops: NAME and NAME_vjp, or NAME_ for an op that writes in place."""
    if op.mutates:
        _define(
            f"{op.name}_",
            f"(Tensor(a!)[] written, Tensor[] read, {_REST}) -> ()",
            op,
            _update,
            _fake_update,
        )
        return
    if _define(op.name, f"(Tensor[] tensors, {_REST}) -> Tensor[]", op, _forward, _fake_forward):
        _library.impl(op.name, _differentiable(op.name), "Autograd")
    schema = f"(Tensor[] tensors, Tensor[] cotangents, {_REST}) -> Tensor[]"
    _define(f"{op.name}_vjp", schema, op, _vjp, _fake_vjp)


def _define(
    name: str, schema: str, op: Op, run: Callable[..., Any], fake: Callable[..., Any]
) -> bool:
    new = name not in _ops
    _ops[name] = op  # an op declared again under its old name replaces the old one
    if new:
        _library.define(name + schema)
        _library.impl(name, lambda *args: run(_ops[name], *args), "CPU")
        torch.library.register_fake(
            f"{NAMESPACE}::{name}", lambda *args: fake(_ops[name], *args), lib=_library
        )
    return new


def custom_op(name: str) -> Any:
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _forward(
    op: Op, tensors: list[Tensor], numbers: list[float], layout: str, provider: str
) -> list[Tensor]:
    return ready(op, "forward", tensors, numbers, layout, provider).run(tensors, (), ())


def _fake_forward(
    op: Op, tensors: list[Tensor], numbers: list[float], layout: str, provider: str
) -> list[Tensor]:
    results = op.reference(*unflatten(layout, tensors, numbers))
    results = [results] if isinstance(results, Tensor) else results
    return [r.new_empty(r.shape) for r in results]


def _vjp(
    op: Op,
    tensors: list[Tensor],
    cotangents: list[Tensor],
    numbers: list[float],
    layout: str,
    provider: str,
) -> list[Tensor]:
    return ready(op, "vjp", tensors, numbers, layout, provider).run(tensors, cotangents, ())


def _fake_vjp(
    op: Op,
    tensors: list[Tensor],
    cotangents: list[Tensor],
    numbers: list[float],
    layout: str,
    provider: str,
) -> list[Tensor]:
    chosen = positions(op, layout, op.differentiable)
    return [tensors[i].new_empty(tensors[i].shape) for i in chosen]


def _update(
    op: Op,
    written: list[Tensor],
    read: list[Tensor],
    numbers: list[float],
    layout: str,
    provider: str,
) -> None:
    places = positions(op, layout, op.mutates)
    where = dict(zip(places, written, strict=True))
    others = iter(read)
    tensors = [where[i] if i in where else next(others) for i in range(len(written) + len(read))]
    results = ready(op, "update", tensors, numbers, layout, provider).run(tensors, (), numbers)
    # written only now: the graph may still read a tensor when it has the new value of another
    for tensor, result in zip(written, results, strict=True):
        tensor.copy_(result)


def _fake_update(op: Op, *args: Any) -> None:
    """Does nothing: the op returns nothing, and fake tensors have no values to write."""


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, name: str, numbers: list[float], layout: str, provider: str, *tensors: Tensor
    ) -> Any:
        ctx.call = (name, numbers, layout, provider)
        ctx.save_for_backward(*tensors)
        with torch._C._AutoDispatchBelowAutograd():
            results = custom_op(name)(list(tensors), numbers, layout, provider)
        ctx.floating = [r.is_floating_point() for r in results]
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        name, numbers, layout, provider = ctx.call
        tensors = list(ctx.saved_tensors)
        used = [g for g, floating in zip(cotangents, ctx.floating, strict=True) if floating]
        results = iter(custom_op(f"{name}_vjp")(tensors, used, numbers, layout, provider))
        chosen = positions(_ops[name], layout, _ops[name].differentiable)
        grads = [next(results) if i in chosen else None for i in range(len(tensors))]
        return None, None, None, None, *grads


def _differentiable(name: str) -> Callable[..., list[Tensor]]:
    def run(
        tensors: list[Tensor], numbers: list[float], layout: str, provider: str
    ) -> list[Tensor]:
        if not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
            with torch._C._AutoDispatchBelowAutograd():
                return list(custom_op(name)(tensors, numbers, layout, provider))
        apply: Any = _Differentiable.apply
        return list(apply(name, numbers, layout, provider, *tensors))

    return run


def binder(op: Op) -> Callable[[tuple[Any, ...], dict[str, Any]], list[Any]]:
    """Returns a function that orders a call's arguments and fills in defaults. It is quicker than
    inspect, and torch.compile can trace it."""
    signature = inspect.signature(op.reference)
    names = tuple(signature.parameters)
    defaults = {n: p.default for n, p in signature.parameters.items() if p.default is not p.empty}

    def bind(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        values = list(args)
        used = 0
        for name in names[len(args) :]:
            if name in kwargs:
                used += 1
                values.append(kwargs[name])
            elif name in defaults:
                values.append(defaults[name])
        if len(values) != len(names) or used != len(kwargs):
            raise ShapeError(f"op {op.name}: takes {signature}; pass these arguments")
        return values

    return bind


def kernel(op: Op, provider: str) -> Callable[..., Any]:
    """Returns the function by which the backend runs the op."""
    define(op)
    bind = binder(op)
    target = custom_op(f"{op.name}_" if op.mutates else op.name)

    def run(*args: Any, **kwargs: Any) -> Any:
        layout, tensors, numbers = flatten(bind(args, kwargs))
        if tensors:
            results = target(tensors, numbers, layout, provider)
        else:  # torch picks a custom op's implementation by its tensors
            results = _forward(op, tensors, numbers, layout, provider)
        return results[0] if len(results) == 1 else tuple(results)

    def update(*args: Any, **kwargs: Any) -> None:
        layout, tensors, numbers = flatten(bind(args, kwargs))
        places = positions(op, layout, op.mutates)
        written = [tensors[i] for i in places]
        read = [t for i, t in enumerate(tensors) if i not in places]
        if written:
            target(written, read, numbers, layout, provider)

    return update if op.mutates else run


def predicate(op: Op, provider: str) -> Callable[..., Support]:
    """Returns the predicate that says whether the provider takes a call. It exports and loads the
    program to find out; the call itself then reuses it."""
    bind = binder(op)

    def supports(*args: Any, **kwargs: Any) -> Support:
        arguments = bind(args, kwargs)
        reason = export_obstacle(arguments)
        if reason:
            return unsupported(reason)
        layout, tensors, numbers = flatten(arguments)
        if torch.compiler.is_compiling() or any(isinstance(t, FakeTensor) for t in tensors):
            return SUPPORTED  # shapes may be symbols: the program is made at the first real call
        if op.mutates and not positions(op, layout, op.mutates):
            return SUPPORTED  # nothing to write
        return _try(op, layout, tensors, numbers, provider)

    return supports


def _try(
    op: Op, layout: str, tensors: list[Tensor], numbers: list[float], provider: str
) -> Support:
    directions: list[Direction] = ["update" if op.mutates else "forward"]
    if torch.is_grad_enabled() and not op.mutates and any(t.requires_grad for t in tensors):
        directions.append("vjp")
    try:
        for direction in directions:
            ready(op, direction, tensors, numbers, layout, provider)
    except UnsupportedOpError as error:
        return unsupported(str(error))
    return SUPPORTED
