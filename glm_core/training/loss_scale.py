"""How the loss of a float16 run is scaled, so that its gradients neither overflow nor vanish."""

from __future__ import annotations

import dataclasses
from typing import Any

from glm_core.config import TrainConfig
from glm_core.errors import TrainingError


@dataclasses.dataclass(slots=True, kw_only=True)
class LossScale:
    """A factor on the loss, adapted to what the gradients bear (Micikevicius et al. 2018, section
    3.2). An overflow uses up one of `hysteresis`; the last one halves the scale, and so does every
    further one, until the hysteresis is refilled. `window` good steps in a row double the scale and
    refill the hysteresis, as in Megatron-LM and DeepSpeed."""

    scale: float = 1.0
    """1 for dtypes other than float16"""
    window: int = 0
    """good steps in a row that double the scale; 0: it never changes"""
    hysteresis: int = 1
    """overflows until the scale is halved"""
    minimum: float = 1.0
    stop_at_minimum: bool = False
    """an overflow at the minimum is an error, as in DeepSpeed; else the scale stays there"""
    consecutive_hysteresis: bool = False
    """every good step refills the hysteresis, not only a doubling"""
    uncounted: int = 0
    """good steps that do not count towards `window`, at the start and after each overflow; 1 in
    DeepSpeed (runtime/fp16/loss_scaler.py, 0.19.8)"""
    good_steps: int = 0
    """since the last overflow"""
    overflows: int = 0
    """since the hysteresis was last refilled"""

    @property
    def dynamic(self) -> bool:
        """Whether the scale changes at all."""
        return self.window > 0

    def update(self, overflow: bool) -> None:
        """Adapts the scale after a step; `overflow`: a gradient was not finite and the step was
        skipped. Raises TrainingError at the minimum where `stop_at_minimum`."""
        if not self.dynamic:
            return
        if overflow:
            self.good_steps = 0
            self.overflows += 1
            if self.overflows >= self.hysteresis:
                self._halve()
            return
        if self.consecutive_hysteresis:
            self.overflows = 0
        self.good_steps += 1
        counted = self.good_steps - self.uncounted
        if counted > 0 and counted % self.window == 0:
            self.scale *= 2
            self.overflows = 0

    def _halve(self) -> None:
        if self.stop_at_minimum and self.scale == self.minimum:
            raise TrainingError(
                f"loss scale: gradients overflow at its minimum, {self.minimum:g}; look for what "
                "is not finite in the model, lower the learning rate, or use bfloat16"
            )
        self.scale = max(self.scale / 2, self.minimum)

    def state(self) -> dict[str, Any]:
        """Returns plain numbers for `restore`."""
        return dataclasses.asdict(self)

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` returned, or a part of it."""
        for name, value in state.items():
            setattr(self, name, value)


def initial_loss_scale(config: TrainConfig) -> LossScale:
    """Returns the loss scale a run starts with: fixed at 1 unless it computes in float16."""
    if config.dtype != "float16":
        return LossScale()
    return LossScale(
        scale=config.loss_scale,
        window=config.loss_scale_window,
        hysteresis=config.loss_scale_hysteresis,
    )
