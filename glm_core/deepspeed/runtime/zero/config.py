"""Shows a config's `zero_optimization` section under DeepSpeed's names
(`deepspeed.runtime.zero.config`)."""

from __future__ import annotations

import sys
from typing import Any

from glm_core.deepspeed.keys import SECTIONS
from glm_core.deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
from glm_core.deepspeed.utils.logging import logger
from glm_core.errors import ConfigError, unknown

KEYS = SECTIONS["zero_optimization"]
DEFAULTS: dict[str, Any] = {
    "stage": 0,
    "contiguous_gradients": True,
    "reduce_scatter": True,
    "reduce_bucket_size": 500_000_000,
    "allgather_partitions": True,
    "allgather_bucket_size": 500_000_000,
    "load_from_fp32_weights": True,
    "elastic_checkpoint": False,
    "offload_param": None,
    "offload_optimizer": None,
    "sub_group_size": 1_000_000_000,
    "prefetch_bucket_size": 50_000_000,
    "param_persistence_threshold": 100_000,
    "model_persistence_threshold": sys.maxsize,
    "max_live_parameters": 1_000_000_000,
    "max_reuse_distance": 1_000_000_000,
    "gather_16bit_weights_on_model_save": False,
    "ignore_unused_parameters": True,
    "round_robin_gradients": False,
    "pipeline_loading_checkpoint": False,
    "override_module_apply": True,
}
"""of the keys whose names scripts read; other keys are there where the config gives them"""


class Offload:
    """A section that says what to keep in the host's memory. Its keys are attributes."""

    def __init__(self, **given: Any) -> None:
        self.device, self.nvme_path, self.pin_memory = "none", None, False
        self.pipeline_read = self.pipeline_write = False
        for name, value in given.items():
            setattr(self, name, value)

    @property
    def pipeline(self) -> bool:
        """Does reading or writing overlap with the update?"""
        return self.pipeline_read or self.pipeline_write


class DeepSpeedZeroOffloadParamConfig(Offload):
    """`zero_optimization.offload_param`."""


class DeepSpeedZeroOffloadOptimizerConfig(Offload):
    """`zero_optimization.offload_optimizer`."""


_OFFLOADS: dict[str, type[Offload]] = {
    "offload_param": DeepSpeedZeroOffloadParamConfig,
    "offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
}
_OLD = {"cpu_offload": "offload_optimizer", "cpu_offload_param": "offload_param"}


class DeepSpeedZeroConfig:
    """The section's values as attributes, under their present names, with DeepSpeed's defaults."""

    stage: int

    def __init__(self, **given: Any) -> None:
        """Raises ConfigError for an unknown key."""
        self.__dict__.update(DEFAULTS)
        self.leaf_module = DeepSpeedZeroLeafModuleConfig(**(given.pop("leaf_module", None) or {}))
        for key, value in given.items():
            if key not in KEYS:
                raise ConfigError(unknown("zero_optimization key", key, KEYS))
            self._set(key, value)
        self.__dict__.setdefault("overlap_comm", self.stage == 3)
        if self.stage == 3 and given.get("elastic_checkpoint"):
            logger.warning(
                "zero_optimization.elastic_checkpoint: elastic checkpointing is deprecated in ZeRO "
                "3; remove it, checkpoints resume on any number of ranks"
            )

    def _set(self, key: str, value: Any) -> None:
        name = key.removeprefix("stage3_").replace("gather_fp16", "gather_16bit")
        if name in _OLD:
            name, value = _OLD[name], {"device": "cpu"} if value else None
        if name in _OFFLOADS and isinstance(value, dict):
            value = _OFFLOADS[name](**value)
        setattr(self, name, value)
