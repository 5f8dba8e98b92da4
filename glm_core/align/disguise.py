"""Runs a reference differently and just as honestly: in another summation order, with float64
inside, or with intermediates rounded once more. What these disguises show is what a kernel may
do."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, fallthrough_kernel
from torch.utils._pytree import tree_map

from glm_core.conformance.oracle import EagerMode

aten = torch.ops.aten

_LOW = (torch.bfloat16, torch.half)
_ARITHMETIC = {
    aten.mm,
    aten.addmm,
    aten.bmm,
    aten.baddbmm,
    aten.sum,
    aten.mean,
    aten.add,
    aten.sub,
    aten.mul,
    aten.div,
    aten.embedding_dense_backward,
}
_KEPT = {aten._log_softmax.default, aten._to_copy.default}
"""what is never rounded once more, as no view is"""
_IN_PARTS = {aten.addmm.default, aten.mm.default, aten.sum.dim_IntList}
"""what may be rounded inside"""
_UNCHANGED = (
    *("view", "t", "transpose.int", "permute", "detach", "alias", "expand", "unsqueeze"),
    *("squeeze.dim", "squeeze.dims", "slice.Tensor", "select.int", "split.Tensor", "narrow"),
    *("split_with_sizes", "unbind.int", "as_strided", "_reshape_alias", "_to_copy"),
    *("empty_strided", "empty.memory_format", "empty_like", "copy_", "fill_.Scalar", "zero_"),
)
"""views and conversions, and what torch computes them with: more than half of a step's calls"""
_ELEMENTWISE = (
    *("mul.Tensor", "mul.Scalar", "add.Tensor", "add_.Tensor", "sub.Tensor", "div.Tensor"),
    *("div.Scalar", "neg", "rsqrt", "pow.Tensor_Scalar", "clone", "cat", "_unsafe_view"),
    "to.dtype",
)
"""what another order of sums leaves alone, too"""


@contextmanager
def unchanged_unseen(dtype: torch.dtype) -> Iterator[None]:
    """Keeps from every mode of the process, inside the block, operators that a control of this
    dtype leaves unchanged: torch then calls no Python for them, and the results have the same bits.
    The block must be a whole run, for torch's table of kernels is changed and changed back."""
    library = Library("aten", "IMPL")
    for name in (*_UNCHANGED, *(() if dtype in _LOW else _ELEMENTWISE)):
        library.impl(name, fallthrough_kernel, "Python")
    try:
        yield
    finally:
        del library  # with it go its kernels


def widened(value: Any, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> Any:
    """Converts tensors of these dtypes to float64, in nested containers too; returns everything
    else unchanged."""
    change = lambda x: x.double() if isinstance(x, Tensor) and x.dtype in dtypes else x  # noqa: E731
    return tree_map(change, value)


class Exact(EagerMode):
    """Computes every float32 intermediate in float64. Roundings to a dtype below float32 stay,
    because the op's contract asks for them; with `values_only` the rounded values are kept in
    float64, so that their gradients are not rounded. The caller must widen float32 arguments
    (`widened`)."""

    def __init__(self, values_only: bool = False) -> None:
        super().__init__()
        self.values_only = values_only

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") == torch.float32:
            kwargs["dtype"] = torch.float64
        rounds = func is aten._to_copy.default and kwargs.get("dtype") in _LOW
        if self.values_only and rounds and args[0].requires_grad:  # gradients themselves do not
            return func(*args, **kwargs).double()
        if func.overloadpacket not in _ARITHMETIC:
            return func(*args, **kwargs)
        floats = [x for x in args if isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 0]
        low = [x for x in floats if x.dtype in _LOW]
        if not low or len(low) < len(floats):
            return func(*args, **kwargs)
        return func(*widened(args, (low[0].dtype,)), **kwargs).to(low[0].dtype)


class Regrouped(EagerMode):
    """Cuts every sum and matrix product in two at a random place and adds the parts."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = random.Random(seed)

    def cut(self, n: int) -> int:
        """Returns a random place strictly between 0 and n, for n > 1."""
        return self.random.randrange(1, n)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Returns a @ b in the inputs' dtype, accumulated in float32 at least."""
        dtype = a.dtype
        if dtype in _LOW:
            a, b = a.float(), b.float()
        if a.shape[-1] < 2:
            return (a @ b).to(dtype)
        k = self.cut(a.shape[-1])
        return (a[..., :k] @ b[..., :k, :]).add_(a[..., k:] @ b[..., k:, :]).to(dtype)

    def total(self, func: Any, x: Tensor, dims: Any, *rest: Any, **kwargs: Any) -> Any:
        """Returns a sum or mean in another order: its longest dimension is cut in two and the parts
        swapped."""
        dim = max(dims or range(x.ndim), key=lambda d: x.shape[d])
        n = x.shape[dim]
        return func(x.roll(self.cut(n), dim) if n > 1 else x, dims, *rest, **kwargs)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (aten.mm.default, aten.bmm.default):
            return self.product(*args)
        if func is aten.addmm.default and not kwargs:
            bias, a, b = args
            wide = torch.promote_types(a.dtype, torch.float32)
            return self.product(a.to(wide), b.to(wide)).add_(bias).to(a.dtype)
        if func in (aten.sum.dim_IntList, aten.mean.dim) and args[0].is_floating_point():
            return self.total(func, *args, **kwargs)
        return func(*args, **kwargs)


class Rounded(EagerMode):
    """Rounds intermediate number `which` (None: all) to `dtype` once more; with `seed` three of
    four, drawn at random. Intermediates are float32 tensors of at least `numel` elements, because a
    row's statistics and the loss are float32 by contract; inside a product with a weight, or a sum
    over its rows, they are its two halves, or the product before the bias."""

    def __init__(
        self, dtype: torch.dtype, numel: int, which: int | None = None, seed: int | None = None
    ) -> None:
        super().__init__()
        self.dtype, self.numel, self.which = dtype, numel, which
        self.seen = 0
        """number of intermediates that rounding would have changed"""
        self.random = None if seed is None else random.Random(seed)

    def chosen(self) -> bool:
        """Counts one more intermediate. Is it to be rounded?"""
        self.seen += 1
        if self.random is not None:
            return self.random.random() < 0.75
        return self.which in (None, self.seen - 1)

    def rounded(self, x: Tensor) -> Tensor:
        """Returns x with every value rounded, in its own dtype."""
        return x.to(self.dtype).to(x.dtype)

    def round(self, x: Tensor) -> Tensor:
        """Rounds every value of x, which nobody else holds, in place: a third less time. Returns
        x."""
        return x.copy_(x.to(self.dtype))

    def in_parts(self, func: Any, args: Any) -> Callable[[], Tensor] | None:
        """Returns a product with a weight, or a sum over its rows, with a rounding inside; None for
        any other function. Attention's products are batched: they are intermediates themselves."""
        if func is aten.addmm.default:
            bias, a, b = args
            return lambda: self.round(a @ b).add_(bias)
        if func is aten.mm.default and args[0].shape[-1] > 1:
            a, b = args
            k = a.shape[-1] // 2
            return lambda: self.round(a[:, :k] @ b[:k]).add_(self.round(a[:, k:] @ b[k:]))
        if func is aten.sum.dim_IntList and args[0].ndim == 2 and list(args[1]) == [0]:
            top, bottom = args[0].tensor_split(2)
            return lambda: self.round(top.sum(*args[1:])).add_(self.round(bottom.sum(*args[1:])))
        return None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.is_view or func in _KEPT:
            return func(*args, **(kwargs or {}))
        in_parts = self.in_parts(func, args) if func in _IN_PARTS and not kwargs else None
        if in_parts is not None:
            return in_parts() if self.chosen() else func(*args)
        out = func(*args, **(kwargs or {}))
        if not isinstance(out, Tensor) or out.dtype != torch.float32 or out.numel() < self.numel:
            return out
        if self.random is not None:
            if not self.chosen():
                return out
            written = func._schema.returns[0].alias_info is not None  # others hold it
            return self.rounded(out) if written else self.round(out)
        rounded = self.rounded(out)
        return out if torch.equal(rounded, out) or not self.chosen() else rounded
