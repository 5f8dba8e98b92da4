"""Names the places to which DeepSpeed offloads (`deepspeed.runtime.zero.offload_config`)."""

from __future__ import annotations

from enum import Enum

from glm_core.deepspeed.runtime.zero.config import (
    DeepSpeedZeroOffloadOptimizerConfig,
    DeepSpeedZeroOffloadParamConfig,
)

__all__ = [
    "DeepSpeedZeroOffloadOptimizerConfig",
    "DeepSpeedZeroOffloadParamConfig",
    "OffloadDeviceEnum",
]


class OffloadDeviceEnum(str, Enum):  # StrEnum is new in Python 3.11
    """The values of `offload_*.device`; nvme is an error here."""

    none = "none"
    cpu = "cpu"
    nvme = "nvme"
