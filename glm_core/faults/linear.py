"""Declares the wrong and benign kernels of the matrix product. Shapes: D in, F out, N rows."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from glm_core.faults import rounding
from glm_core.faults.fault import (
    BFLOAT16,
    ONLY_BFLOAT16,
    ONLY_FLOAT32,
    benign,
    fault,
    mutant,
    planted,
    stateful_fault,
)
from glm_core.faults.kernels import (
    Arguments,
    Function,
    Gradients,
    Vjp,
    changed,
    edited,
    forward_only,
    pulled,
    pulled_argument,
    vjp,
    with_gradients,
)
from glm_core.ops import linear
from glm_core.ops.precision import wide

F = torch.nn.functional


# wrong --------------------------------------------------------------------------------


def inputs(change: rounding.Edit) -> Function:
    """Returns the reference with both factors changed."""
    return changed(linear, x=lambda a: change(a["x"]), weight=lambda a: change(a["weight"]))


def accumulating(dtype: torch.dtype, block: int) -> Function:
    """Returns a kernel that sums over D in blocks and rounds the running sum to `dtype` after
    each."""

    def kernel(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        total = torch.zeros(*x.shape[:-1], weight.shape[0])
        for a, b in zip(wide(x).split(block, -1), wide(weight).split(block, -1), strict=True):
            total = rounding.through(dtype)(total + F.linear(a, b))
        return (total if bias is None else total + wide(bias)).to(x.dtype)

    return kernel


def repeated_row(tile: int) -> Function:
    """Returns a kernel that gives the last row of the last tile the values of the row before."""

    def kernel(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = F.linear(x, weight, bias)
        rows = y.flatten(0, -2)
        at = torch.arange(rows.shape[0])
        at[rows.shape[0] // tile * tile - 1] -= 1
        return rows[at].view_as(y)

    return kernel


def products(a: Arguments, output: Tensor, rows: slice) -> dict[str, Tensor]:
    """Returns the reductions over rows of the backward, over these rows only."""
    g, x = output.flatten(0, -2)[rows], a["x"].flatten(0, -2)[rows]
    return {"weight": g.t() @ x, "bias": g.float().sum(0).to(g.dtype)}


def without_last_row(name: str) -> Function:
    """Returns a kernel whose gradient of `name` misses the last row."""

    def gradients(a: Arguments, outputs: tuple[Tensor, ...]) -> Gradients:
        right, wrong = (products(a, outputs[0], slice(n)) for n in (None, -1))
        grads = right | {name: wrong[name]} | {"x": outputs[0] @ a["weight"]}
        return grads if a["bias"] is not None else grads | {"bias": None}

    return with_gradients(linear, gradients)


def no_bias_gradient(a: Arguments, grads: Gradients) -> Gradients:
    """Returns zeros for the bias, where there is one."""
    return {n: torch.zeros_like(g) for n, g in grads.items() if n == "bias" and g is not None}


def overwritten(a: Arguments, grads: Gradients) -> Gradients:
    """Writes the gradient of weight over what `.grad` holds, as a fused product with beta = 0 does
    (NVIDIA/TransformerEngine issue 545), where it should add to it."""
    weight = a["weight"]
    if not weight.is_leaf or weight.grad is None or grads["weight"] is None:
        return {}
    weight.grad.copy_(grads["weight"])
    return {"weight": None}


def wrong_beside_frozen(a: Arguments, grads: Gradients) -> Gradients:
    """Returns a gradient of x without its last column where the weight is frozen, as another path
    of a kernel may (pytorch/pytorch issue 183825)."""
    dx = grads["x"]
    if a["weight"].requires_grad or dx is None:
        return {}
    return {"x": torch.cat((dx[..., :-1], torch.zeros_like(dx[..., -1:])), -1)}


def stale_weight(every: int) -> Vjp:
    """Returns gradients of which every n-th gradient of x uses the previous weight of the same
    shape."""
    right = vjp(linear, linear.reference)
    calls, last = 0, dict[torch.Size, Tensor]()

    def gradients(a: Arguments, outputs: tuple[Tensor, ...]) -> Gradients:
        nonlocal calls
        calls, weight = calls + 1, a["weight"]
        before, last[weight.shape] = last.get(weight.shape, weight), weight.detach().clone()
        grads = right(a, outputs)
        if calls % every:
            return grads
        return grads | {"x": right(a | {"weight": before}, outputs)["x"]}

    return gradients


@mutant(linear, "partial sums of 8 products are kept in the working dtype")
def narrow_sum(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    total = torch.zeros((), dtype=x.dtype)
    for a, b in zip(x.split(8, -1), weight.split(8, -1), strict=True):
        total = total + linear.reference(a, b)
    return total if bias is None else total + bias


@mutant(linear, "the last input dimension is left out where D is odd")
def odd_dimension_lost(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    even = max(x.shape[-1] // 2 * 2, 1)
    return linear.reference(x[..., :even], weight[:, :even], bias)


@mutant(linear, "the bias is added twice")
def bias_twice(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear.reference(x, weight, None if bias is None else bias + bias)


fault(linear, "the bias is left out", changed(linear, bias=None), mutant="bias_left_out")
fault(
    linear,
    "the gradient of the bias is the mean over rows, not the sum",
    pulled_argument(linear, "bias", lambda a, g: g / max(a["x"][..., 0].numel(), 1)),
    mutant="bias_gradient_mean",
)
fault(
    linear,
    "the gradient of weight is summed in bfloat16",
    pulled_argument(linear, "weight", lambda a, g: g.bfloat16().to(g.dtype)),
    mutant="weight_gradient_bfloat16",
)
fault(
    linear,
    "float32 operands are cut to TF32's ten bits",
    inputs(rounding.ten_bits),
    mutant="tf32",
    **planted("linear-tf32", "dtype", **ONLY_FLOAT32),
)
fault(
    linear,
    "inputs are rounded to bfloat16",
    inputs(rounding.bf16),
    **planted("linear-bfloat16-inputs", "dtype", **ONLY_FLOAT32),
)
fault(
    linear,
    "the running sum is float16",
    accumulating(torch.float16, 16),
    **planted("linear-float16-accumulator", "dtype", **ONLY_FLOAT32),
)
fault(
    linear,
    "the running sum is bfloat16",
    accumulating(torch.bfloat16, 8),
    **planted("linear-bfloat16-accumulator", "dtype"),
)
fault(
    linear,
    "bfloat16 results are cut off, not rounded",
    rounding.rounds(linear, rounding.truncated),
    mutant="truncated",
    **planted("linear-truncated", "rounding", "forward", **ONLY_BFLOAT16),
)
fault(
    linear,
    "the gradient of the bias is not computed",
    edited(linear, no_bias_gradient),
    **planted("linear-no-dbias", "gradient", "backward"),
)
fault(
    linear,
    "the gradient of weight overwrites the one of the micro-batch before",
    edited(linear, overwritten),
    mutant="weight_gradient_overwritten",
)
fault(
    linear,
    "the gradient of x misses its last column where the weight is frozen",
    edited(linear, wrong_beside_frozen),
    mutant="gradient_beside_frozen",
)
for name in ("bias", "weight"):
    fault(
        linear,
        f"the gradient of {name} misses the last row",
        without_last_row(name),
        **planted(f"linear-d{name}-last-row-lost", "rows", "backward"),
    )
fault(
    linear,
    "the last row of the last tile of 64 is the one before",
    forward_only(linear, repeated_row(64)),
    **planted("linear-row-repeated", "rows", "forward"),
)
stateful_fault(
    linear,
    "every fifth gradient of x uses the previous weight of the same shape",
    lambda: with_gradients(linear, stale_weight(5)),
    **planted("linear-dx-stale-weight", "stale", "backward"),
)


# benign -------------------------------------------------------------------------------


def ordered(order: rounding.Order) -> Function:
    """Returns a kernel that sums over D in another order."""

    def kernel(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        at = order(x.shape[-1])
        return F.linear(x[..., at], weight[:, at], bias)

    return kernel


def one_after_another(parts: list[Tensor]) -> Tensor:
    return functools.reduce(torch.add, parts)


def split(
    size: Callable[[int], int], total: Callable[[list[Tensor]], Tensor] = one_after_another
) -> Function:
    """Returns a kernel that sums over D in parts of size(D), added in float32."""

    def kernel(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        parts = zip(*(wide(t).split(size(x.shape[-1]), -1) for t in (x, weight)), strict=True)
        y = total([F.linear(a, b) for a, b in parts])
        return (y if bias is None else y + wide(bias)).to(x.dtype)

    return kernel


def in_parts(number: int) -> Callable[[int], int]:
    """Returns a function from n to the size that splits n into `number` parts."""
    return lambda n: -(-n // number)


def stacked(total: rounding.Sum) -> Callable[[list[Tensor]], Tensor]:
    """Returns a function that adds partial products by `total`."""
    return lambda parts: total(torch.stack(parts, -1))[..., 0]


def transposed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x = pulled(x, torch.Tensor.contiguous)
    y = (weight @ x.flatten(0, -2).t()).t().contiguous().unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias


def separate_bias(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = F.linear(x, pulled(weight, torch.Tensor.contiguous))
    return y if bias is None else y + bias


def weight_gradient_in_parts(parts: int) -> Function:
    """Returns a kernel whose gradients of weight and bias are reduced over rows in parts, which are
    added in float32."""

    def gradients(a: Arguments, outputs: tuple[Tensor, ...]) -> Gradients:
        g, x = outputs[0].flatten(0, -2), a["x"].flatten(0, -2)
        pairs = list(zip(wide(g).chunk(parts), wide(x).chunk(parts), strict=True))
        grads: Gradients = {
            "x": outputs[0] @ a["weight"],
            "weight": one_after_another([p.t() @ q for p, q in pairs]).to(g.dtype),
        }
        if a["bias"] is not None:
            grads["bias"] = one_after_another([p.sum(0) for p, _ in pairs]).to(g.dtype)
        return grads

    return with_gradients(linear, gradients)


by_eight, by_four = (lambda n: 8), (lambda n: 4)
benign("linear-permuted", linear, "sum over D in a random order", ordered(rounding.shuffled))
benign("linear-reversed", linear, "sum over D from the end", ordered(rounding.reversed_order))
for n in (2, 3, 5, 8):
    benign(f"linear-split-{n}", linear, f"sum over D in {n} parts", split(in_parts(n)))
benign(
    "linear-pairwise",
    linear,
    "blocks of 8 added pairwise",
    split(by_eight, stacked(rounding.pairwise)),
)
benign(
    "linear-kahan",
    linear,
    "blocks of 4 added with compensation",
    split(by_four, stacked(rounding.kahan)),
)
benign("linear-float64", linear, "float64 inside", rounding.precise(linear))
benign("linear-transposed", linear, "(w x^T)^T", transposed, by_library=True)
benign(
    "linear-separate-bias", linear, "product and bias rounded apart", separate_bias, dtypes=BFLOAT16
)
for n in (2, 7):
    benign(
        f"linear-dweight-split-{n}",
        linear,
        f"gradients of weight and bias over {n} parts of the rows",
        weight_gradient_in_parts(n),
        by_library=True,
    )
