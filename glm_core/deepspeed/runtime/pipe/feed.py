"""Where a pipeline's micro-batches come from: the first stage takes inputs, the last labels."""

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
    """The engine's data."""

    settings: Settings
    grid: PipelineParallelGrid
    device: torch.device
    training_dataloader: Any
    data_iterator: Iterator[Any] | None = None
    batch_fn: Callable[[Any], Any] | None = None

    def is_first_stage(self) -> bool:
        """Does this process take inputs?"""
        return self.grid.is_first_stage

    def is_last_stage(self) -> bool:
        """Does this process take labels?"""
        return self.grid.is_last_stage

    def set_dataloader(self, loader: Any) -> None:
        """Batches for `train_batch`, where this stage takes any."""
        if self.is_first_stage() or self.is_last_stage():
            self.training_dataloader, self.data_iterator = loader, iter(loader)

    def set_dataiterator(self, iterator: Iterator[Any] | None) -> None:
        """The same, of an iterator."""
        if self.is_first_stage() or self.is_last_stage():
            self.training_dataloader, self.data_iterator = None, iterator

    def set_batch_fn(self, fn: Callable[[Any], Any]) -> None:
        """What every micro-batch passes through first."""
        self.batch_fn = fn

    def set_training_data(self, data: Dataset[Any], collate: Any) -> None:
        """A data set as endless micro-batches, in order, each replica its share (DeepSpeed's engine
        shuffles; its pipeline does not)."""
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
        """Inputs and labels, where this stage takes them."""
        if not (self.is_first_stage() or self.is_last_stage()):
            return None, None
        if self.data_iterator is None and self.batch_fn is None:
            raise TrainingError("pipeline: no data; pass data_iter, or training_data to initialize")
        batch: Any = next(self.data_iterator) if self.data_iterator is not None else None
        if self.batch_fn is not None:
            batch = self.batch_fn(batch)
        inputs, labels = batch[0], batch[1] if len(batch) > 1 else None
        return self._here(inputs), self._here(labels)

    def _here(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(self.device)
        if isinstance(value, list | tuple):
            return tuple(self._here(v) for v in value)
        return value
