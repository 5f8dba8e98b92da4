"""Applies ZeRO 3 by FSDP2: every rank keeps its rows of each parameter, on the device or in main
memory (Rajbhandari et al. 2020, section 5; Ren et al. 2021)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from glm_core.distributed.precision import Precision
from glm_core.distributed.split import Split, to_meta
from glm_core.errors import ConfigError
from glm_core.training.offload import has_streams
from glm_core.training.optimizer import own_part
from glm_core.versions import lack_of


def shard_parameters(
    module: nn.Module,
    mesh: DeviceMesh,
    *,
    divide: float,
    precision: Precision = Precision(),  # noqa: B008
    blocks: Sequence[nn.Module] | None = None,
    reshard_after_forward: bool = True,
    merge_below: int = 0,
    on_host: bool = False,
    pin: bool = False,
) -> dict[nn.Parameter, nn.Parameter]:
    """Applies ZeRO 3 in place: FSDP2 over the data-parallel mesh (1-D, or 2-D replicate x shard).
    The module's parameters become float32 DTensor shards, which are the masters. `blocks` (None:
    see `default_blocks`) are gathered one at a time, in `precision.compute`. Gradients are sums
    over ranks / divide, in float32. Micro-batches accumulate in the shards. Blocks whose parameters
    all have at most `merge_below` elements are gathered in one collective with what is in no block.
    on_host: shards and their gradients are in main memory, from where a block is copied to the
    device before it is gathered; the module may be there too. pin: they are page-locked, where the
    device has streams. Returns the new parameters, which the optimizer must take, by the old
    ones."""
    old = dict(nn.Module.named_parameters(module))
    split = to_meta(module)
    for p in old.values():
        if p not in split and p.is_floating_point() and p.dtype != torch.float32:
            p.data = p.data.float()
    policy = MixedPrecisionPolicy(
        param_dtype=precision.compute if precision.low else None,
        reduce_dtype=precision.reduce,
        cast_forward_inputs=precision.low,
    )
    device = torch.device(mesh.device_type)
    place = CPUOffloadPolicy(pin_memory=pin and has_streams(device)) if on_host else OffloadPolicy()
    every = default_blocks(module) if blocks is None else blocks
    large = [b for b in every if any(p.numel() > merge_below for p in b.parameters())]
    if on_host:
        _copy_to(device, [m._buffers for m in module.modules()])
    for block in (*large, module):
        if on_host:  # FSDP2 wants a block on the device, where it stays until it is cut
            _copy_to(device, [m._parameters for m in block.modules()])
        fully_shard(
            block,
            mesh=mesh,
            mp_policy=policy,
            offload_policy=place,
            reshard_after_forward=reshard_after_forward,
        )
    sum_gradients(module, divide)
    if split:
        home = torch.device("cpu") if on_host else device
        module._apply(lambda t: torch.empty_like(t, device=home) if t.is_meta else t)
        _fill(module, old)
    return {p: module.get_parameter(name) for name, p in old.items()}


def _copy_to(device: torch.device, tables: Iterable[dict[str, Any]]) -> None:
    """Replaces a module's whole tensors by copies on the device."""
    copies: dict[Tensor, Tensor] = {}
    for table in tables:
        for name, tensor in table.items():
            if tensor is None or tensor.is_meta or isinstance(tensor, DTensor):
                continue
            if tensor not in copies:
                copy = tensor.detach().to(device)
                if isinstance(tensor, nn.Parameter):
                    copy = nn.Parameter(copy, tensor.requires_grad)
                    copy.__dict__.update(tensor.__dict__)
                copies[tensor] = copy
            table[name] = copies[tensor]


def _fill(module: nn.Module, old: dict[str, nn.Parameter]) -> None:
    """Copies the rows that each rank kept of partitioned parameters into FSDP2's shards."""
    with torch.no_grad():
        for name, p in old.items():
            if isinstance(p, Split):
                own_part(module.get_parameter(name)).copy_(p.part)


def lack() -> str:
    """Returns why this torch cannot do the ZeRO stages that are built on FSDP, or ""."""
    return lack_of("fsdp_sums", "ZeRO on FSDP")


def sum_gradients(module: nn.Module, divide: float) -> None:
    """Makes the gradients of every FSDP2 module inside sums over the ranks / divide. Raises
    ConfigError where torch is too old for it."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            if reason := lack():
                raise ConfigError(reason)
            # gloo has no PREMUL_SUM; sum, then divide, is the same everywhere
            part.set_force_sum_reduction_for_comms(True)
            part.set_gradient_divide_factor(divide)


def default_blocks(module: nn.Module) -> list[nn.Module]:
    """Returns the layers of the outermost nn.ModuleLists that share no parameter with other layers
    (FSDP2 cannot share one between blocks)."""
    users: dict[nn.Parameter, int] = {}
    for _, p in nn.Module.named_parameters(module, remove_duplicate=False):
        users[p] = users.get(p, 0) + 1
    blocks: list[nn.Module] = []
    lists = [(n, m) for n, m in module.named_modules() if isinstance(m, nn.ModuleList)]
    for name, layers in lists:
        if any(name.startswith(outer + ".") for outer, m in lists if m is not layers):
            continue
        for layer in layers:
            own = list(layer.parameters())
            runs = type(layer).forward is not nn.Module.forward  # FSDP2 refuses an nn.ModuleDict
            if own and runs and all(users[p] == 1 for p in own):
                blocks.append(layer)
    return blocks


def whole(shards: DTensor, rows: Tensor | None = None) -> Tensor:
    """Returns all elements, on the mesh's device, wherever the shards are. rows: this rank's part
    of another tensor that is cut in the same way, in place of the shards' own. A collective."""
    mesh = shards.device_mesh
    own = shards.to_local() if rows is None else rows
    return DTensor.from_local(
        own.to(mesh.device_type),
        mesh,
        shards.placements,
        run_check=False,
        shape=shards.shape,
        stride=shards.stride(),
    ).full_tensor()
