"""Offers the functions of `deepspeed.runtime.utils` that scripts use."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from glm_core.deepspeed.accelerator.real_accelerator import backend
from glm_core.deepspeed.runtime.pipe.partition import balanced, sums, uniform
from glm_core.deepspeed.utils.logging import logger
from glm_core.errors import ShapeError
from glm_core.versions import all_gather_single


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


class PartitionedTensor:
    """A tensor of which each rank of a group keeps an equal share of the flattened elements, of
    DeepSpeed's sizes: the first ranks' are one longer where the number does not divide."""

    def __init__(self, tensor: Tensor, group: Any, partition_meta: Any = None) -> None:
        """partition_meta: has no effect, as in DeepSpeed."""
        self.group = group
        self.num_parts, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.orig_size, self.orig_device = list(tensor.shape), tensor.device
        self.partition = uniform(tensor.numel(), self.num_parts)
        own = slice(*self.partition[self.rank : self.rank + 2])
        self.local_data = tensor.detach().reshape(-1)[own].clone()

    @classmethod
    def from_meta(
        cls, meta: Tensor, local_part: Tensor, group: Any, device: Any = None
    ) -> PartitionedTensor:
        """Returns the tensor that `to_meta` described, with this rank's share. Raises ShapeError
        where it was cut for another group or rank, or the share has another length."""
        ndim, *rest = meta.tolist()
        made = cls(torch.empty(0), group)
        made.orig_size, (parts, rank, *made.partition) = rest[:ndim], rest[ndim:]
        if (parts, rank) != (made.num_parts, made.rank):
            raise ShapeError(
                f"PartitionedTensor: rank {rank} of {parts} wrote it, this is rank {made.rank} of "
                f"{made.num_parts}; read it on the same rank"
            )
        want = made.partition[rank + 1] - made.partition[rank]
        if local_part.numel() != want:
            raise ShapeError(
                f"PartitionedTensor: the share has {local_part.numel()} elements, not {want}; pass "
                "the rank's own `data()`"
            )
        made.local_data = local_part.detach()
        made.orig_device = local_part.device if device is None else torch.device(device)
        return made

    def full(self, device: Any = None) -> Tensor:
        """Returns the whole tensor, on its first device. A collective of the group."""
        ends = self.partition
        longest = max(end - start for start, end in itertools.pairwise(ends))
        padded = self.local_data.new_zeros(longest)
        padded[: len(self.local_data)] = self.local_data
        parts = padded.new_empty(self.num_parts, longest)
        all_gather_single(parts.view(-1), padded, group=self.group)
        shares = [part[: ends[i + 1] - ends[i]] for i, part in enumerate(parts)]
        return torch.cat(shares).view(self.orig_size).to(device or self.orig_device)

    def to_meta(self) -> Tensor:
        """Returns what a rank must know besides its share, as a vector of integers."""
        size = [len(self.orig_size), *self.orig_size]
        return torch.tensor(
            [*size, self.num_parts, self.rank, *self.partition], device=self.orig_device
        )

    def data(self) -> Tensor:
        """Returns this rank's share."""
        return self.local_data

    def local_size(self) -> torch.Size:
        """Returns the shape of this rank's share."""
        return self.local_data.shape

    def full_size(self) -> list[int]:
        """Returns the shape of the whole tensor."""
        return self.orig_size


prefix_sum_inc, partition_uniform, partition_balanced = sums, uniform, balanced


def set_random_seed(seed: int) -> None:
    """Seeds Python's, numpy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed % 2**63)
