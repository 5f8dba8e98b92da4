"""`deepspeed.runtime.utils` and `deepspeed.utils.groups`: what scripts use of them."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from glm_core.deepspeed.accelerator import backend
from glm_core.deepspeed.fragments import logger


def see_memory_usage(message: str, force: bool = False, ranks: list[int] | None = None) -> None:
    """Logs the most memory used so far, on rank 0; only where `force`, as DeepSpeed."""
    if force and (not dist.is_initialized() or dist.get_rank() in (ranks or [0])):
        logger.info("%s: at most %.2f GB so far", message, backend().memory_peak_bytes() / 2**30)


def move_to_device(item: Any, device: torch.device | str, criterion_func: Any = None) -> Any:
    """Tensors inside lists, tuples and dicts (those that criterion_func accepts) on the device."""
    if isinstance(item, Tensor):
        return item.to(device) if criterion_func is None or criterion_func(item) else item
    if isinstance(item, dict):
        return {k: move_to_device(v, device, criterion_func) for k, v in item.items()}
    if isinstance(item, list | tuple):
        return type(item)(move_to_device(v, device, criterion_func) for v in item)
    return item


def set_random_seed(seed: int) -> None:
    """Python's and torch's generators."""
    random.seed(seed)
    torch.manual_seed(seed)


def _get_sequence_parallel_group() -> dist.ProcessGroup | None:
    """None: sequences are not split over ranks."""
    return None


def _get_sequence_parallel_world_size() -> int:
    """1: sequences are not split over ranks."""
    return 1


def _get_data_parallel_group() -> dist.ProcessGroup | None:
    """All ranks."""
    return dist.group.WORLD


def _get_data_parallel_world_size() -> int:
    return dist.get_world_size()


def _get_data_parallel_rank() -> int:
    return dist.get_rank()
