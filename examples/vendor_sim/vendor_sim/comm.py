"""Registers the device's collective library with torch.distributed, as `simccl`. Its tensors go
through the host, where gloo sums them; those of other devices it refuses, as a vendor's does."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only


class Group(dist.ProcessGroup):
    """A process group for tensors of the device. A collective has ended when its call returns."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    def getBackendName(self) -> str:  # torch's name
        """Returns the name by which torch knows the library."""
        return "simccl"

    @property
    def group_name(self) -> str:
        """Returns the group's name in torch's tables."""
        name: str = dist.distributed_c10d._world.pg_names[self]
        return name

    @property
    def _device_types(self) -> list[torch.device]:
        """Returns where torch puts the objects that ranks exchange; nothing before the group has
        its name, because torch 2.15 then attaches a recorder, which only C++ can give a name."""
        named = self in dist.distributed_c10d._world.pg_names
        return [torch.device("sim")] if named else []

    def barrier(self, opts: Any = None) -> Any:
        """Waits for all ranks."""
        return self._gloo.barrier() if opts is None else self._gloo.barrier(opts)

    def all_gather_each(self, outputs: Any, inputs: Any, *options: Any) -> Any:
        """Gathers several tensors, one after another."""
        return [self._allgather_base(o, i) for o, i in zip(outputs, inputs, strict=True)][-1]

    def reduce_scatter_each(self, outputs: Any, inputs: Any, options: Any = None) -> Any:
        """Sums several tensors, one after another, and keeps this rank's part of each."""
        more = () if options is None else (options,)
        pairs = zip(outputs, inputs, strict=True)
        return [self._reduce_scatter_base(o, i, *more) for o, i in pairs][-1]


def _staged(name: str) -> Callable[..., Any]:
    def call(self: Group, *arguments: Any) -> Any:
        staged: list[tuple[torch.Tensor, torch.Tensor]] = []

        def on_host(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.device.type != "sim":
                raise RuntimeError(f"simccl: {name} of a tensor on {tensor.device}; move it to sim")
            staged.append((tensor, tensor.cpu()))
            return staged[-1][1]

        work = getattr(self._gloo, name)(*tree_map_only(torch.Tensor, on_host, arguments))
        work.wait()
        for tensor, host in staged:
            tensor.copy_(host)
        return work

    return call


_GLOO = (
    "allreduce allreduce_coalesced broadcast reduce allgather gather scatter reduce_scatter "
    "alltoall alltoall_base send recv _allgather_base _reduce_scatter_base"
)
for _name in _GLOO.split():
    setattr(Group, _name, _staged(_name))
_NEWER = {
    "all_gather_single": "_allgather_base",
    "reduce_scatter_single": "_reduce_scatter_base",
    "all_to_all_single": "alltoall_base",
    "all_gather_single_coalesced": "all_gather_each",
    "reduce_scatter_single_coalesced": "reduce_scatter_each",
}
_OLDER = {
    "allgather_into_tensor_coalesced": "all_gather_each",
    "reduce_scatter_tensor_coalesced": "reduce_scatter_each",
}
for _name, _same in {**_NEWER, **_OLDER}.items():
    setattr(Group, _name, getattr(Group, _same))

dist.Backend.register_backend("simccl", Group, devices=["sim"])
