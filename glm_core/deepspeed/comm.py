"""Gives torch.distributed DeepSpeed's name `deepspeed.comm`, and joins a job."""

from __future__ import annotations

import datetime
import os
from typing import Any

import torch.distributed as dist
from torch import Tensor

from glm_core.deepspeed.accelerator.real_accelerator import backend
from glm_core.versions import all_gather_single


def init_distributed(
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int = 29500,
    verbose: bool = True,
    timeout: datetime.timedelta | None = None,
    init_method: str | None = None,
    dist_init_required: bool | None = None,
    config: Any = None,
    rank: int = -1,
    world_size: int = -1,
    **_unused: Any,
) -> None:
    """Joins the job that the launcher's environment variables describe; without a launcher it is a
    job of one process. Does nothing where the process has joined already. dist_backend None: the
    glm_core backend's collective library."""
    if dist.is_initialized() or dist_init_required is False:
        return
    alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(distributed_port)}
    for name, value in {**alone, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        os.environ.setdefault(name, value)
    dist.init_process_group(
        dist_backend or backend().collective,
        timeout=timeout,
        init_method=init_method,
        rank=rank,
        world_size=world_size,
    )


def get_local_rank() -> int:
    """Returns LOCAL_RANK as the launcher set it, else 0."""
    return int(os.environ.get("LOCAL_RANK", 0))


def all_gather_into_tensor(
    output_tensor: Tensor, input_tensor: Tensor, group: Any = None, async_op: bool = False
) -> Any:
    """Gathers all ranks' tensors, one after another along dimension 0. A scalar counts as one
    element, which gloo itself refuses."""
    own = input_tensor.reshape(1) if input_tensor.ndim == 0 else input_tensor
    return all_gather_single(output_tensor, own, group=group, async_op=async_op)


def __getattr__(name: str) -> Any:
    return getattr(dist, name)
