"""Holds the logger that scripts share with the engine (`deepspeed.utils.logging`)."""

from __future__ import annotations

import logging

import torch.distributed as dist

logger = logging.getLogger("glm_core.deepspeed")


def log_dist(message: str, ranks: list[int] | None = None, level: int = logging.INFO) -> None:
    """Logs on the given ranks; None or a -1 among them means all ranks."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    if not ranks or -1 in ranks or rank in ranks:
        logger.log(level, message)
