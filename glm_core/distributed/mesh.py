"""Forms the process groups of a plan: a DeviceMesh on the backend's own library."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from glm_core.backends.base import Backend
from glm_core.distributed.layout import Place
from glm_core.distributed.plan import Plan
from glm_core.errors import ConfigError
from glm_core.versions import set_timeout, torch_has

AXES = ("pp", "dp", "tp")
"""outermost first, so that tensor-parallel neighbours have neighbouring ranks, on one node"""
EXPERT_AXES = ("pp", "expert_dp", "ep", "tp")
"""the data-parallel ranks cut in two: those that hold copies of the same experts, and those that
share the experts"""
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def connecting() -> Iterator[None]:
    """Sends what is written to standard output to standard error while a group is formed: gloo of
    torch 2.9 greets there, in the middle of a command's JSON."""
    if torch_has("quiet_gloo"):
        yield
        return
    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(own, 1)
        os.close(own)


def start(backend: Backend, timeout_s: float = 600.0) -> torch.device:
    """Joins the job that torchrun, Slurm or Kubernetes describes in the environment, over the
    backend's collective library, and returns this process's device. Raises ConfigError where the
    environment describes no job."""
    if missing := [v for v in VARIABLES if v not in os.environ]:
        raise ConfigError(
            f"distributed job: {', '.join(missing)} not set; start the processes with torchrun"
        )
    device = backend.device(int(os.environ.get("LOCAL_RANK", "0")))
    if device.type != "cpu":
        torch.get_device_module(device.type).set_device(device)
    with connecting():
        dist.init_process_group(backend.collective, timeout=timedelta(seconds=timeout_s))
    return device


def leave() -> None:
    """Leaves the job and all its groups."""
    # Gloo of torch 2.7 deadlocks where a group is freed while its thread still frees the last
    # tensors, since one holds Python's lock and the other waits for it. So groups outlive the job.
    _LEFT.extend(dist.distributed_c10d._world.pg_map)
    dist.destroy_process_group()


_LEFT: list[dist.ProcessGroup] = []


def make(plan: Plan, device_type: str, timeout_s: float | None = None) -> DeviceMesh:
    """Returns the mesh [pp, dp, tp] over all processes of the job. Raises ConfigError where their
    number is not the plan's."""
    world = dist.get_world_size()
    if world != plan.world:
        raise ConfigError(
            f"plan {plan.label()}: tp * pp * dp = {plan.world} processes, started {world}; "
            f"start {plan.world}"
        )
    with connecting():
        mesh = init_device_mesh(device_type, (plan.pp, plan.dp, plan.tp), mesh_dim_names=AXES)
    if timeout_s is not None:  # a mesh's groups do not inherit the job's timeout
        for axis in AXES:
            set_timeout(timedelta(seconds=timeout_s), mesh.get_group(axis))
    return mesh


def make_for_experts(
    plan: Plan, mesh: DeviceMesh, timeout_s: float | None = None
) -> DeviceMesh | None:
    """Returns the mesh [pp, expert_dp, ep, tp] over the ranks of `make`'s; None for a plan that
    does not split experts. Every process must call it."""
    if plan.ep == 1:
        return None
    sizes = (plan.pp, plan.dp // plan.ep, plan.ep, plan.tp)
    with connecting():
        experts = init_device_mesh(mesh.device_type, sizes, mesh_dim_names=EXPERT_AXES)
    if timeout_s is not None:
        for axis in EXPERT_AXES:
            set_timeout(timedelta(seconds=timeout_s), experts.get_group(axis))
    return experts


def place(plan: Plan, mesh: DeviceMesh) -> Place:
    """Returns this rank's place among those that split a layer's tensors."""
    ep_rank = mesh.get_local_rank("dp") % plan.ep
    return Place(tp=plan.tp, tp_rank=mesh.get_local_rank("tp"), ep=plan.ep, ep_rank=ep_rank)


def ends_group(mesh: DeviceMesh) -> dist.ProcessGroup | None:
    """Returns the group of the first and the last pipeline rank with this rank's dp and tp
    coordinates, which share a tied embedding; None on a rank between them. Every process must call
    it."""
    if mesh["pp"].size() == 2:
        return mesh.get_group("pp")
    mine = None
    columns = mesh.mesh.flatten(1)  # [pp, dp * tp]
    for first, last in zip(columns[0].tolist(), columns[-1].tolist(), strict=True):
        with connecting():
            group = dist.new_group([first, last])
        if dist.get_rank() in (first, last):
            mine = group
    return mine
