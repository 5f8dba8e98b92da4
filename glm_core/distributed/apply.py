"""Turns a plan into modules, here alone and in this order:

1. pipeline: each stage holds its layers of the one model;
2. tensor, sequence and expert parallel: a layer's matrices have a rank's size, and its
   projections, or the rows of its experts, communicate;
3. recompute: which parts of a stage are not kept for the backward pass;
4. device and dtype: parameters get memory here, not before (under ZeRO layer by layer), and no
   values yet;
5. ZeRO: what is left is shared out over the data-parallel ranks, experts over those of them that
   hold the same ones;
6. values: from (seed, name), the same as on one process.

The reverse order would be wrong: ZeRO shares out what tensor parallelism left of a matrix, and
recompute must wrap the collectives too."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from glm_core.config import ModelConfig
from glm_core.distributed import layout
from glm_core.distributed.fsdp import sum_gradients
from glm_core.distributed.pipeline import Stage
from glm_core.distributed.plan import Plan, at_both_ends, stages_of
from glm_core.distributed.tensor_parallel import Ranks
from glm_core.model.glm import GLM, Block, Experts, Router
from glm_core.model.initial import initial_value

Source = Callable[[str, layout.Splits], Tensor]
"""returns a rank's part of a parameter, given its name in the whole model"""


class Share(nn.ModuleList):
    """The stages one process holds, as one module whose parameters have the whole model's names."""

    def __init__(self, stages: list[Stage]) -> None:
        super().__init__(stages)
        self.stages = stages

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields the parameters of all stages; one that two stages share is named once."""
        named: dict[str, nn.Parameter] = {}
        for stage in self.stages:
            named.update(stage.named_parameters(*args, **kwargs))
        return iter(named.items())


def build(
    config: ModelConfig,
    plan: Plan,
    mesh: DeviceMesh,
    experts: DeviceMesh | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Share:
    """Returns this process's stages under the plan, with memory but without values. Nothing of the
    size of the whole model is ever allocated; under FakeTensorMode nothing is. experts: the mesh
    that `mesh.make_for_experts` made."""
    ranks = Ranks(mesh.get_group("tp"), plan.sp) if plan.tp > 1 else None
    stages = []
    for number in stages_of(plan, mesh.get_local_rank("pp")):
        group = experts.get_group("ep") if experts is not None else None
        stage = Stage(config, number, plan.stages, ranks, group)
        stage.recompute(plan.recompute)
        if plan.zero:
            copies = experts["expert_dp"] if experts is not None else None
            shard(stage, plan.zero, mesh["dp"], copies, device, dtype)
        else:
            give_memory(stage, device, dtype)
        stages.append(stage)
    first, last = stages[0], stages[-1]
    if first is not last and first.is_first and last.is_last:
        for name in at_both_ends(config):  # both ends of a V in one process: one parameter
            setattr(last, name, getattr(first, name))
    return Share(stages)


def give_memory(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Replaces parameters on the meta device by uninitialised ones; a router's bias is float32 at
    least. Does what nn.Module.to_empty does, which fails under FakeTensorMode."""
    for part in module.modules():
        for name, p in list(part.named_parameters(recurse=False)):
            if p.is_meta:
                is_bias = isinstance(part, Router) and name == "bias"
                own = torch.promote_types(dtype, torch.float32) if is_bias else dtype
                memory = torch.empty(p.shape, dtype=own, device=device)
                part.register_parameter(name, nn.Parameter(memory))


def shard(
    stage: Stage,
    zero: int,
    mesh: DeviceMesh,
    copies: DeviceMesh | None,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Applies ZeRO by FSDP2, layer by layer; each layer gets its memory just before. A rank's
    shards are float32 and serve as the masters; weights are gathered in `dtype`. Between steps
    everything is sharded. During a step ZeRO 1 and 2 keep the gathered weights, ZeRO 3 gathers them
    again for every use. Gradients are SUMS over dp, and over micro-batches, in float32: every
    token's weight is already relative to the global batch. copies: the ranks that hold the same
    experts, where the plan splits them. A router's bias stays whole, in float32."""
    # a block's outputs may be views; nothing in the model writes into them
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    options: dict[str, Any] = {"reshard_after_forward": zero == 3, "mp_policy": policy}
    for module in (*stage.own_blocks(), stage):
        give_memory(module, device, torch.float32)
        experts = module.mlp if isinstance(module, Block) else None
        if isinstance(experts, Experts):
            options["ignored_params"] = {experts.router.bias}
            for own in (experts.experts_up, experts.experts_down) if copies is not None else ():
                fully_shard(own, mesh=copies, **options)
        fully_shard(module, mesh=mesh, **options)
    sum_gradients(stage, 1.0)


def own_values(
    share: Share,
    config: ModelConfig,
    place: layout.Place,
    part_of: Source,
) -> dict[str, Tensor]:
    """Returns this process's part of every parameter, by name, in float32. What ZeRO shares out
    is read whole, one parameter at a time."""
    found = {}
    for name, p in share.named_parameters():
        part = part_of(name, layout.splits_of(name, config, place))
        start, rows = own_rows(p)
        own = part[start : start + rows]
        found[name] = own.to(torch.float32, copy=rows < len(part))  # not a view of what others hold
    return found


def whole_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Returns every parameter's shape on one process."""
    with torch.device("meta"):
        return {n: p.shape for n, p in GLM(config).named_parameters()}


def own_rows(p: Tensor, mesh: DeviceMesh | None = None) -> tuple[int, int]:
    """Returns (first, number) of the rows this process holds of a tensor, which ZeRO may have
    shared out. mesh: in place of the tensor's own."""
    if not isinstance(p, DTensor):
        return 0, p.shape[0]
    mesh = mesh or p.device_mesh
    shape, offset = compute_local_shape_and_global_offset(p.shape, mesh, p.placements)
    return (offset[0], shape[0]) if shape[0] else (0, 0)


def initial_values(
    share: Share, config: ModelConfig, place: layout.Place, seed: int
) -> dict[str, Tensor]:
    """Returns this process's float32 starting weights, bit for bit those of a single process."""
    shapes = whole_shapes(config)

    def part_of(name: str, splits: layout.Splits) -> Tensor:
        return layout.take(initial_value(config, seed, name, shapes[name]).float(), splits)

    return own_values(share, config, place, part_of)
