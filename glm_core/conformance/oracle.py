"""Computes what a case's results should be: the reference's in float64, and those of several
reference runs in the working dtype, which show how much error is honest."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.utils._python_dispatch import TorchDispatchMode

from glm_core.conformance.case import Case
from glm_core.conformance.tolerance import Allowance, allowance
from glm_core.dispatch import Op
from glm_core.faults.flash import stored_elsewhere
from glm_core.ops import attention

Results = dict[str, Tensor]
Function = Callable[..., Any]

SMALL = 4096
"""results with at most so many elements get four jittered runs, larger ones two: their many
elements are a sample of their own"""


_aten = torch.ops.aten
DECOMPOSED: dict[Any, Function] = get_decompositions(
    [
        _aten._softmax,
        _aten._softmax_backward_data,
        _aten._log_softmax,
        _aten._log_softmax_backward_data,
        _aten.gelu_backward,
        _aten.silu_backward,
    ]
)


Oracle = dict[str, Allowance]
"""what each result of a case may be, by name"""


class EagerMode(TorchDispatchMode):
    """A mode under which nothing is compiled. Torch's guard against torch.compile, left out here,
    doubles a mode's cost and imports the compiler, which takes longer than most cases."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it unannotated

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class Jitter(EagerMode):
    """Moves every float32 or float64 intermediate by -1, 0 or 1 ulp at random, as another order of
    summation or another fused instruction might. Functions of torch that cancel inside, such as
    softmax, are first decomposed: undecomposed they give an exact zero where a kernel of several
    steps leaves a rounding error."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in DECOMPOSED:
            with self:
                return DECOMPOSED[func](*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        results = out if isinstance(out, (tuple, list)) else (out,)
        for value, schema in zip(results, func._schema.returns, strict=False):
            fresh = schema.alias_info is None or schema.alias_info.is_write
            if (
                fresh
                and isinstance(value, Tensor)
                and value.dtype in (torch.float32, torch.float64)
            ):
                self._move(value)
        return out

    def _move(self, x: Tensor) -> None:
        steps = torch.randint(-1, 2, x.shape, generator=self.generator)
        moved = x * (1 + steps.to(x.dtype) * torch.finfo(x.dtype).eps)
        x.copy_(torch.where(moved.isfinite(), moved, x))


def forward(op: Op, function: Function, args: Mapping[str, Any]) -> Results:
    """Runs the function. Returns its outputs and the arguments it writes by name: `out`, `out[1]`,
    `params[0]`."""
    results = tensors_by_name("out", function(**args))
    for name in op.mutates:
        results |= tensors_by_name(name, args.get(name))
    return results


def tensors_by_name(name: str, value: Any) -> Results:
    """Returns the tensors inside a value: `name` for a tensor, `name[0]`, ... for a list; nothing
    for any other value."""
    if isinstance(value, Tensor):
        return {name: value}
    pairs = enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {k: t for i, v in pairs for k, t in tensors_by_name(f"{name}[{i}]", v).items()}


def backward(op: Op, function: Function, args: Mapping[str, Any], strided: bool) -> Results:
    """Differentiates the function for drawn output gradients. Returns the arguments' gradients by
    name, `d x`; with several outputs also for each output alone, `d x from out[1]`; and the outputs
    that are integers. `strided` makes the output gradients non-contiguous."""
    leaves: Results = {}
    args = {k: leaf(k, v, leaves) if k in op.differentiable else v for k, v in args.items()}
    results = tensors_by_name("out", function(**args))
    outputs = {k: y for k, y in results.items() if y.is_floating_point()}
    drawn = {
        k: output_gradient(i, outputs[k], strided) for i, k in enumerate(results) if k in outputs
    }
    groups = {"": list(outputs)}
    if len(outputs) > 1:
        groups |= {f" from {k}": [k] for k in outputs}
    results = {k: y for k, y in results.items() if k not in outputs}
    for suffix, names in groups.items():
        gradients = torch.autograd.grad(
            [outputs[n] for n in names],
            list(leaves.values()),
            [drawn[n] for n in names],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        results |= {f"d {k}{suffix}": g for k, g in zip(leaves, gradients, strict=True)}
    return results


def leaf(name: str, value: Any, leaves: Results) -> Any:
    """Returns the value with tensors that require gradients, and adds these tensors to `leaves` by
    name."""
    if isinstance(value, (list, tuple)):
        return [leaf(f"{name}[{i}]", v, leaves) for i, v in enumerate(value)]
    if not isinstance(value, Tensor):
        return value
    leaves[name] = value.detach().requires_grad_()
    return leaves[name]


def output_gradient(index: int, output: Tensor, strided: bool) -> Tensor:
    """Draws the gradient of an output: the same values in every dtype, a view with gaps if
    `strided`."""
    shape = (*output.shape[:-1], output.shape[-1] * 2) if output.dim() else ()
    g = torch.randn(shape, generator=torch.Generator().manual_seed(1000 + index)).bfloat16()
    g = g.to(output.dtype).to(output.device)
    g = g[..., ::2] if output.dim() else g
    return g if strided else g.contiguous()


def is_strided(args: Mapping[str, Any]) -> bool:
    """Is some argument not contiguous?"""
    tensors = (t for v in args.values() for t in tensors_by_name("", v).values())
    return any(not t.is_contiguous() for t in tensors)


def compute(case: Case, function: Function, args: Mapping[str, Any]) -> Results:
    """Runs the function on the case: returns results in test mode, gradients in grad mode."""
    if case.mode == "grad":
        return backward(case.op, function, args, is_strided(args))
    with torch.no_grad():
        return forward(case.op, function, args)


def widened(args: Mapping[str, Any]) -> dict[str, Any]:
    def widen(value: Any) -> Any:
        if isinstance(value, list):
            return [widen(v) for v in value]
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return {k: widen(v) for k, v in args.items()}


_cache: dict[tuple[Op, str, torch.dtype, str], Oracle] = {}
_latest: dict[tuple[Op, str, torch.dtype, str], Oracle] = {}
"""one entry at most: the oracle of a large shape, too large to keep them all"""


def oracle(case: Case) -> Oracle:
    """Returns the case's oracle, which is kept for the next backend or instruction set; of large
    shapes only the latest is."""
    key = (case.op, case.sample.id, case.dtype, case.mode)
    kept = _latest if case.sample.real or case.sample.large else _cache
    if key not in kept:
        _latest.clear()
        kept[key] = _compute_oracle(case)
    return kept[key]


def oracle_of(case: Case, results: Results) -> Oracle:
    """Returns the oracle of a case whose results include a choice (see Choice): it has the same
    choice. Whether the choice is honest is judged apart."""
    allowed = oracle(case)
    chosen = results.get(CHOSEN)
    if case.op.choice is None or chosen is None or _like(chosen.cpu(), allowed[CHOSEN].plain):
        return allowed
    return _compute_oracle(case, chosen.cpu())


CHOSEN = "out[0]"
"""the name of an op's choice among its results"""


def _like(a: Tensor, b: Tensor) -> bool:
    """Returns whether the choices are equal, or one is none at all: then its values say nothing."""
    return a.shape != b.shape or a.dtype != b.dtype or torch.equal(a, b)


def _compute_oracle(case: Case, chosen: Tensor | None = None) -> Oracle:
    """Computes the reference in float64, and in the working dtype: plain, then jittered. Of an op
    that chooses, all of them choose `chosen`; without it, what the plain run chooses."""
    reference = case.op.reference
    made = case.sample.make(case.dtype)
    if case.op.choice is not None:
        chosen = reference(**made)[0] if chosen is None else chosen
        reference = functools.partial(case.op.choice.given, chosen)

    def args() -> dict[str, Any]:
        return case.sample.make(case.dtype) if case.op.mutates else made

    near = [compute(case, reference, args())]
    size = max((t.numel() for t in near[0].values()), default=0)
    for seed in range(4 if size <= SMALL else 2):
        inputs = args()
        with Jitter(seed):
            near.append(compute(case, reference, inputs))
        # a flash backward reads its result, which is rounded: derived in docs/alignment.md
        if case.op is attention and case.mode == "grad" and case.dtype.itemsize < 4:
            near.append(compute(case, stored_elsewhere(seed), inputs))
    exact = compute(case, reference, widened(args()))
    return {name: allowance(y, [run[name] for run in near]) for name, y in exact.items()}
