"""Computes the learning-rate schedules that a config can name, as functions of the step
(`deepspeed.runtime.lr_schedules`, 0.19.8)."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from glm_core.deepspeed.notices import say_once
from glm_core.errors import ConfigError, unknown

WARMUPS = ("log", "linear")


def _warmup_share(step: int, num_steps: int, kind: str) -> float:
    """Returns how far the rate is from its minimum (0) to its maximum (1) at a step of the warm-up,
    which rises with the step or with its logarithm."""
    return step / num_steps if kind == "linear" else math.log(step + 1) / math.log(num_steps)


class BadValue(ConfigError, ValueError):
    """A schedule's argument that is out of its range; a ValueError, as in DeepSpeed."""


def _own_rates(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Returns the groups' rates; tensors are copied, since `_set` changes them in place."""
    rates = [g["lr"] for g in optimizer.param_groups]
    return [r.clone() if isinstance(r, Tensor) else r for r in rates]


class Schedule:
    """Sets every parameter group's learning rate. The i-th call of `step`, from 0, sets the rates
    of step i; before the first call they are the schedule's starting rates."""

    def __init__(self, optimizer: torch.optim.Optimizer, last_batch_iteration: int) -> None:
        """optimizer: a torch optimizer, or an object whose `optimizer` is one."""
        if not isinstance(optimizer, torch.optim.Optimizer):
            optimizer = getattr(optimizer, "optimizer", optimizer)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"scheduler: {type(optimizer).__name__} is not a torch optimizer")
        self.optimizer, self.last_batch_iteration = optimizer, last_batch_iteration

    def _each(self, value: float | list[float], name: str = "rates") -> list[float]:
        groups = len(self.optimizer.param_groups)
        values = list(value) if isinstance(value, list | tuple) else [value] * groups
        if len(values) != groups:
            raise BadValue(
                f"scheduler: {len(values)} {name} for {groups} parameter groups; give one for each"
            )
        return values

    def _set(self, rates: list[float]) -> None:
        # a rate that is a tensor stays one, so that a compiled or recorded step sees its change
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate.squeeze() if isinstance(rate, Tensor) else rate)
            else:
                group["lr"] = rate
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def get_lr(self) -> list[float]:
        """Returns one rate per group for the current step."""
        raise NotImplementedError

    def get_last_lr(self) -> list[float]:
        """Returns the rates that were set last."""
        return self._last_lr

    def step(self, last_batch_iteration: int | None = None) -> None:
        """Sets the next step's rates."""
        if last_batch_iteration is None:
            last_batch_iteration = self.last_batch_iteration + 1
        self.last_batch_iteration = last_batch_iteration
        self._set(self.get_lr())

    def state_dict(self) -> dict[str, Any]:
        """Returns the state in DeepSpeed's own form."""
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state`, and sets its rates."""
        self.last_batch_iteration = state["last_batch_iteration"]
        self._set(self.get_lr())


class WarmupLR(Schedule):
    """Rates rise from their minimum to their maximum during the warm-up and then stay."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        warmup_min_lr: float | list[float] = 0.0,
        warmup_max_lr: float | list[float] | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        """Rates are one for all groups, or a list. Without warmup_max_lr the maximum is the
        optimizer's own rates."""
        if not isinstance(warmup_num_steps, int) or warmup_num_steps <= 0:
            raise BadValue(f"warmup_num_steps={warmup_num_steps!r}: must be a positive integer")
        super().__init__(optimizer, last_batch_iteration)
        if warmup_type not in WARMUPS:
            say_once(f"warmup_type={warmup_type!r}: is unknown, so log is used; use log or linear")
        self.warmup_type = warmup_type if warmup_type in WARMUPS else "log"
        own = _own_rates(self.optimizer)
        self.max_lrs = own if warmup_max_lr is None else self._each(warmup_max_lr)
        self.min_lrs = self._each(warmup_min_lr)
        self.warmup_num_steps = max(2, warmup_num_steps)
        if last_batch_iteration == -1:
            self._set(self.min_lrs)

    def _share(self, step: int) -> float:
        """Returns how far a rate is from its minimum (0) to its maximum (1) after the warm-up."""
        return 1.0

    def get_lr(self) -> list[float]:
        """Returns one rate per group for the current step."""
        step = self.last_batch_iteration
        if step < 0:
            return self.min_lrs
        if step < self.warmup_num_steps:
            share = _warmup_share(step, self.warmup_num_steps, self.warmup_type)
        else:
            share = self._share(step)
        return [a + (b - a) * share for a, b in zip(self.min_lrs, self.max_lrs, strict=True)]


class WarmupDecayLR(WarmupLR):
    """WarmupLR whose rates then fall linearly to their minimum at total_num_steps."""

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
        """See WarmupLR for the other arguments."""
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
    """The optimizer's own rates times a ratio that rises from warmup_min_ratio to 1, falls as a
    cosine to cos_min_ratio at total_num_steps, and stays there."""

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
        """See WarmupLR for the other arguments."""
        self.total_num_steps, self.cos_min_ratio = total_num_steps, cos_min_ratio
        self.warmup_min_ratio = warmup_min_ratio
        super().__init__(optimizer, 0.0, None, warmup_num_steps, warmup_type, last_batch_iteration)

    def get_lr_ratio(self) -> float:
        """Returns the share of the optimizer's own rates at the current step; 0 before the
        first."""
        step, low = self.last_batch_iteration, self.warmup_min_ratio
        if step < 0:
            return 0.0
        if step < self.warmup_num_steps:
            return low + (1 - low) * _warmup_share(step, self.warmup_num_steps, self.warmup_type)
        falling = max(1, self.total_num_steps - self.warmup_num_steps)
        done = (step - self.warmup_num_steps + 1) / falling
        wave = (1 + math.cos(math.pi * min(1.0, done))) / 2
        return max(0.0, self.cos_min_ratio + (1 - self.cos_min_ratio) * wave)

    def get_lr(self) -> list[float]:
        """Returns one rate per group for the current step."""
        ratio = self.get_lr_ratio()
        return [rate * ratio for rate in self.max_lrs]


class LRRangeTest(Schedule):
    """Rates of min (1 + step_rate n / step_size) at step n; with staircase n / step_size is rounded
    down. It finds the largest rate that trains (Smith 2018, arXiv:1803.09820)."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        lr_range_test_min_lr: float | list[float] = 1e-3,
        lr_range_test_step_size: int = 2000,
        lr_range_test_step_rate: float = 1.0,
        lr_range_test_staircase: bool = False,
        last_batch_iteration: int = -1,
    ) -> None:
        """lr_range_test_min_lr is one rate for all groups, or a list."""
        size = lr_range_test_step_size
        if not isinstance(size, int) or size <= 0:
            raise BadValue(f"lr_range_test_step_size={size!r}: must be a positive integer")
        super().__init__(optimizer, last_batch_iteration)
        self.min_lrs = self._each(lr_range_test_min_lr, "lr_range_test_min_lr")
        self.step_size, self.step_rate = size, lr_range_test_step_rate
        self.staircase = lr_range_test_staircase
        if last_batch_iteration == -1:
            self._set(self.min_lrs)

    def get_lr(self) -> list[float]:
        """Returns one rate per group for the current step."""
        stairs = float(self.last_batch_iteration + 1) / self.step_size
        stairs = math.floor(stairs) if self.staircase else stairs
        return [rate * (1 + self.step_rate * stairs) for rate in self.min_lrs]


class OneCycle(Schedule):
    """One cycle of rates from min to max and back, while beta1 goes from max to min and back (Smith
    2018, arXiv:1803.09820). n steps after the cycle rates are
    min / (1 + decay_lr_rate n / decay_step_size) and beta1 is
    max (1 + decay_mom_rate n / decay_step_size)."""

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
        """Rates and momenta are one for all groups, or a list. Where cycle_second_* is None it is
        that of the first half. A stair count of 0 means no stairs, decay_step_size 0 no decay."""
        super().__init__(optimizer, last_batch_iteration)
        self.rise = float(cycle_first_step_size)
        self.fall = self.rise if cycle_second_step_size is None else float(cycle_second_step_size)
        if self.rise <= 0 or self.fall < 0:
            raise BadValue(
                f"cycle_first_step_size={self.rise:g}, cycle_second_step_size={self.fall:g}: "
                "the first must be positive, the second not negative"
            )
        self.length = self.rise + self.fall
        self.step_ratio = self.rise / self.length
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
        """Returns how far the cycle is from min (0) to max (1)."""
        done = self.last_batch_iteration + 1
        x = 1.0 + done / self.length - math.floor(1 + done / self.length)
        ratio = self.step_ratio
        rising = x <= ratio
        count = self.stairs[0] if rising else self.stairs[1]
        if count is None or count <= 0:
            return x / ratio if rising else (x - 1) / (ratio - 1)
        # from the whole number of steps: a rounding may put x just below a stair's edge
        at = done % self.length
        up = at <= self.rise
        position = at * count / self.rise if up else (self.length - at) * count / self.fall
        return math.floor(position) / count

    def _decayed(self) -> float | None:
        """Returns the decay intervals since the cycle's end; None inside the cycle."""
        if self.last_batch_iteration < self.length:
            return None
        steps = self.last_batch_iteration - self.length + 1
        return steps / self.decay_step_size if not _zero(self.decay_step_size) else 0.0

    def get_lr(self) -> list[float]:
        """Returns one rate per group for the current step."""
        after = self._decayed()
        if after is None:
            height = self._height()
            pairs = zip(self.min_lrs, self.max_lrs, strict=True)
            return [low + (high - low) * height for low, high in pairs]
        rate = 0.0 if _zero(self.decay_lr_rate) else self.decay_lr_rate
        return [low / (1 + rate * after) for low in self.min_lrs]

    def get_mom(self) -> list[tuple[float, float]] | None:
        """Returns the betas per group; None where they are not cycled."""
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


KINDS = {k.__name__: k for k in (LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR)}
"""by the name that a config gives; a config may name torch's own schedules too"""
VALID_LR_SCHEDULES = list(KINDS)
LR_RANGE_TEST, ONE_CYCLE, WARMUP_LR, WARMUP_DECAY_LR, WARMUP_COSINE_LR = VALID_LR_SCHEDULES
WARMUP_LOG_RATE, WARMUP_LINEAR_RATE = WARMUPS
globals().update(
    {
        name.upper(): name  # WARMUP_NUM_STEPS = "warmup_num_steps", ...: scripts import these
        for kind in KINDS.values()
        for name in inspect.signature(kind).parameters
        if name not in ("optimizer", "last_batch_iteration")
    }
)


def make(kind: str, params: dict[str, Any], optimizer: torch.optim.Optimizer) -> Any:
    """Makes the schedule that a config names, one of these or of torch's. Raises ConfigError."""
    schedule = KINDS.get(kind) or getattr(torch.optim.lr_scheduler, kind, None)
    if schedule is None:
        raise ConfigError(unknown("scheduler.type", kind, KINDS))
    try:
        return schedule(optimizer, **params)
    except TypeError as error:
        raise ConfigError(f"scheduler.params: {error}") from None
