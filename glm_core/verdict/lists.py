"""Takes random elements of every tensor of a call on lists, as foreach and fused optimizers are:
each element of a result depends on the elements at the same place only."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from glm_core.verdict.oracle import Call, Results, argument, written

LISTS = ("aten::_foreach_", "aten::_fused_adam", "aten::_fused_sgd", "aten::_fused_adagrad")
REDUCE = ("aten::_foreach_norm", "aten::_foreach_max", "aten::_foreach_powsum")
"""those of them that give one number for each tensor"""


def elementwise(call: Call) -> bool:
    """Says whether the call is on lists, element by element."""
    name = call.func._schema.name
    return name.startswith(LISTS) and not name.startswith(REDUCE)


def some(call: Call, actual: Results, seed: int, most: int) -> tuple[Call, Results]:
    """Returns the call and its results for about `most` of the elements, the last one of every
    tensor among them; all where they are fewer."""
    lists = [a for a in (*call.args, *call.kwargs.values()) if _of_tensors(a)]
    longest = max((len(a) for a in lists), default=0)
    columns = zip(*(a for a in lists if len(a) == longest), strict=True)
    sizes = [max(t.numel() for t in column) for column in columns]
    if sum(sizes) <= most:
        return call, actual
    generator = torch.Generator("cpu").manual_seed(seed)
    shares = [most * n // sum(sizes) for n in sizes]
    taken = [_drawn(n, k, generator) if n else None for n, k in zip(sizes, shares, strict=True)]

    def cut(x: Tensor, i: int) -> Tensor:
        index = taken[i]
        if index is None or x.numel() != sizes[i]:  # empty, or the number of a step
            return x
        return x.reshape(-1)[index.to(x.device)]

    def cut_list(a: Any) -> Any:
        fits = _of_tensors(a) and len(a) == longest
        return [cut(x, i) for i, x in enumerate(a)] if fits else a

    results: Results = {}
    for name, y in actual.items():
        wrote = name in written(call.func)
        own: Any = argument(call.func, call.args, call.kwargs, name) if wrote else None
        own_sizes = [t.numel() for t in own] if _of_tensors(own) else sizes
        if y.numel() != sum(own_sizes) or len(own_sizes) != longest:
            return call, actual
        parts = torch.split_with_sizes(y, own_sizes)
        results[name] = torch.cat([cut(part, i) for i, part in enumerate(parts)])
    args = tuple(cut_list(a) for a in call.args)
    kwargs = {n: cut_list(a) for n, a in call.kwargs.items()}
    return dataclasses.replace(call, args=args, kwargs=kwargs), results


def _of_tensors(x: Any) -> bool:
    return isinstance(x, list) and bool(x) and all(isinstance(t, Tensor) for t in x)


def _drawn(size: int, count: int, generator: torch.Generator) -> Tensor:
    """Returns places in a tensor that has some, sorted, the last one among them."""
    index = torch.randint(0, size, (count,), generator=generator, device="cpu")
    return torch.cat([index, torch.tensor([size - 1])]).unique()
