"""Wrong kernels, each a formula of an op with one mistake in it; `bugs` says what they are and
where they occur.
Shapes: B batch, L queries, S keys, H heads, K kv heads, E head dim, D width, F features, N rows, V
vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from glm_core import ops
from glm_core.dispatch import Op
from glm_core.faults.variants import Arguments, Function, Gradients, Vjp, vjp
from glm_core.ops.precision import wide

F = torch.nn.functional


def through(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Rounds a value to `dtype` and back; the gradient passes."""
    return lambda x: x + (x.detach().to(dtype).to(x.dtype) - x.detach())


def ten_bits(x: Tensor) -> Tensor:
    """float32 with its mantissa cut to TF32's 10 bits (NVIDIA A100 whitepaper); the gradient
    passes."""
    cut = (x.detach().float().view(torch.int32) & ~0x1FFF).view(torch.float32)
    return x + (cut - x).detach()


def truncated(x: Tensor) -> Tensor:
    """float32 to bfloat16 towards zero: what a kernel does that stores the upper half word."""
    return (x.float().view(torch.int32) & ~0xFFFF).view(torch.float32).bfloat16()


def half_away(x: Tensor) -> Tensor:
    """float32 to bfloat16, ties away from zero."""
    return truncated((x.float().view(torch.int32) + 0x8000).view(torch.float32))


def leaning(x: Tensor) -> Tensor:
    """float32 to bfloat16, rounded up at random with a probability too large by 1/16
    (repeatable)."""
    noise = torch.randint(0, 1 << 16, x.shape, generator=torch.Generator().manual_seed(1))
    bits = x.float().view(torch.int32) + (noise + (1 << 12)).clamp(max=0xFFFF).int()
    return truncated(bits.view(torch.float32))


def rounds(op: Op, rounding: Callable[[Tensor], Tensor]) -> Function:
    """The reference in float32, its result brought to bfloat16 by `rounding`."""

    def kernel(**a: Any) -> Tensor:
        up = {k: wide(v) if k in op.differentiable and v is not None else v for k, v in a.items()}
        return rounding(op.reference(**up))

    return kernel


def inside(op: Op, dtype: torch.dtype) -> Function:
    """All arithmetic of the op in `dtype`, the result back in the caller's. For ops without integer
    arguments."""
    first = op.parameters[0]

    def kernel(**a: Any) -> Any:
        low = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in a.items()}
        with _Narrow(dtype):
            y = op.reference(**low)
        outer = a[first].dtype
        return tuple(t.to(outer) for t in y) if isinstance(y, tuple) else y.to(outer)

    return kernel


class _Narrow(torch.overrides.TorchFunctionMode):
    """Makes every `.float()` and `.to(float32)` inside give `dtype`."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].to(self.dtype)
        return func(*args, **(kwargs or {}))


def stale(op: Op, every: int) -> Function:
    """Every n-th call returns the previous call's result if the shape is the same."""
    calls = 0
    last: Tensor | None = None

    def kernel(**a: Any) -> Tensor:
        nonlocal calls, last
        right: Tensor = op.reference(**a)
        calls, before, last = calls + 1, last, right.detach()
        if calls % every or before is None or before.shape != right.shape:
            return right
        return before

    return kernel


# activations --------------------------------------------------------------------------


def gated(activation: Callable[[Tensor], Tensor], gate: int) -> Function:
    """activation(half `gate`) * the other half."""

    def kernel(x: Tensor) -> Tensor:
        halves = wide(x).chunk(2, -1)
        return (activation(halves[gate]) * halves[1 - gate]).to(x.dtype)

    return kernel


def tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def erf_gelu(x: Tensor) -> Tensor:
    return F.gelu(wide(x)).to(x.dtype)


def sigmoid_gelu(x: Tensor) -> Tensor:
    return (wide(x) * torch.sigmoid(1.702 * wide(x))).to(x.dtype)


def rough_exp(x: Tensor) -> Tensor:
    """exp with a relative error of up to 1e-4, a function of the argument's binary fraction."""
    fraction = torch.frac(x.detach() * 1.4426950408889634)
    return torch.exp(x) * (1 + 1e-4 * torch.sin(6.283185307179586 * fraction))


def rough_silu(x: Tensor) -> Tensor:
    return x / (1 + rough_exp(-x))


def half_silu(x: Tensor) -> Tensor:
    """Gradient without the derivative of the sigmoid."""
    return x * torch.sigmoid(x).detach()


def lost_last_row(tile: int) -> Function:
    """SwiGLU that leaves zeros in the last row where the rows do not fill whole tiles."""

    def kernel(x: Tensor) -> Tensor:
        y = ops.swiglu.reference(x)
        rows = y.flatten(0, -2)
        if rows.shape[0] % tile == 0:
            return y
        return torch.cat((rows[:-1], torch.zeros_like(rows[-1:]))).view_as(y)

    return kernel


# rotation -----------------------------------------------------------------------------


def one_frequency(table: Callable[[Tensor], Tensor]) -> Callable[[Arguments], Tensor]:
    """cos or sin with the angle of pair 1 too large by 1 % (of its part within a turn)."""

    def make(a: Arguments) -> Tensor:
        angle = torch.atan2(a["sin"], a["cos"])
        angle[..., 1:2] *= 1.01
        return table(angle)

    return make


def last_rows_repeat(block: int) -> Callable[[Tensor], Tensor]:
    """Rows past the last whole block of `block` use the block's last row."""
    return lambda t: t[:, torch.arange(t.shape[1]).clamp(max=t.shape[1] // block * block - 1)]


def last_pair_unrotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    keep = torch.arange(cos.shape[-1]) == cos.shape[-1] - 1
    tables = cos.masked_fill(keep, 1.0), sin.masked_fill(keep, 0.0)
    return ops.rope.reference(x, *tables, interleaved)


# linear -------------------------------------------------------------------------------


def partial_sums(dtype: torch.dtype, block: int) -> Function:
    """The sum over D in blocks, the running sum rounded to `dtype` after each."""

    def kernel(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        total = torch.zeros(*x.shape[:-1], weight.shape[0])
        for a, b in zip(wide(x).split(block, -1), wide(weight).split(block, -1), strict=True):
            total = through(dtype)(total + F.linear(a, b))
        return (total if bias is None else total + wide(bias)).to(x.dtype)

    return kernel


def repeated_row(tile: int) -> Function:
    """The last row of the last tile is a copy of the one before."""

    def kernel(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = F.linear(x, weight, bias)
        rows = y.flatten(0, -2)
        at = torch.arange(rows.shape[0])
        at[rows.shape[0] // tile * tile - 1] -= 1
        return rows[at].view_as(y)

    return kernel


def products(a: Arguments, output: Tensor, rows: slice) -> dict[str, Tensor]:
    """The reductions over rows of linear's backward, over these rows only."""
    g, x = output.flatten(0, -2)[rows], a["x"].flatten(0, -2)[rows]
    return {"weight": g.t() @ x, "bias": g.float().sum(0).to(g.dtype)}


def linear_backward(*names: str) -> Callable[[Arguments, tuple[Tensor, ...]], Gradients]:
    """Linear's gradients, the last row missing from those of `names`."""

    def gradients(a: Arguments, outputs: tuple[Tensor, ...]) -> Gradients:
        right, wrong = (products(a, outputs[0], slice(n)) for n in (None, -1))
        found = right | {n: wrong[n] for n in names} | {"x": outputs[0] @ a["weight"]}
        return found if a["bias"] is not None else found | {"bias": None}

    return gradients


def no_bias_gradient(a: Arguments, found: Gradients) -> Gradients:
    """A zero gradient for the bias, where there is one."""
    del a
    return {n: torch.zeros_like(g) for n, g in found.items() if n == "bias" and g is not None}


def stale_weight(every: int) -> Vjp:
    """Every n-th gradient of x uses the previous weight of the same shape."""
    right = vjp(ops.linear, ops.linear.reference)
    calls, last = 0, dict[torch.Size, Tensor]()

    def gradients(a: Arguments, outputs: tuple[Tensor, ...]) -> Gradients:
        nonlocal calls
        calls, weight = calls + 1, a["weight"]
        before, last[weight.shape] = last.get(weight.shape, weight), weight.detach().clone()
        found = right(a, outputs)
        return (
            found if calls % every else found | {"x": right(a | {"weight": before}, outputs)["x"]}
        )

    return gradients


# embedding ----------------------------------------------------------------------------


def overwritten(a: Arguments, outputs: tuple[Tensor, ...]) -> Gradients:
    """A row that occurs more than once keeps one of its gradients instead of their sum."""
    gradient = torch.zeros_like(a["weight"])
    gradient[a["ids"].flatten()] = outputs[0].flatten(0, -2) * a["shrink"]
    return {"weight": gradient}


def without_last_token(ids: Tensor, weight: Tensor, shrink: float) -> Tensor:
    """The last token's row receives no gradient."""
    parts = (
        ops.embedding.reference(part, w, shrink)
        for part, w in ((ids.flatten()[:-1], weight), (ids.flatten()[-1:], weight.detach()))
    )
    return torch.cat(list(parts)).unflatten(0, ids.shape)


def shrunk_value(ids: Tensor, weight: Tensor, shrink: float) -> Tensor:
    """The value is multiplied too."""
    return weight[ids] * shrink
