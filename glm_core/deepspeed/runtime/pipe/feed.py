"""Feeds a pipeline its micro-batches: the first stage takes inputs, the last one labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from glm_core.deepspeed.runtime.dataloader import RepeatingLoader
from glm_core.deepspeed.runtime.pipe.topology import PipelineParallelGrid
from glm_core.deepspeed.settings import Settings
from glm_core.errors import TrainingError


class Feed:
    """The part of the engine that reads data."""

    settings: Settings
    grid: PipelineParallelGrid
    device: torch.device
    training_dataloader: Any
    data_iterator: Iterator[Any] | None = None
    batch_fn: Callable[[Any], Any] | None = None

    def is_first_stage(self) -> bool:
        """Is this process on the stage that takes inputs?"""
        return self.grid.is_first_stage

    def is_last_stage(self) -> bool:
        """Is this process on the stage that takes labels?"""
        return self.grid.is_last_stage

    def set_dataloader(self, loader: Any) -> None:
        """Sets the batches of `train_batch`, on stages that take any."""
        if self.is_first_stage() or self.is_last_stage():
            self.training_dataloader, self.data_iterator = loader, iter(loader)

    def set_dataiterator(self, iterator: Iterator[Any] | None) -> None:
        """Sets an iterator over the batches of `train_batch`, on stages that take any."""
        if self.is_first_stage() or self.is_last_stage():
            self.training_dataloader, self.data_iterator = None, iterator

    def set_batch_fn(self, fn: Callable[[Any], Any]) -> None:
        """Sets the function that every micro-batch passes through first."""
        self.batch_fn = fn

    def set_training_data(self, data: Dataset[Any], collate: Any) -> None:
        """Makes endless micro-batches of a data set, in order, each replica its share. (DeepSpeed's
        engine shuffles; its pipeline does not.)"""
        rank = self.grid.get_data_parallel_rank()
        sampler: DistributedSampler[Any] = DistributedSampler(
            data, self.grid.data_parallel_size, rank, shuffle=False
        )
        loader = DataLoader(
            data,
            self.settings.micro_batch,
            sampler=sampler,
            collate_fn=collate,
            drop_last=self.settings.drop_last,
        )
        self.set_dataloader(RepeatingLoader(loader))

    def _micro_batch(self) -> tuple[Any, Any]:
        """Returns the next inputs and labels; (None, None) on stages that take neither."""
        if not (self.is_first_stage() or self.is_last_stage()):
            return None, None
        if self.data_iterator is None and self.batch_fn is None:
            raise TrainingError("pipeline: no data; pass data_iter, or training_data to initialize")
        batch: Any = next(self.data_iterator) if self.data_iterator is not None else None
        if self.batch_fn is not None:
            batch = self.batch_fn(batch)
        inputs, labels = batch[0], batch[1] if len(batch) > 1 else None
        return self._to_device(inputs), self._to_device(labels)

    def _to_device(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(self.device)
        if isinstance(value, list | tuple):
            return tuple(self._to_device(v) for v in value)
        return value
