"""Runs training scripts written for DeepSpeed on torch's own parts and any glm_core backend:
`import glm_core.deepspeed as deepspeed`. docs/deepspeed.md lists what is supported. Modules lie at
DeepSpeed's own paths; those it does not have are accounted for in keys.py (config keys),
settings.py, names.py (absent modules) and notices.py."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset

from glm_core.deepspeed import comm, names, ops, pipe, runtime, utils
from glm_core.deepspeed.accelerator import get_accelerator
from glm_core.deepspeed.comm import init_distributed
from glm_core.deepspeed.runtime import zero
from glm_core.deepspeed.runtime.activation_checkpointing import checkpointing
from glm_core.deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from glm_core.deepspeed.runtime.engine import DeepSpeedEngine
from glm_core.deepspeed.runtime.pipe.engine import PipelineEngine
from glm_core.deepspeed.runtime.pipe.module import PipelineModule
from glm_core.deepspeed.runtime.reduction import MisplacedCall
from glm_core.deepspeed.settings import BadConfig, read, resolve
from glm_core.deepspeed.utils import zero_to_fp32 as zero_to_fp32  # utils.zero_to_fp32 for scripts
from glm_core.errors import ConfigError

__version__ = version = "0.19.8"
"""the DeepSpeed whose interface this is; scripts compare it"""
names.install()

__all__ = [
    "DeepSpeedConfig",
    "DeepSpeedConfigError",
    "DeepSpeedEngine",
    "PipelineEngine",
    "PipelineModule",
    "add_config_arguments",
    "checkpointing",
    "comm",
    "get_accelerator",
    "init_distributed",
    "initialize",
    "ops",
    "pipe",
    "runtime",
    "utils",
    "zero",
]


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Dataset[Any] | None = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Any = None,
    config: str | Path | Mapping[str, Any] | None = None,
    mesh_param: Any = None,
    config_params: str | Path | Mapping[str, Any] | None = None,
) -> tuple[DeepSpeedEngine, Any, Any, Any]:
    """Returns the engine, the optimizer, the dataloader (None without training_data) and the
    lr_scheduler. The config is the first of config, config_params, args.deepspeed_config that is
    given. Raises ConfigError."""
    if model is None:
        raise BadConfig("initialize: no model; pass model=")
    if mesh_param is not None:
        raise ConfigError("initialize: mesh_param would split sequences over ranks; remove it")
    comm.init_distributed(distributed_port=distributed_port, dist_init_required=dist_init_required)
    if not dist.is_initialized():
        raise ConfigError(
            "initialize: dist_init_required=False, but there is no process group; call "
            "init_distributed"
        )
    config = config if config is not None else config_params
    config = config if config is not None else getattr(args, "deepspeed_config", None)
    if config is None:
        raise BadConfig("initialize: no config; pass config= or args.deepspeed_config")
    if isinstance(model, PipelineModule):
        if mpu is not None:
            raise ConfigError("initialize: a PipelineModule brings its own mpu; remove mpu=")
        mpu = model.mpu()
    ranks = dist.get_world_size(None if mpu is None else mpu.get_data_parallel_group())
    settings = resolve(read(config), ranks)
    if isinstance(model, PipelineModule) and not settings.managed:
        raise MisplacedCall(
            "managed_gradient_accumulation=False is not supported with pipeline parallelism; "
            "remove it, train_batch is one update"
        )
    kind: Any = PipelineEngine if isinstance(model, PipelineModule) else DeepSpeedEngine
    engine: DeepSpeedEngine = kind(
        model,
        settings,
        optimizer=optimizer,
        model_parameters=model_parameters,
        lr_scheduler=lr_scheduler,
        mpu=mpu,
    )
    if training_data is not None and isinstance(engine, PipelineEngine):
        engine.set_training_data(training_data, collate_fn)
    elif training_data is not None:
        engine.training_dataloader = engine.deepspeed_io(training_data, collate_fn=collate_fn)
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds --deepspeed and --deepspeed_config to a parser and returns it."""
    group = parser.add_argument_group("DeepSpeed")
    group.add_argument(
        "--deepspeed", action="store_true", help="has no effect: the engine is always on"
    )
    group.add_argument("--deepspeed_config", type=str, help="the config, a JSON file")
    return parser


def __getattr__(name: str) -> Any:
    raise names.absent(name)
