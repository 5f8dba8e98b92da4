"""Partitions parameters: each rank keeps only its rows from the moment their module is built, so
that a model larger than a rank's memory can be built (zero.Init)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from glm_core.errors import GlmCoreError
from glm_core.versions import all_gather_single

_PASSED_ON = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


class Split(Tensor):
    """A tensor with the whole parameter's shape that stores only this rank's rows. Dimension 0 is
    cut into equal parts, the last ones smaller or empty, as FSDP2 cuts it.

    An operation gathers the whole tensor while it runs, and an in-place one keeps this rank's rows
    of the result. So every operation is a collective, with the same results and random numbers as
    on a whole tensor. Views of it (weight[0]) are an error outside `gathered`."""

    part: Tensor
    """this rank's rows"""
    group: dist.ProcessGroup
    via: torch.device
    """where ranks exchange rows, wherever they keep them"""
    whole: Tensor | None
    """all rows, inside `gathered`"""

    @staticmethod
    def __new__(
        cls, part: Tensor, shape: torch.Size, group: dist.ProcessGroup, via: torch.device
    ) -> Split:
        tensor: Split = Tensor._make_wrapper_subclass(
            cls, shape, dtype=part.dtype, device=part.device
        )
        tensor.part, tensor.group, tensor.via, tensor.whole = part, group, via, None
        return tensor

    def __repr__(self) -> str:  # type: ignore[override]  # torch's has a keyword of its own
        return f"Split({tuple(self.shape)}, here {tuple(self.part.shape)})"

    def rows(self) -> slice:
        """Returns which rows of the whole this rank keeps."""
        each = -(-self.shape[0] // dist.get_world_size(self.group))
        first = dist.get_rank(self.group) * each
        return slice(min(first, self.shape[0]), min(first + each, self.shape[0]))

    @torch.no_grad()
    def gather_rows(self) -> Tensor:
        """Returns all rows. A collective of the group."""
        if self.whole is not None:
            return self.whole
        ranks = dist.get_world_size(self.group)
        each, rest = -(-self.shape[0] // ranks), self.shape[1:]
        padded = torch.zeros(each, *rest, dtype=self.part.dtype, device=self.via)
        padded[: len(self.part)] = self.part
        whole = padded.new_empty(ranks * each, *rest)
        all_gather_single(whole, padded, group=self.group)
        return whole[: self.shape[0]].to(self.part.device)

    @torch.no_grad()
    def keep(self, whole: Tensor) -> None:
        """Stores this rank's rows of `whole`."""
        self.part.copy_(whole[self.rows()])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub declares the method disabled
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PASSED_ON and args[0].whole is None:
            return Split(args[0].part, args[0].shape, args[0].group, args[0].via)
        gathered_splits: list[tuple[Split, Tensor]] = []

        def whole(value: Any) -> Any:
            if isinstance(value, Split):
                gathered_splits.append((value, value.gather_rows()))
                return gathered_splits[-1][1]
            return value

        plain = torch.utils._pytree.tree_map(whole, (args, kwargs))
        changed = list(_written(func, args, kwargs))
        view = not changed and any(r.alias_info is not None for r in func._schema.returns)
        if view and any(split.whole is None for split, _ in gathered_splits):
            shape = tuple(gathered_splits[0][0].shape)
            raise GlmCoreError(
                f"{func}: a view of a partitioned parameter of shape {shape}, whose changes would "
                "be lost; use zero.GatheredParameters(parameter, modifier_rank=0)"
            )
        result = func(*plain[0], **plain[1])
        for split in changed:
            if split.whole is None:
                split.keep(next(w for s, w in gathered_splits if s is split))
        return args[0] if isinstance(result, Tensor) and result is plain[0][0] else result


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> Iterator[Split]:
    """Yields the arguments that the operation changes in place, also those in lists and `out=`."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            leaves = torch.utils._pytree.tree_leaves(value)
            yield from (v for v in leaves if isinstance(v, Split))


def broadcast_(values: Tensor, source: int, group: dist.ProcessGroup, via: torch.device) -> None:
    """Sets a tensor on every rank to that of rank `source`; it travels through the device `via`."""
    sent = values.to(via)
    dist.broadcast(sent, source, group)
    if sent is not values:
        values.copy_(sent)


def split(param: nn.Parameter, group: dist.ProcessGroup, via: torch.device) -> nn.Parameter:
    """Returns `param` partitioned, with the values of the group's first rank. A collective."""
    values = param.detach()
    broadcast_(values, dist.get_global_rank(group, 0), group, via)
    partitioned = Split(values[:0], values.shape, group, via)
    partitioned.part = values[partitioned.rows()].clone()
    return nn.Parameter(partitioned, param.requires_grad)


def split_module(module: nn.Module, group: dist.ProcessGroup, via: torch.device) -> None:
    """Partitions every plain parameter inside, in place; scalars, which cannot be cut, stay
    whole, and DTensors are cut already. via: the device over which the group communicates."""
    new: dict[nn.Parameter, nn.Parameter] = {}
    for owner in module.modules():
        for name, p in owner._parameters.items():
            if p is not None and not isinstance(p, Split | DTensor) and p.ndim:
                if p not in new:
                    new[p] = split(p, group, via)
                    new[p].__dict__.update(p.__dict__)
                owner._parameters[name] = new[p]


def join_module(module: nn.Module) -> dict[nn.Parameter, nn.Parameter]:
    """Makes every partitioned parameter inside whole on every rank, in place. Returns the new
    parameters by the old ones. A collective."""
    new: dict[nn.Parameter, nn.Parameter] = {}
    for owner in module.modules():
        for name, p in owner._parameters.items():
            if isinstance(p, Split):
                if p not in new:
                    new[p] = nn.Parameter(p.gather_rows().clone(), p.requires_grad)
                owner._parameters[name] = new[p]
    return new


@contextmanager
def gathered(params: Iterable[Split], modifier: int | None) -> Iterator[None]:
    """Gathers parameters for the block, in which operations see whole tensors and may make views of
    them. Afterwards each rank keeps its rows of the values of rank `modifier` (a rank of the whole
    job); with None changes are discarded."""
    chosen = [p for p in params if p.whole is None]
    for p in chosen:
        p.whole = p.gather_rows().clone()
    try:
        yield
    finally:
        for p in chosen:
            whole, p.whole = p.whole, None
            assert whole is not None
            if modifier is not None:
                broadcast_(whole, modifier, p.group, p.via)
                p.keep(whole)


def move_(module: nn.Module, device: torch.device) -> None:
    """Moves the module to the device as `module.to` does; of partitioned parameters only the
    rows."""
    if not any(isinstance(p, Split) for p in module.parameters()):
        module.to(device)
        return
    for owner in module.modules():
        for tensor in (*owner._parameters.values(), *owner._buffers.values()):
            if isinstance(tensor, Split):
                tensor.part = tensor.part.to(device)
            elif tensor is not None:
                tensor.data = tensor.data.to(device)


@torch.no_grad()
def round_(module: nn.Module, dtype: torch.dtype) -> None:
    """Rounds floating-point parameters to values that `dtype` can hold; they keep their own
    dtype."""
    for p in module.parameters():
        values = p.part if isinstance(p, Split) else p
        if values.is_floating_point():
            values.copy_(values.to(dtype))


def to_meta(module: nn.Module) -> dict[nn.Parameter, nn.Parameter]:
    """Replaces partitioned parameters inside by float32 ones of the whole shape without storage,
    which FSDP2 then cuts. Returns the new parameters by the old ones."""
    new: dict[nn.Parameter, nn.Parameter] = {}
    for owner in module.modules():
        for name, p in owner._parameters.items():
            if isinstance(p, Split):
                if p not in new:
                    dtype = torch.float32 if p.is_floating_point() else p.dtype
                    empty = torch.empty(p.shape, dtype=dtype, device="meta")
                    new[p] = nn.Parameter(empty, p.requires_grad)
                    new[p].__dict__.update(
                        {k: v for k, v in p.__dict__.items() if k not in Split.__annotations__}
                    )
                owner._parameters[name] = new[p]
    return new
