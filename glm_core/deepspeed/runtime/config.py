"""Shows a config's settings under DeepSpeed's names (`deepspeed.runtime.config`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from glm_core.deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from glm_core.deepspeed.settings import BadConfig, batches, read, resolve
from glm_core.errors import ConfigError

DeepSpeedConfigError = BadConfig
ADAM_OPTIMIZER, ADAMW_OPTIMIZER, LAMB_OPTIMIZER = "adam", "adamw", "lamb"
ADAGRAD_OPTIMIZER, LION_OPTIMIZER = "adagrad", "lion"
"""the config's names, for scripts that import them"""


class DeepSpeedConfig:
    """A config, read and judged as `initialize` does it. Attributes are the values in force, with
    DeepSpeed's defaults."""

    def __init__(
        self, config: str | Path | Mapping[str, Any], mpu: Any = None, mesh_device: Any = None
    ) -> None:
        """Raises ConfigError with all problems of the config."""
        group = None if mpu is None else mpu.get_data_parallel_group()
        self.world_size = dist.get_world_size(group) if dist.is_initialized() else 1
        self._param_dict = read(config if isinstance(config, Mapping) else str(config))
        s = resolve(self._param_dict, self.world_size)
        self.train_batch_size: int | None = s.train_batch
        self.train_micro_batch_size_per_gpu: int | None = s.micro_batch
        self.gradient_accumulation_steps: int | None = s.accumulation
        self.managed_gradient_accumulation = s.managed
        self.gradient_clipping = s.clip
        self.gradient_allreduce_op = "mean" if s.divide_by_ranks else "sum"
        self.prescale_gradients = s.predivide != 1
        self.gradient_predivide_factor = s.predivide
        self.steps_per_print = s.steps_per_print
        self.dataloader_drop_last = s.drop_last
        self.load_universal_checkpoint = s.load_universal
        self.optimizer_name = s.optimizer[0] if s.optimizer else None
        self.optimizer_params = s.optimizer[1] if s.optimizer else None
        self.scheduler_name = s.scheduler[0] if s.scheduler else None
        self.scheduler_params = s.scheduler[1] if s.scheduler else None
        self.float16_enabled = self.fp16_enabled = s.precision.compute == torch.float16
        self.bfloat16_enabled = s.precision.compute == torch.bfloat16
        self.zero_config = DeepSpeedZeroConfig(**self._param_dict.get("zero_optimization", {}))
        self.zero_optimization_stage, self.zero_enabled = s.stage, s.stage > 0
        self.wall_clock_breakdown = bool(self._param_dict.get("wall_clock_breakdown", False))

    def _configure_train_batch_size(self) -> None:
        """Computes the batch sizes that are None from the others. Raises BadConfig."""
        names = (
            "train_batch_size",
            "train_micro_batch_size_per_gpu",
            "gradient_accumulation_steps",
        )
        try:
            found = batches({n: getattr(self, n) for n in names}, self.world_size)
        except ConfigError as error:
            raise BadConfig(str(error)) from None
        for name, value in zip(names, ("train_batch", "micro_batch", "accumulation"), strict=True):
            setattr(self, name, found[value])

    def print_user_config(self) -> None:
        """Prints the config as it was given."""
        print(self._param_dict)
