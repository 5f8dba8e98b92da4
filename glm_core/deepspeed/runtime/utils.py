"""Offers the functions of `deepspeed.runtime.utils` that scripts use."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from glm_core.deepspeed.accelerator.real_accelerator import backend
from glm_core.deepspeed.runtime.pipe.partition import balanced, sums, uniform
from glm_core.deepspeed.utils.logging import logger


def see_memory_usage(message: str, force: bool = False, ranks: list[int] | None = None) -> None:
    """Logs the peak of device memory so far, on rank 0 or `ranks`. Does nothing unless `force`, as
    in DeepSpeed."""
    if force and (not dist.is_initialized() or dist.get_rank() in (ranks or [0])):
        logger.info("%s: at most %.2f GB so far", message, backend().memory_peak_bytes() / 2**30)


def move_to_device(item: Any, device: torch.device | str, criterion_func: Any = None) -> Any:
    """Returns `item` with the tensors inside its lists, tuples and dicts on `device`. With
    criterion_func, tensors it rejects stay where they are."""
    if isinstance(item, Tensor):
        return item.to(device) if criterion_func is None or criterion_func(item) else item
    if isinstance(item, dict):
        return {k: move_to_device(v, device, criterion_func) for k, v in item.items()}
    if isinstance(item, list | tuple):
        return type(item)(move_to_device(v, device, criterion_func) for v in item)
    return item


prefix_sum_inc, partition_uniform, partition_balanced = sums, uniform, balanced


def set_random_seed(seed: int) -> None:
    """Seeds Python's, numpy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed % 2**63)
