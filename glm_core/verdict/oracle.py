"""Computes an operator's call again on the host: in float64, and in other honest ways."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from glm_core.align import statistics
from glm_core.align.disguise import Regrouped, Rounded
from glm_core.align.replay import LOW
from glm_core.verdict import references
from glm_core.verdict.honest_kernels import LibraryFunctions, RoundedExponentials

Results = dict[str, Tensor]
"""by name: `y` or `y0`, `y1`, ..., and the arguments that the operator writes; a list of tensors as
one flat tensor"""
WIDE = {torch.complex64: torch.complex128, torch.complex32: torch.complex128}
Change = Callable[[Tensor], Tensor]


@dataclasses.dataclass(slots=True, eq=False)
class Call:
    """An operator with the arguments that it had before it ran."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    device_type: str

    def tensors(self) -> list[Tensor]:
        """Returns the tensors among the arguments."""
        return [x for x in tree_leaves((self.args, self.kwargs)) if isinstance(x, Tensor)]


def alone() -> ExitStack:
    """Returns a context in which no mode of the program, no autograd and no autocast is active."""
    stack = ExitStack()
    stack.enter_context(_disable_current_modes())
    stack.enter_context(torch.no_grad())
    stack.enter_context(torch.autocast("cpu", enabled=False))
    stack.enter_context(torch._C.DisableTorchFunction())
    return stack


def written(func: Any) -> list[str]:
    """Returns the names of the arguments that an operator writes."""
    arguments = func._schema.arguments
    return [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]


def computes(func: Any) -> bool:
    """Says whether an operator computes values of tensors: it is no view and no allocation."""
    moves_nothing = func.is_view or torch.Tag.inplace_view in func.tags
    if moves_nothing or func._schema.name in references.NO_VALUES:
        return False
    new = any(r.alias_info is None and "Tensor" in str(r.type) for r in func._schema.returns)
    return new or bool(written(func))


def argument(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """Returns an argument by its name, None where it was not passed."""
    names = [a.name for a in func._schema.arguments]
    at = names.index(name)
    return args[at] if at < len(args) else kwargs.get(name)


def results(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Results:
    """Returns what a call computed: its new outputs, and the arguments that it wrote. Outputs that
    alias an argument are not results of their own."""
    returns = func._schema.returns
    outputs = out if isinstance(out, tuple) and len(returns) != 1 else (out,)
    fresh = {
        f"y{i}" if len(returns) > 1 else "y": value
        for i, (value, schema) in enumerate(zip(outputs, returns, strict=False))
        if schema.alias_info is None
    }
    fresh |= {name: argument(func, args, kwargs, name) for name in written(func)}
    fresh.pop(references.UNFILLED.get(func._schema.name, ""), None)
    return {name: y for name, x in fresh.items() if (y := _flat(x)) is not None}


def _flat(x: Any) -> Tensor | None:
    """Returns a tensor on the host, a list of tensors as one flat tensor; None without tensors."""
    if isinstance(x, Tensor):
        return x.detach().cpu()
    tensors = [t.detach().cpu() for t in x if isinstance(t, Tensor)] if isinstance(x, list) else []
    return torch.cat([t.flatten() for t in tensors]) if tensors else None


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def compute(
    call: Call, dtype: torch.dtype | None, change: Change | None = None, function: Any = None
) -> Results:
    """Runs a call on the host. Floating-point arguments below `dtype` are converted to it first
    (None: they stay); `change` is applied to each of them. `function` runs in place of the
    operator; the default is its reference, or the operator itself."""
    func = call.func
    narrow = [d for d in (torch.float32, *LOW) if dtype and d.itemsize < dtype.itemsize]

    def fresh(x: Any) -> Any:
        if isinstance(x, Tensor):
            return _converted(x.detach().cpu(), dtype, narrow, change)
        if isinstance(x, torch.dtype) and dtype:
            return dtype if x in narrow else WIDE.get(x, x)
        if isinstance(x, torch.device):
            return torch.device("cpu")
        return x

    args, kwargs = tree_map(fresh, call.args), tree_map(fresh, call.kwargs)
    for name in written(func):  # nothing else of the program may change
        args, kwargs = _with_copy(func, args, kwargs, name)
    if dtype:
        args, kwargs = _without_half_to_float(func, args, kwargs)
    kwargs.pop("pin_memory", None)
    out = (function or references.given(func) or func)(*args, **kwargs)
    return results(func, args, kwargs, out)


def _converted(
    x: Tensor, dtype: torch.dtype | None, narrow: list[torch.dtype], change: Change | None
) -> Tensor:
    if dtype and x.dtype in narrow:
        x = x.to(dtype)
    elif dtype == torch.float64 and x.dtype in WIDE:
        x = x.to(WIDE[x.dtype])
    return change(x) if change is not None and x.is_floating_point() else x


def _with_copy(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copies an argument."""
    at = [a.name for a in func._schema.arguments].index(name)
    copy = lambda x: x.clone() if isinstance(x, Tensor) else x  # noqa: E731
    if at < len(args):
        return (*args[:at], tree_map(copy, args[at]), *args[at + 1 :]), kwargs
    return args, {n: tree_map(copy, v) if n == name else v for n, v in kwargs.items()}


def _without_half_to_float(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Takes back the request that a softmax of 16 bits gives float32: the arguments are wide."""
    names = [a.name for a in func._schema.arguments]
    if "half_to_float" not in names:
        return args, kwargs
    at = names.index("half_to_float")
    return (*args[:at], *(False for _ in args[at : at + 1]), *args[at + 1 :]), {
        n: v for n, v in kwargs.items() if n != "half_to_float"
    }


def exact(call: Call) -> Results:
    """Computes a call in float64, complex numbers as pairs."""
    return {n: _real(y) for n, y in compute(call, torch.float64).items()}


def _with_rounded_numbers(call: Call, dtype: torch.dtype) -> Call:
    """Rounds the call's numbers to `dtype`, as kernels do that convert them to their tensors'."""

    def rounded(x: Any) -> Any:
        return torch.tensor(x, dtype=dtype, device="cpu").item() if type(x) is float else x

    args, kwargs = tree_map(rounded, call.args), tree_map(rounded, call.kwargs)
    return dataclasses.replace(call, args=args, kwargs=kwargs)


def moved(seed: int, alike: str = "") -> Change:
    """Returns a change that moves every element by -1, 0 or 1 unit in float32's last place, as a
    rounding of the argument would: how far the result moves is the operator's condition. `alike`
    moves all `rows` or all `columns` in the same way: where rows are similar, a kernel rounds them
    alike, and the errors of their sums lean to one side."""
    generator = torch.Generator("cpu").manual_seed(seed)

    def change(x: Tensor) -> Tensor:
        shape = list(x.shape)
        if alike and x.ndim > 1:
            shape = [1] * (x.ndim - 1) + shape[-1:] if alike == "rows" else [*shape[:-1], 1]
        steps = torch.randint(-1, 2, shape, generator=generator, device="cpu")
        return x * (1 + statistics.EPS * steps.to(x.dtype))

    return change


def _short_logarithms(call: Call, sign: float) -> Results:
    """Returns an operator's logarithms of sums of exponentials, all of these with a relative error
    as kernels have that round them to 16 bits afterwards."""
    name = references.LOGARITHMS[call.func._schema.name]
    return {name: compute(call, torch.float64)[name] + sign * references.SHORT_EXPONENTIAL}


def variations(call: Call, dtype: torch.dtype) -> Iterator[Results]:
    """Yields the results of honest ways to compute a call whose results have this dtype: float64 on
    arguments that were moved by a rounding; sums cut in two; below float32 in float32, with rounded
    numbers or intermediates; by the host's own kernel, where it is not the one on trial. A way that
    this operator does not have is left out."""
    wide = None if dtype not in LOW else torch.float32
    steps = get_decompositions([call.func]).get(call.func)
    rounds = wide is not None and call.func._schema.name in references.HOST_ROUNDS
    own = call.device_type != "cpu" or rounds
    ways: list[Callable[[], Results]] = [
        lambda: compute(call, torch.float64, moved(1)),
        lambda: compute(call, torch.float64, moved(2)),
        *([lambda: compute(call, torch.float32)] if wide else []),
        *([lambda: compute(_with_rounded_numbers(call, dtype), torch.float32)] if wide else []),
        *([lambda: compute(call, None)] if own else []),
    ]
    by_steps = references.given(call.func) or steps
    regrouped = by_steps or call.func

    def under(mode: Any, function: Any) -> Callable[[], Results]:
        def way() -> Results:
            with mode:
                return compute(call, wide, None, function)

        return way

    ways += [under(Regrouped(seed), regrouped) for seed in (1, 2)]
    if by_steps is not None and wide:
        numel = max((t.numel() for t in call.tensors()), default=2) // 2
        ways.append(under(Rounded(dtype, numel), by_steps))
        ways += [under(Rounded(dtype, numel, seed=s), by_steps) for s in (1, 2)]
    if by_steps is not None and not wide:
        ways.append(lambda: compute(call, None, None, by_steps))
    for seed, alike in itertools.product(range(1, 5), ("rows", "columns")):
        ways.append(functools.partial(compute, call, torch.float64, moved(seed, alike)))
    if by_steps is not None:
        ways += [under(LibraryFunctions(signs), by_steps) for signs in (1.0, -1.0)]
        if wide:
            ways += [under(RoundedExponentials(dtype, n), by_steps) for n in (16, 512)]
    if any(t.dtype in LOW for t in call.tensors()):
        ways += [lambda: _short_logarithms(call, 1.0), lambda: _short_logarithms(call, -1.0)]
    for way in ways:
        try:
            yield {n: _real(y) for n, y in way().items()}
        except Exception:  # not every operator can be computed in every way
            continue
