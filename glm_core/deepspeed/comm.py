"""`deepspeed.comm`: torch.distributed by DeepSpeed's names, and how a job is joined."""

from __future__ import annotations

import datetime
import os
from typing import Any

import torch.distributed as dist

from glm_core.deepspeed.accelerator import backend


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
    """Joins the job that the launcher's environment describes (one process without one), unless
    that is done. dist_backend None: the glm_core backend's."""
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
    """As the launcher set it."""
    return int(os.environ.get("LOCAL_RANK", 0))


def __getattr__(name: str) -> Any:
    return getattr(dist, name)
