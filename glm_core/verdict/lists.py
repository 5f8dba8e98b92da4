"""Takes some of the tensors of a call whose arguments are lists, as those of foreach and fused
optimizers are: list element i of the results depends on element i of the arguments only."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from glm_core.verdict.oracle import Call, Results, argument, written


def elementwise(call: Call) -> bool:
    """Says whether the call is on lists, element by element."""
    name = call.func._schema.name
    return name.startswith(("aten::_foreach_", "aten::_fused_adam", "aten::_fused_sgd"))


def some(call: Call, actual: Results, seed: int, most: int) -> tuple[Call, Results]:
    """Returns the call and its results for a random part of the list's elements that has about
    `most` tensor elements; at least one, all where they are fewer."""
    lists = [a for a in (*call.args, *call.kwargs.values()) if _of_tensors(a)]
    sizes = [t.numel() for t in max(lists, key=len, default=[])]
    if len(sizes) < 2 or sum(sizes) <= most:
        return call, actual
    order = torch.randperm(len(sizes), generator=torch.Generator("cpu").manual_seed(seed)).tolist()
    taken: list[int] = []
    for i in order:
        if not taken or sum(sizes[j] for j in taken) + sizes[i] <= most:
            taken.append(i)
    taken.sort()

    def cut(x: Any) -> Any:
        return [x[i] for i in taken] if isinstance(x, list) and len(x) == len(sizes) else x

    results: Results = {}
    for name, y in actual.items():
        own: Any = None
        if name in written(call.func):
            own = argument(call.func, call.args, call.kwargs, name)
        parts = _parts(y, [t.numel() for t in own] if _of_tensors(own) else sizes)
        if parts is None:
            return call, actual
        results[name] = torch.cat([parts[i] for i in taken])
    args = tuple(cut(a) for a in call.args)
    kwargs = {n: cut(a) for n, a in call.kwargs.items()}
    return dataclasses.replace(call, args=args, kwargs=kwargs), results


def _of_tensors(x: Any) -> bool:
    return isinstance(x, list) and bool(x) and all(isinstance(t, Tensor) for t in x)


def _parts(y: Tensor, sizes: list[int]) -> Sequence[Tensor] | None:
    """Returns the parts of a flat result that belong to the list's elements; None where unclear."""
    if y.ndim == 1 and y.numel() == sum(sizes):
        return torch.split_with_sizes(y, sizes)
    return list(y.reshape(-1, 1)) if y.ndim == 1 and y.numel() == len(sizes) else None
