"""Names the process groups that scripts ask for outside an engine (`deepspeed.utils.groups`).
Sequences are never split over ranks here, and without an mpu every rank is a data-parallel one."""

from __future__ import annotations

import torch.distributed as dist


def _get_sequence_parallel_group() -> dist.ProcessGroup | None:
    return None


def _get_sequence_parallel_world_size() -> int:
    return 1


def _get_data_parallel_group() -> dist.ProcessGroup | None:
    return dist.group.WORLD


def _get_data_parallel_world_size() -> int:
    return dist.get_world_size()


def _get_data_parallel_rank() -> int:
    return dist.get_rank()
