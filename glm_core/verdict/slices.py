"""Takes a random part of a large call: rows of the results with the rows of the arguments that they
depend on, columns of a product, or elements of lists of tensors, where the operator allows it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from glm_core.verdict import lists
from glm_core.verdict.oracle import Call, Results

LARGE = 1 << 21
"""results of more elements are judged by rows of about so many"""
ROWS_OF = {
    "aten::mm": (0,),
    "aten::addmm": (0, 1),
    "aten::bmm": (0, 1),
    "aten::baddbmm": (0, 1, 2),
    "aten::convolution": (0,),
    "aten::embedding": (1,),
    "aten::_scaled_dot_product_flash_attention_for_cpu": (0, 1, 2),
}
"""by operator: the arguments whose rows (first dimension) give the rows of the results; those that
are broadcast stay whole"""
COLUMNS_OF = {"aten::mm": (1,), "aten::addmm": (0, 2)}
"""by operator: the arguments whose last dimension gives the columns of the results"""
NOT_OVER_FIRST = {
    "aten::_softmax": 1,
    "aten::_log_softmax": 1,
    "aten::_softmax_backward_data": 2,
    "aten::_log_softmax_backward_data": 2,
}
"""operators along one dimension, by the argument that names it"""


def divisible(call: Call) -> bool:
    """Says whether rows of this call can be judged alone."""
    name, func = call.func._schema.name, call.func
    if name in NOT_OVER_FIRST:
        tensor, dim = call.args[0], call.args[NOT_OVER_FIRST[name]]
        return bool(tensor.ndim > 1 and dim % tensor.ndim)
    if name == "aten::native_layer_norm":
        return bool(call.args[0].ndim > len(call.args[1]))
    if lists.elementwise(call):
        return True
    single = not any(isinstance(a, list) for a in call.args)
    return name in ROWS_OF or (torch.Tag.pointwise in func.tags and single)


def part(call: Call, actual: Results, seed: int, most: int = 0) -> tuple[Call, Results]:
    """Returns the call and its results, or a random part of them with about `most` elements (0:
    LARGE) in each result, where the operator allows it."""
    most = most or LARGE
    if lists.elementwise(call):
        return lists.some(call, actual, seed, most)
    largest = max(actual.values(), key=Tensor.numel, default=None)
    if largest is None or largest.numel() <= most or not divisible(call):
        return call, actual
    rows = largest.shape[0]
    taken = max(most // max(largest[0].numel(), 1), 1)
    if any(y.ndim == 0 or y.shape[0] != rows for y in actual.values() if y.numel()):
        return call, actual
    index = _drawn(rows, taken, seed)
    name = call.func._schema.name
    which = ROWS_OF.get(name)
    dims = largest.ndim - (name == "aten::embedding")

    def cut(x: Any) -> Any:
        if isinstance(x, Tensor) and x.ndim == dims and x.shape[0] == rows:
            return x.index_select(0, index.to(x.device))
        return x  # one row for all, or no rows

    args = tuple(cut(a) if which is None or i in which else a for i, a in enumerate(call.args))
    kwargs = tree_map(cut, call.kwargs) if which is None else call.kwargs
    results = {n: y.index_select(0, index) if y.numel() else y for n, y in actual.items()}
    return dataclasses.replace(call, args=args, kwargs=kwargs), results


def _drawn(size: int, taken: int, seed: int) -> Tensor:
    """Returns so many numbers below `size`, drawn at random and sorted."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randperm(size, generator=generator, device="cpu")[:taken].sort().values


def columns(call: Call, actual: Results, seed: int, most: int) -> tuple[Call, Results]:
    """Returns a matrix product and its result, or random columns of them where the second factor
    has more than `most` elements."""
    which = COLUMNS_OF.get(call.func._schema.name, ())
    if not which or call.args[which[-1]].numel() <= most:
        return call, actual
    inner, width = call.args[which[-1]].shape
    index = _drawn(width, max(most // inner, 1), seed)

    def cut(x: Tensor) -> Tensor:
        return x.index_select(-1, index.to(x.device)) if x.shape[-1] == width else x

    args = tuple(cut(a) if i in which else a for i, a in enumerate(call.args))
    results = {n: y.index_select(-1, index) for n, y in actual.items()}
    return dataclasses.replace(call, args=args), results


def too_large(call: Call, most: int) -> bool:
    """Says whether a call has a tensor of more than `most` elements and cannot be divided."""
    large = any(t.numel() > most for t in call.tensors())
    return large and not divisible(call)
