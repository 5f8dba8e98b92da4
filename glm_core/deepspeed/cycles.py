"""The schedules that search for a rate or run one cycle (Smith 2018, arXiv:1803.09820), as
deepspeed/runtime/lr_schedules.py, 0.19.8, has them."""

from __future__ import annotations

import math

import torch

from glm_core.deepspeed.settings import say_once
from glm_core.deepspeed.warmup import Schedule
from glm_core.errors import ConfigError


class LRRangeTest(Schedule):
    """min (1 + step_rate n / step_size) at the n-th step, in stairs of step_size if wanted."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        lr_range_test_min_lr: float | list[float] = 1e-3,
        lr_range_test_step_size: int = 2000,
        lr_range_test_step_rate: float = 1.0,
        lr_range_test_staircase: bool = False,
        last_batch_iteration: int = -1,
    ) -> None:
        """One smallest rate for all groups, or a list."""
        size = lr_range_test_step_size
        if not isinstance(size, int) or size <= 0:
            raise ConfigError(f"lr_range_test_step_size={size!r}: must be a positive integer")
        super().__init__(optimizer, last_batch_iteration)
        self.min_lrs = self._each(lr_range_test_min_lr, "lr_range_test_min_lr")
        self.step_size, self.step_rate = size, lr_range_test_step_rate
        self.staircase = lr_range_test_staircase
        if last_batch_iteration == -1:
            self._set(self.min_lrs)

    def get_lr(self) -> list[float]:
        """One rate per group."""
        stairs = float(self.last_batch_iteration + 1) / self.step_size
        stairs = math.floor(stairs) if self.staircase else stairs
        return [rate * (1 + self.step_rate * stairs) for rate in self.min_lrs]


class OneCycle(Schedule):
    """Rates from min to max and back over one cycle, beta1 the other way; then rates decay as
    min / (1 + decay_lr_rate n / decay_step_size) and beta1 as max (1 + decay_mom_rate n / ...)."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        cycle_min_lr: float | list[float],
        cycle_max_lr: float | list[float],
        decay_lr_rate: float = 0.0,
        cycle_first_step_size: int = 2000,
        cycle_second_step_size: int | None = None,
        cycle_first_stair_count: int = 0,
        cycle_second_stair_count: int | None = None,
        decay_step_size: int = 0,
        cycle_momentum: bool = True,
        cycle_min_mom: float | list[float] = 0.8,
        cycle_max_mom: float | list[float] = 0.9,
        decay_mom_rate: float = 0.0,
        last_batch_iteration: int = -1,
    ) -> None:
        """Rates and momenta: one for all groups, or a list. Second sizes None: as the first. Stair
        count 0: no stairs; decay_step_size 0: no decay."""
        super().__init__(optimizer, last_batch_iteration)
        self.rise = float(cycle_first_step_size)
        self.fall = self.rise if cycle_second_step_size is None else float(cycle_second_step_size)
        if self.rise <= 0 or self.fall < 0:
            raise ConfigError(
                f"cycle_first_step_size={self.rise:g}, cycle_second_step_size={self.fall:g}: "
                "the first must be positive, the second not negative"
            )
        self.length = self.rise + self.fall
        second = cycle_second_stair_count
        self.stairs = (cycle_first_stair_count, second)
        if second is None:
            self.stairs = (cycle_first_stair_count, cycle_first_stair_count)
        self.min_lrs = self._each(cycle_min_lr, "cycle_min_lr")
        self.max_lrs = self._each(cycle_max_lr, "cycle_max_lr")
        self.decay_step_size = decay_step_size
        self.decay_lr_rate, self.decay_mom_rate = decay_lr_rate, decay_mom_rate
        self.cycle_momentum = cycle_momentum and self._has_betas()
        self.min_moms = self._each(cycle_min_mom, "cycle_min_mom")
        self.max_moms = self._each(cycle_max_mom, "cycle_max_mom")
        if last_batch_iteration == -1:
            self._set(self.min_lrs)
            if self.cycle_momentum:
                self._set_momenta(self.min_moms)

    def _has_betas(self) -> bool:
        if "betas" in self.optimizer.defaults:
            return True
        say_once(
            f"OneCycle: cycle_momentum has no effect: {type(self.optimizer).__name__} has no betas"
        )
        return False

    def _set_momenta(self, momenta: list[float]) -> None:
        for group, momentum in zip(self.optimizer.param_groups, momenta, strict=True):
            group["betas"] = (momentum, 0.99)  # DeepSpeed's constant, whatever beta2 was

    def _height(self) -> float:
        """Share of the way from min to max."""
        done = self.last_batch_iteration + 1
        x = 1.0 + done / self.length - math.floor(1 + done / self.length)
        ratio = self.rise / self.length
        rising = x <= ratio
        count = self.stairs[0] if rising else self.stairs[1]
        if count is None or count <= 0:
            return x / ratio if rising else (x - 1) / (ratio - 1)
        # from the whole number of steps: x may lie a rounding below a stair's edge
        at = done % self.length
        up = at <= self.rise
        position = at * count / self.rise if up else (self.length - at) * count / self.fall
        return math.floor(position) / count

    def _decayed(self) -> float | None:
        """Decay intervals since the cycle's end; None inside it."""
        if self.last_batch_iteration < self.length:
            return None
        steps = self.last_batch_iteration - self.length + 1
        return steps / self.decay_step_size if not _zero(self.decay_step_size) else 0.0

    def get_lr(self) -> list[float]:
        """One rate per group."""
        after = self._decayed()
        if after is None:
            height = self._height()
            pairs = zip(self.min_lrs, self.max_lrs, strict=True)
            return [low + (high - low) * height for low, high in pairs]
        rate = 0.0 if _zero(self.decay_lr_rate) else self.decay_lr_rate
        return [low / (1 + rate * after) for low in self.min_lrs]

    def get_mom(self) -> list[tuple[float, float]] | None:
        """The betas per group; None where they are not cycled."""
        if not self.cycle_momentum:
            return None
        after = self._decayed()
        if after is None:
            height = self._height()
            pairs = zip(self.min_moms, self.max_moms, strict=True)
            return [(high - (high - low) * height, 0.99) for low, high in pairs]
        rate = 0.0 if _zero(self.decay_mom_rate) else self.decay_mom_rate
        return [(high * (1 + rate * after), 0.99) for high in self.max_moms]

    def step(self, last_batch_iteration: int | None = None) -> None:
        """Sets the next step's rates and betas."""
        super().step(last_batch_iteration)
        momenta = self.get_mom()
        if momenta is not None:
            self._set_momenta([momentum for momentum, _ in momenta])


def _zero(value: float) -> bool:
    return math.isclose(value, 0)
