"""What the trainer reads of a batch, what draws them, and how many sequences a step takes."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from glm_core.config import TrainConfig


class Batch(Protocol):
    """The tensors of a batch; shapes as in glm_core.data.sampler.Batch."""

    @property
    def tokens(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def loss_weight(self) -> Tensor: ...
    @property
    def positions(self) -> Tensor: ...
    @property
    def key_start(self) -> Tensor: ...
    @property
    def key_end(self) -> Tensor: ...


class Sampler(Protocol):
    """Draws batches; restored to an earlier state, it draws the same ones again."""

    def next(self, micro_batch: int) -> Batch: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: dict[str, Any]) -> None: ...


def global_batch(config: TrainConfig, samples_seen: int) -> int:
    """Returns the sequences of the next step: `ramp_from`, growing by `ramp_increment` in equal
    shares of `ramp_samples` (Zeng et al. 2022, appendix B.1)."""
    if not config.ramp_from:
        return config.global_batch
    increments = max(1, (config.global_batch - config.ramp_from) // config.ramp_increment)
    done = samples_seen * increments // max(1, config.ramp_samples)
    return min(config.global_batch, config.ramp_from + done * config.ramp_increment)
