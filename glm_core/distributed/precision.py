"""Decides the dtypes in which a run computes and sums gradients, and how a float16 loss is
scaled."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from glm_core.errors import TrainingError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """Dtypes of one run. Masters and the optimizer's state are always float32."""

    compute: torch.dtype = torch.float32
    """dtype of weights and activations in forward and backward"""
    reduce: torch.dtype = torch.float32
    """dtype of gradients while they are summed over ranks; sums over micro-batches are float32"""

    @property
    def low(self) -> bool:
        """Do the module's weights need float32 masters?"""
        return self.compute != torch.float32


@dataclasses.dataclass(slots=True)
class StaticLossScale:
    """A loss scale that stays as it is; 1 for float32 and bfloat16. Overflows skip the step."""

    scale: float = 1.0

    def update(self, overflow: bool) -> None:
        """Nothing changes."""

    def state(self) -> dict[str, Any]:
        """For `restore`; plain numbers."""
        return {"scale": self.scale}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` returned."""
        self.scale = state["scale"]


@dataclasses.dataclass(slots=True, kw_only=True)
class DynamicLossScale:
    """DeepSpeed's rules (deepspeed/runtime/fp16/loss_scaler.py, DynamicLossScaler, 0.19.8): an
    overflow uses up one of `hysteresis`; with the last it halves the scale, and goes on halving
    until the hysteresis is refilled. Steps are counted since the last overflow; itself and the
    step after it do not count, each `window` of them doubles the scale and refills."""

    scale: float = 2.0**16
    window: int = 1000
    hysteresis: int = 2
    consecutive_hysteresis: bool = False
    """refill on every good step, not only when the scale grows"""
    minimum: float = 1.0
    steps: int = 0
    last_overflow: int = -1
    left: int = -1
    """hysteresis left; -1 = all of it"""

    def __post_init__(self) -> None:
        if self.left < 0:
            self.left = self.hysteresis

    def update(self, overflow: bool) -> None:
        """After each step. Raises TrainingError for an overflow at the smallest scale."""
        if overflow:
            self._shrink()
            self.last_overflow = self.steps
        else:
            if self.consecutive_hysteresis:
                self.left = self.hysteresis
            good = self.steps - self.last_overflow - 1
            if good > 0 and good % self.window == 0:
                self.left = self.hysteresis
                self.scale *= 2
        self.steps += 1

    def _shrink(self) -> None:
        if self.hysteresis > 1 and self.left > 1:
            self.left -= 1
            return
        if self.scale == self.minimum:
            raise TrainingError(
                f"loss scale: gradients overflow at its minimum, {self.minimum:g}; look for what "
                "is not finite in the model, lower the learning rate, or use bfloat16"
            )
        self.scale = max(self.scale / 2, self.minimum)

    def state(self) -> dict[str, Any]:
        """For `restore`; plain numbers."""
        return dataclasses.asdict(self)

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` returned."""
        for name, value in state.items():
            setattr(self, name, value)


LossScale = StaticLossScale | DynamicLossScale


def cast_(module: nn.Module, dtype: torch.dtype) -> None:
    """Rounds all floating-point parameters and buffers of the module to `dtype`, in place."""
    module.to(dtype)


def to_compute(value: Any, dtype: torch.dtype) -> Any:
    """Returns `value` with the floating-point tensors inside its lists, tuples and dicts in
    `dtype`."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: to_compute(v, dtype) for k, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_compute(v, dtype) for v in value))
    if isinstance(value, list | tuple):
        return type(value)(to_compute(v, dtype) for v in value)
    return value
