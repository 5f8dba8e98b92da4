"""Takes a random part of a large call: rows of the results with the rows of the arguments that they
depend on, where the operator allows it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from glm_core.verdict.oracle import Call, Results

LARGE = 1 << 22
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
    single = not any(isinstance(a, list) for a in call.args)
    return name in ROWS_OF or (torch.Tag.pointwise in func.tags and single)


def part(call: Call, actual: Results, seed: int) -> tuple[Call, Results]:
    """Returns the call and its results, or random rows of them where they are large and the
    operator allows it."""
    largest = max(actual.values(), key=Tensor.numel, default=None)
    if largest is None or largest.numel() <= LARGE or not divisible(call):
        return call, actual
    rows = largest.shape[0]
    taken = max(LARGE // max(largest[0].numel(), 1), 1)
    if any(y.ndim == 0 or y.shape[0] != rows for y in actual.values() if y.numel()):
        return call, actual
    generator = torch.Generator("cpu").manual_seed(seed)
    index = torch.randperm(rows, generator=generator, device="cpu")[:taken].sort().values
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


def too_large(call: Call, most: int) -> bool:
    """Says whether a call has a tensor of more than `most` elements and cannot be divided."""
    large = any(t.numel() > most for t in call.tensors())
    return large and not divisible(call)
