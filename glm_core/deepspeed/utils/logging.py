"""Holds the logger that scripts share with the engine (`deepspeed.utils.logging`)."""

from __future__ import annotations

import logging
from typing import Any

import torch.distributed as dist

from glm_core.errors import ConfigError

logger = logging.getLogger("glm_core.deepspeed")


def set_log_level_from_string(log_level_str: str, custom_logger: Any = None) -> None:
    """Sets the level of the logger by name: debug, info, warning, error or critical."""
    level = getattr(logging, log_level_str.upper(), None)
    if not isinstance(level, int):
        raise ConfigError(f"log level {log_level_str!r}: use debug, info, warning, error, critical")
    (custom_logger or logger).setLevel(level)


def log_dist(message: str, ranks: list[int] | None = None, level: int = logging.INFO) -> None:
    """Logs on the given ranks; None or a -1 among them means all ranks."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    if not ranks or -1 in ranks or rank in ranks:
        logger.log(level, message)
