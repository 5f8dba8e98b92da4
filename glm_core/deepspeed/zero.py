"""`deepspeed.zero`: construction and whole views of partitioned parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from glm_core.deepspeed.settings import say_once


@contextmanager
def Init(*args: Any, enabled: bool = True, **kwargs: Any) -> Iterator[None]:
    """A model built inside is built whole on every rank; `initialize` partitions it."""
    if enabled:
        say_once(
            "zero.Init has no effect: the model is built whole in host memory on every rank and "
            "partitioned by initialize"
        )
    yield


@contextmanager
def GatheredParameters(
    params: nn.Parameter | Iterable[nn.Parameter], modifier_rank: int | None = None,
    fwd_module: nn.Module | None = None, enabled: bool = True,
) -> Iterator[None]:  # fmt: skip
    """Inside, the module's attributes are the whole tensors (parameters that a script holds stay
    DTensors, whole in shape). Changes last only with modifier_rank: that rank's values become
    everybody's."""
    chosen = [params] if isinstance(params, Tensor) else list(params)
    parted = [p for p in chosen if enabled and isinstance(p, DTensor)]
    whole = [nn.Parameter(p.full_tensor().detach(), p.requires_grad) for p in parted]
    versions = [w._version for w in whole]
    for p, full in zip(parted, whole, strict=True):
        _show(p, full)
    try:
        yield
    finally:
        for p, full, version in zip(parted, whole, versions, strict=True):
            _show(p, p)
            if modifier_rank is not None:
                _adopt(p, full.detach(), full._version != version, modifier_rank)


def _show(param: Tensor, value: Tensor) -> None:
    """`value` as the module's attribute wherever `param` is one."""
    engine, wanted = param.glm_core_place  # type: ignore[attr-defined]  # the engine set it
    for name, found in engine.aliases.items():
        if found == wanted:
            owner, _, leaf = name.rpartition(".")
            engine.module.get_submodule(owner)._parameters[leaf] = value


@torch.no_grad()
def _adopt(param: Tensor, values: Tensor, changed: bool, rank: int) -> None:
    assert isinstance(param, DTensor)
    told = torch.tensor(float(changed), device=values.device)
    dist.broadcast(told, rank)
    if told:
        dist.broadcast(values, rank)
        shard = distribute_tensor(values, param.device_mesh, param.placements)
        param.to_local().copy_(shard.to_local())
