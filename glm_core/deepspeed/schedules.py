"""The learning-rate schedules a DeepSpeed config can name; `deepspeed.runtime.lr_schedules`."""

from __future__ import annotations

from typing import Any

import torch

from glm_core.deepspeed.cycles import LRRangeTest, OneCycle
from glm_core.deepspeed.warmup import WarmupCosineLR, WarmupDecayLR, WarmupLR
from glm_core.errors import ConfigError, unknown

KINDS = {k.__name__: k for k in (LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR)}
"""torch's own schedules are found by name too"""
VALID_LR_SCHEDULES = list(KINDS)


def make(kind: str, params: dict[str, Any], optimizer: torch.optim.Optimizer) -> Any:
    """The schedule a config names: one of these, or one of torch's. Raises ConfigError."""
    found = KINDS.get(kind) or getattr(torch.optim.lr_scheduler, kind, None)
    if found is None:
        raise ConfigError(unknown("scheduler.type", kind, KINDS))
    try:
        return found(optimizer, **params)
    except TypeError as error:
        raise ConfigError(f"scheduler.params: {error}") from None
