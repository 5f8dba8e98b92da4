"""The schedules that warm up, as functions of the step, and what all schedules have in common
(deepspeed/runtime/lr_schedules.py, 0.19.8)."""

from __future__ import annotations

import math
from typing import Any

import torch

from glm_core.errors import ConfigError


def warmup(step: int, steps: int, kind: str) -> float:
    """Share of the way from the first to the full rate before `steps`; log or linear."""
    if kind not in ("log", "linear"):
        raise ConfigError(f"warmup_type={kind!r}: use log or linear")
    return step / steps if kind == "linear" else math.log(step + 1) / math.log(steps)


class Schedule:
    """Sets every group's rate at each `step`: step i is set by the i-th call, i from 0; before the
    first the rates are what the schedule's start says."""

    def __init__(self, optimizer: torch.optim.Optimizer, last_batch_iteration: int) -> None:
        self.optimizer, self.last_batch_iteration = optimizer, last_batch_iteration

    def _each(self, value: float | list[float], name: str = "rates") -> list[float]:
        groups = len(self.optimizer.param_groups)
        values = list(value) if isinstance(value, list | tuple) else [value] * groups
        if len(values) != groups:
            raise ConfigError(f"scheduler: {len(values)} {name} for {groups} parameter groups")
        return values

    def _set(self, rates: list[float]) -> None:
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self._last_lr = rates

    def get_lr(self) -> list[float]:
        """One rate per group, of the step set last."""
        raise NotImplementedError

    def get_last_lr(self) -> list[float]:
        """The rates set last."""
        return self._last_lr

    def step(self, last_batch_iteration: int | None = None) -> None:
        """Sets the next step's rates."""
        if last_batch_iteration is None:
            last_batch_iteration = self.last_batch_iteration + 1
        self.last_batch_iteration = last_batch_iteration
        self._set(self.get_lr())

    def state_dict(self) -> dict[str, Any]:
        """As DeepSpeed's own."""
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on after `state`."""
        self.last_batch_iteration = state["last_batch_iteration"]
        self._set(self.get_lr())


class WarmupLR(Schedule):
    """From min to max over the warm-up, then constant; the rate starts at its minimum."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        warmup_min_lr: float | list[float] = 0.0,
        warmup_max_lr: float | list[float] | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        """One rate for all groups, or a list. warmup_max_lr None: the optimizer's own rates."""
        if not isinstance(warmup_num_steps, int) or warmup_num_steps <= 0:
            raise ConfigError(f"warmup_num_steps={warmup_num_steps!r}: must be a positive integer")
        super().__init__(optimizer, last_batch_iteration)
        self.kind = warmup_type
        own = [g["lr"] for g in optimizer.param_groups]
        self.max_lrs = own if warmup_max_lr is None else self._each(warmup_max_lr)
        self.min_lrs = self._each(warmup_min_lr)
        self.warmup_num_steps = max(2, warmup_num_steps)
        warmup(0, 2, warmup_type)  # a wrong type is an error now, not at the first step
        if last_batch_iteration == -1:
            self._set(self.min_lrs)

    def _share(self, step: int) -> float:
        return 1.0

    def get_lr(self) -> list[float]:
        """One rate per group."""
        step = self.last_batch_iteration
        if step < 0:
            return self.min_lrs
        if step < self.warmup_num_steps:
            share = warmup(step, self.warmup_num_steps, self.kind)
        else:
            share = self._share(step)
        return [a + (b - a) * share for a, b in zip(self.min_lrs, self.max_lrs, strict=True)]


class WarmupDecayLR(WarmupLR):
    """WarmupLR, then down to the minimum at total_num_steps in a straight line."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        total_num_steps: int,
        warmup_min_lr: float | list[float] = 0.0,
        warmup_max_lr: float | list[float] = 0.001,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        """As WarmupLR."""
        self.total_num_steps = total_num_steps
        super().__init__(
            optimizer,
            warmup_min_lr,
            warmup_max_lr,
            warmup_num_steps,
            warmup_type,
            last_batch_iteration,
        )

    def _share(self, step: int) -> float:
        left = self.total_num_steps - step
        return max(0.0, left / max(1.0, self.total_num_steps - self.warmup_num_steps))


class WarmupCosineLR(WarmupLR):
    """Shares of the optimizer's own rates: from warmup_min_ratio to 1, then by a cosine to
    cos_min_ratio at total_num_steps, where it stays."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        total_num_steps: int,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 0.0001,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        """As WarmupLR."""
        self.total_num_steps, self.cos_min_ratio = total_num_steps, cos_min_ratio
        self.warmup_min_ratio = warmup_min_ratio
        own = [g["lr"] for g in optimizer.param_groups]
        super().__init__(optimizer, 0.0, own, warmup_num_steps, warmup_type, last_batch_iteration)

    def get_lr(self) -> list[float]:
        """One rate per group."""
        step = self.last_batch_iteration
        if step < 0:
            return self.min_lrs
        low, ratio = self.warmup_min_ratio, 0.0
        if step < self.warmup_num_steps:
            ratio = low + (1 - low) * warmup(step, self.warmup_num_steps, self.kind)
        else:
            done = (step - self.warmup_num_steps + 1) / max(
                1, self.total_num_steps - self.warmup_num_steps
            )
            wave = (1 + math.cos(math.pi * min(1.0, done))) / 2
            ratio = max(0.0, self.cos_min_ratio + (1 - self.cos_min_ratio) * wave)
        return [rate * ratio for rate in self.max_lrs]
