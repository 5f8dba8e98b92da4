"""Tells scripts a run's settings and state under DeepSpeed's names, and lets them change the batch
sizes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from glm_core.deepspeed.comm import get_local_rank
from glm_core.deepspeed.settings import Settings
from glm_core.errors import ConfigError
from glm_core.training.loss_scale import LossScale


class Accessors:
    """The part of the engine that only reads its state, under DeepSpeed's names."""

    settings: Settings
    optimizer: torch.optim.Optimizer | None
    scaler: LossScale
    dp_world_size: int
    dp_group: dist.ProcessGroup
    mpu: Any
    _norm: float | None
    _applied: bool

    def get_global_grad_norm(self) -> float | None:
        """Returns the gradient norm of the last update, before clipping and without the loss scale;
        None before the first."""
        return self._norm

    def get_lr(self) -> list[float]:
        """Returns one learning rate per parameter group."""
        return [] if self.optimizer is None else [g["lr"] for g in self.optimizer.param_groups]

    def get_mom(self) -> list[Any]:
        """Returns Adam's betas or SGD's momentum, per parameter group."""
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        return [g.get("betas", g.get("momentum")) for g in groups]

    @property
    def cur_scale(self) -> float:
        return self.scaler.scale

    def loss_scale(self) -> float:
        return self.scaler.scale

    def was_step_applied(self) -> bool:
        """Did the last `step` change the weights?"""
        return self._applied

    def train_batch_size(self) -> int:
        """Returns the samples per update, over all ranks."""
        return self.settings.train_batch

    def train_micro_batch_size_per_gpu(self) -> int:
        """Returns the samples per rank and micro-batch."""
        return self.settings.micro_batch

    def gradient_accumulation_steps(self) -> int:
        """Returns the micro-batches per update."""
        return self.settings.accumulation

    def get_batch_info(self) -> tuple[int, int, int]:
        """Returns train_batch_size, train_micro_batch_size_per_gpu, gradient_accumulation_steps."""
        s = self.settings
        return s.train_batch, s.micro_batch, s.accumulation

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Changes the number of micro-batches per update. Raises ConfigError where it would not be
        whole."""
        per_step = self.settings.micro_batch * self.dp_world_size
        if train_batch_size % per_step:
            raise ConfigError(
                f"train_batch_size={train_batch_size}: must be a multiple of {per_step}, the "
                "samples of one micro-batch on all ranks"
            )
        self.settings.train_batch = train_batch_size
        self.settings.accumulation = train_batch_size // per_step

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """Changes the rows of a micro-batch and keeps the number of micro-batches per update."""
        s = self.settings
        s.micro_batch = micro_batch_size
        s.train_batch = micro_batch_size * s.accumulation * self.dp_world_size

    def gradient_clipping(self) -> float:
        """Returns the largest gradient norm allowed; 0 means any."""
        return self.settings.clip

    def zero_optimization(self) -> bool:
        """Is the ZeRO stage 1 or more?"""
        return self.settings.stage > 0

    def zero_optimization_stage(self) -> int:
        """Returns the ZeRO stage, 0 to 3."""
        return self.settings.stage

    def zero_optimization_partition_gradients(self) -> bool:
        """Is the ZeRO stage 2 or 3?"""
        return self.settings.stage >= 2

    def zero_optimization_partition_weights(self) -> bool:
        """Is the ZeRO stage 3?"""
        return self.settings.stage == 3

    def zero_gather_16bit_weights_on_model_save(self) -> bool:
        """May `save_16bit_model` gather the weights in ZeRO 3?"""
        return self.settings.gather_on_save

    def fp16_enabled(self) -> bool:
        """Are the weights in float16?"""
        return self.settings.precision.compute == torch.float16

    def bfloat16_enabled(self) -> bool:
        """Are the weights in bfloat16?"""
        return self.settings.precision.compute == torch.bfloat16

    def dynamic_loss_scale(self) -> bool:
        """Does the loss scale change during the run?"""
        return self.scaler.dynamic

    def wall_clock_breakdown(self) -> bool:
        """Are the phases of an update timed?"""
        return bool(self.settings.raw.get("wall_clock_breakdown", False))

    def optimizer_name(self) -> str | None:
        """Returns the config's optimizer type; None where the script gave its own optimizer."""
        return self.settings.optimizer[0] if self.settings.optimizer else None

    def get_data_parallel_rank(self) -> int:
        """Returns this rank's number among those that train on other data."""
        return dist.get_rank(self.dp_group)

    def get_model_parallel_rank(self) -> int:
        """Returns this rank's number among those that share one replica; 0 without an mpu."""
        return 0 if self.mpu is None else int(self.mpu.get_model_parallel_rank())

    def get_sequence_parallel_group(self) -> dist.ProcessGroup | None:
        """Returns None: sequences are not split over ranks."""
        return None

    @property
    def data_parallel_group(self) -> dist.ProcessGroup:
        return self.dp_group

    @property
    def local_rank(self) -> int:
        return get_local_rank()

    @property
    def config(self) -> dict[str, Any]:
        """The config as the script gave it."""
        return self.settings.raw

    @property
    def global_rank(self) -> int:
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        """The number of ranks of the whole job."""
        return dist.get_world_size()
