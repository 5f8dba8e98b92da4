"""One training run: batches through the model, gradients accumulated, clipped AdamW, everything reproducible."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from glm_core.backends import registry
from glm_core.config import RunConfig, TrainConfig
from glm_core.model import GLM
from glm_core.optimizer import LossScale, Optimizer, learning_rate


class Batch(Protocol):
    """What the trainer reads of a batch; shapes in glm_core.data."""

    tokens: Tensor
    labels: Tensor
    loss_weight: Tensor
    positions: Tensor
    key_start: Tensor
    key_end: Tensor


class Sampler(Protocol):
    """Where batches come from; its state makes a resumed run see the same ones."""

    def next(self, micro_batch: int) -> Batch: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: dict[str, Any]) -> None: ...


@dataclasses.dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step tells; goes into the metrics and the trace."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    global_batch: int
    loss_scale: float
    skipped: bool


def global_batch(config: TrainConfig, samples_seen: int) -> int:
    """Sequences of the next step: `ramp_from`, growing by `ramp_increment` in equal shares of `ramp_samples`
    (Zeng et al. 2022, appendix B.1)."""
    if not config.ramp_from:
        return config.global_batch
    increments = max(1, (config.global_batch - config.ramp_from) // config.ramp_increment)
    done = int(samples_seen * increments / max(1, config.ramp_samples))
    return min(config.global_batch, config.ramp_from + done * config.ramp_increment)


class Trainer:
    """Model, optimizer and sampler of one run, advanced by `step()`. The backend must be active around `step`
    (`registry.use`); `run` in this module does both."""

    def __init__(
        self, config: RunConfig, sampler: Sampler, *, weights: dict[str, Tensor] | None = None
    ) -> None:
        self.config, self.sampler = config, sampler
        self.backend = registry.usable(config.train.backend)
        self.device = self.backend.device()
        self.dtype: torch.dtype = getattr(torch, config.train.dtype)
        initial = weights if weights is not None else initial_weights(config)
        self.model = GLM(config.model).to(self.device, self.dtype)
        self.optimizer = Optimizer(self.model, config.train)
        self.optimizer.load_masters(initial)
        t = config.train
        scale = t.loss_scale if t.dtype == "float16" else 1.0
        self.loss_scale = LossScale(scale, t.loss_scale_window, t.loss_scale_hysteresis)
        self.samples_seen = 0
        self.steps_done = 0
        self.loss: Callable[..., Tensor] = self.model.loss
        if t.compile:
            self.loss = torch.compile(self.model.loss, fullgraph=True)

    def batches(self) -> list[Batch]:
        """The micro-batches of the next step, on the CPU."""
        t = self.config.train
        return [
            self.sampler.next(t.micro_batch)
            for _ in range(global_batch(t, self.samples_seen) // t.micro_batch)
        ]

    def backward(self, batches: list[Batch]) -> Tensor:
        """Forward and backward over the micro-batches; gradients are left in `.grad`, multiplied by the loss scale.
        Returns the loss over the global batch (float32 scalar): the same for every split into micro-batches."""
        total = sum(float(b.loss_weight.sum()) for b in batches)
        loss = torch.zeros((), device=self.device)
        for batch in batches:
            weight = batch.loss_weight * (self.loss_scale.scale / total)
            inputs = (
                batch.tokens,
                batch.positions,
                batch.key_start,
                batch.key_end,
                batch.labels,
                weight,
            )
            part = self.loss(*(x.to(self.device) for x in inputs))
            part.backward()
            loss += part.detach()
        return loss / self.loss_scale.scale

    def step(self) -> StepResult:
        """One optimizer step. A float16 overflow skips the update and lowers the loss scale."""
        batches = self.batches()
        self.model.zero_grad(set_to_none=True)
        loss = self.backward(batches)
        scale, lr = self.loss_scale.scale, learning_rate(self.config.train, self.steps_done + 1)
        norm = float(self.optimizer.step(lr, scale))
        skipped = not math.isfinite(norm)
        if self.config.train.dtype == "float16":
            self.loss_scale.update(skipped)
        self.steps_done += 1
        sequences = sum(len(b.tokens) for b in batches)
        self.samples_seen += sequences
        tokens = sum(b.tokens.numel() for b in batches)
        return StepResult(self.steps_done, float(loss), norm, lr, tokens, sequences, scale, skipped)


def initial_weights(config: RunConfig) -> dict[str, Tensor]:
    """The run's float32 starting weights, the same on every backend and device."""
    model = GLM(config.model).init_weights(config.train.seed)
    return {n: p.detach() for n, p in model.named_parameters()}
