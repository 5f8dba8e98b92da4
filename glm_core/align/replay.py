"""Replays a captured op call, forward and backward, on any backend or function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from glm_core.align.capture import Call, copied
from glm_core.align.disguise import Exact, widened
from glm_core.backends.base import Backend
from glm_core.diagnose import watchdog
from glm_core.diagnose.device_errors import device_error
from glm_core.errors import GlmCoreError

Results = dict[str, Tensor]
"""by name: outputs `y` (or `y0`, `y1`, ...), gradients `d_ARGUMENT`, arguments written in place,
and `change`; integers in float64"""
CHOSEN = "y0"
"""the result of an op that chooses, see `glm_core.choice`"""

LOW = (torch.bfloat16, torch.float16)
"""the dtypes below float32"""


def replay(
    call: Call,
    function: Callable[..., Any],
    mode: AbstractContextManager[Any] | None = None,
    device: torch.device | None = None,
    widen: bool = False,
) -> Results:
    """Runs `function` on copies of the call's arguments and differentiates it with the captured
    output gradients. The op's reference receives the arguments themselves where it does not write
    them. `mode` is active meanwhile; `device` receives the arguments; `widen` turns float32 into
    float64 first. Returns the results on the CPU, a list of tensors as one flat tensor."""

    def fresh(x: Any) -> Any:
        return x.to(device) if device is not None and isinstance(x, Tensor) else x

    def own(name: str, value: Any) -> Any:
        kept = function is call.op.reference and name not in call.op.mutates

        def make(x: Any) -> Any:
            return fresh(alias(x) if kept else copied(x))

        return make(value) if isinstance(value, Tensor) else tree_map(make, value)

    args = {name: own(name, value) for name, value in call.args.items()}
    gradients = [None if g is None else fresh(g) for g in call.output_gradients]
    if widen:
        args, gradients = widened(args), widened(gradients)
    names = [n for n in call.op.differentiable if isinstance(args.get(n), Tensor)]
    differentiate = any(g is not None for g in gradients)
    if differentiate:
        args.update({n: args[n].requires_grad_() for n in names})
    with mode or nullcontext(), torch.set_grad_enabled(differentiate):
        out = function(**args)
        outputs = out if isinstance(out, tuple) else () if out is None else (out,)
        results = {f"y{i}" if len(outputs) > 1 else "y": y for i, y in enumerate(outputs)}
        if differentiate:
            results |= _backward(outputs, gradients, {n: args[n] for n in names})
    results |= {n: args[n] for n in call.op.mutates if args.get(n) is not None}
    return with_change(call, {n: real(flat(x).detach().cpu()) for n, x in results.items()})


def alias(x: Any) -> Any:
    """Returns the same values, of which no gradient is known yet."""
    return x.detach() if isinstance(x, Tensor) else x


def replay_on(call: Call, backend: Backend) -> Results:
    """Replays the call on the backend, which must be active. Synchronizes after each direction, so
    that a DeviceError names the one that failed."""
    direction = "forward" if call.op.differentiable else "optimizer"

    def synchronized(**args: Any) -> Any:
        nonlocal direction
        out = call.op(**args)
        backend.synchronize()
        if call.op.differentiable:
            direction = "backward"
        return out

    where = call.where(direction)
    watchdog.beat(where)
    try:
        return replay(call, synchronized, device=backend.device())
    except GlmCoreError:
        raise
    except Exception as error:  # a vendor's kernel may raise anything
        where = call.where(direction)
        raise device_error(
            error, "captured call", backend.name, where, **call.place(direction)
        ) from error


def with_change(call: Call, results: Results) -> Results:
    """Adds `change` in float64: what an update did to the first argument it writes. The weights
    themselves show an update only in their last bits."""
    if call.op.mutates:
        name = call.op.mutates[0]
        results["change"] = results[name].double() - flat(call.args[name]).cpu().double()
    return results


def _backward(
    outputs: tuple[Tensor, ...], gradients: list[Tensor | None], inputs: dict[str, Tensor]
) -> Results:
    used = [
        (y, g.to(y.dtype))
        for y, g in zip(outputs, gradients, strict=True)
        if g is not None and y.requires_grad
    ]
    gradients_in = torch.autograd.grad(
        [y for y, _ in used], list(inputs.values()), [g for _, g in used], allow_unused=True
    )
    pairs = zip(inputs.items(), gradients_in, strict=True)
    return {f"d_{n}": torch.zeros_like(x) if g is None else g for (n, x), g in pairs}


def real(x: Tensor) -> Tensor:
    """Returns floating-point values unchanged, integers in float64."""
    return x if x.is_floating_point() else x.double()


def flat(x: Any) -> Tensor:
    """Returns a tensor unchanged, a list of tensors as one flat tensor."""
    return x if isinstance(x, Tensor) else torch.cat([t.flatten() for t in x])


def exact(
    call: Call,
    like: Results,
    function: Callable[..., Any] | None = None,
    unrounded: bool = False,
) -> Results:
    """Computes the call, by the reference or `function`, in float64 and rounds once to the dtypes
    of `like`: the best any kernel can return. Roundings that the op's contract asks for are kept,
    unless `unrounded`; autograd's own, of the gradient of a sum that is also an output, are not."""
    if unrounded:
        call = dataclasses.replace(call, args=widened(call.args, LOW))
    passed_on = len(call.output_gradients) > 1  # an output is the op's own input further on
    wide = replay(call, function or call.op.reference, Exact(passed_on), widen=True)
    rounded = {n: x.to(like[n].dtype) if n in like else x for n, x in wide.items()}
    return with_change(call, rounded)
