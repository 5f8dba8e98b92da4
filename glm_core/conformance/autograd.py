"""Checks what autograd asks of a kernel besides all its gradients at once: only some of them
(frozen weights or inputs), gradients added to what is there, and the same forward whether gradients
are recorded or not."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glm_core.backends.base import Backend
from glm_core.backends.registry import use
from glm_core.conformance.case import Case, CaseFailure
from glm_core.conformance.oracle import (
    Results,
    forward,
    is_strided,
    leaf,
    oracle_of,
    output_gradient,
    tensors_by_name,
)
from glm_core.conformance.tolerance import MAX_ERROR_RATIO, Allowance, deviation
from glm_core.errors import UnsupportedOpError, in_one_line


class Step(NamedTuple):
    """A forward and a backward as training does them."""

    outputs: Results
    leaves: Results
    """the arguments that need a gradient; `.grad` holds it"""


def check(case: Case, backend: Backend) -> None:
    """Raises CaseFailure for the first of these facts that does not hold. What the backend does not
    support is no failure: the reference runs there."""
    for wanted in masks(case):
        only = f"with only {', '.join(wanted)} needing a gradient, "
        try:
            step = _step(case, backend, wanted)
        except Exception as error:  # a vendor's kernel may raise anything
            raise CaseFailure(f"{only}{in_one_line(error)}") from error
        allowed = oracle_of(case, step.outputs) if step else {}
        for name, x in step.leaves.items() if step else ():
            _judge(f"d {name}: {only}", _gradient(x), allowed[f"d {name}"])
    _check_added(case, backend)


def masks(case: Case) -> Iterator[Collection[str]]:
    """Yields which arguments need a gradient: each alone, then all but one. All at once is what the
    case itself asks."""
    args = case.sample.args
    names = [n for n in case.op.differentiable if args.get(n) is not None]
    yield from ([n] for n in names if len(names) > 1)
    yield from ([n for n in names if n != frozen] for frozen in names if len(names) > 2)


def _step(
    case: Case, backend: Backend, wanted: Collection[str], held: Results | None = None
) -> Step | None:
    """Runs the case's op with gradients for `wanted`, which are added to `held` by argument.
    Returns None where the backend has no kernel for that."""
    args: dict[str, Any] = case.sample.make(case.dtype, backend.device())
    strided, leaves = is_strided(args), Results()
    args = {k: leaf(k, v, leaves) if k in wanted else v for k, v in args.items()}
    for name, grad in (held or {}).items():
        leaves[name].grad = grad.to(leaves[name].device)
    try:
        with use(backend, strict=True):
            outputs = tensors_by_name("out", case.op(**args))
            drawn = [output_gradient(i, y, strided) for i, y in enumerate(outputs.values())]
            pairs = [
                (y, d) for y, d in zip(outputs.values(), drawn, strict=True) if y.requires_grad
            ]
            if pairs:  # an output may depend on frozen arguments alone
                torch.autograd.backward([y for y, _ in pairs], [d for _, d in pairs])
            backend.synchronize()
    except UnsupportedOpError:
        return None
    return Step({k: y.detach() for k, y in outputs.items()}, leaves)


def _gradient(x: Tensor) -> Tensor:
    return torch.zeros_like(x) if x.grad is None else x.grad


def _check_added(case: Case, backend: Backend) -> None:
    """Fails where a gradient is not added to what `.grad` holds, as over several micro-batches, and
    where the forward differs because gradients are recorded."""
    first = _step(case, backend, case.op.differentiable)
    if first is None:
        return
    grads = {k: _gradient(x) for k, x in first.leaves.items()}
    size = {k: 1 + float(g.nan_to_num(0.0, 0.0, 0.0).norm()) for k, g in grads.items()}
    held = {k: torch.full_like(g, size[k]) for k, g in grads.items()}
    second = _step(case, backend, case.op.differentiable, held)
    for name, x in second.leaves.items() if second else ():
        off = _gradient(x).double() - (grads[name].double() + size[name])
        if bool((off.abs() > 4 * torch.finfo(x.dtype).eps * size[name]).any()):
            raise CaseFailure(f"d {name}: it is not added to what .grad holds")
    in_test = dataclasses.replace(case, mode="test")
    allowed = oracle_of(in_test, first.outputs)
    for name, y in first.outputs.items():
        _judge(f"{name}: while gradients are recorded, ", y, allowed[name])


def check_inference(case: Case, backend: Backend) -> None:
    """Raises CaseFailure where the forward is another one in torch's inference mode."""
    args = case.sample.make(case.dtype, backend.device())
    with torch.inference_mode(), use(backend, strict=True):
        results = forward(case.op, case.op, args)
        backend.synchronize()
    for name, allowed in oracle_of(case, results).items():
        _judge(f"{name}: in inference mode, ", results[name], allowed)


def _judge(what: str, got: Tensor, allowed: Allowance) -> None:
    found = deviation(got.cpu(), allowed)
    if found.ratio > MAX_ERROR_RATIO:
        raise CaseFailure(f"{what}{found.where}, {found.ratio:.3g} times what is allowed")
