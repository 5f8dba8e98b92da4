"""`deepspeed.utils`: whole masters, gradients and moments of one parameter, whatever the stage."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from glm_core.distributed.placement import Holder, flat
from glm_core.errors import ConfigError

logger = logging.getLogger("glm_core.deepspeed")


def log_dist(message: str, ranks: list[int] | None = None, level: int = logging.INFO) -> None:
    """Logs on the given ranks (None or -1: all)."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    if not ranks or -1 in ranks or rank in ranks:
        logger.log(level, message)


def _place(param: nn.Parameter) -> tuple[Any, Holder | None]:
    place = getattr(param, "glm_core_place", None)
    if place is None:
        raise ConfigError("safe_get_full_*: not a parameter of an engine; call initialize first")
    engine = place[0]
    return engine, next((h for h in engine.holders if any(p is param for p in h.params)), None)


def _full(param: nn.Parameter, of: Callable[[Any], Callable[[Any], Any]]) -> Tensor | None:
    engine, holder = _place(param)
    if holder is None:
        return None
    found = holder.full(param, of(engine))
    return None if found is None else found.float()


def safe_get_full_fp32_param(param: nn.Parameter) -> Tensor | None:
    """The float32 master; None for a frozen parameter. A collective: call it on all ranks."""
    return _full(param, lambda engine: lambda master: master)


def safe_get_full_grad(param: nn.Parameter) -> Tensor | None:
    """The reduced gradient, loss scale removed, between the last `backward` and `step`. A
    collective."""

    def of(engine: Any) -> Callable[[Any], Any]:
        return lambda m: None if m.grad is None else m.grad / engine.scaler.scale

    return _full(param, of)


def safe_get_full_optimizer_state(param: nn.Parameter, optim_state_key: str) -> Tensor | None:
    """`exp_avg`, `exp_avg_sq`, ...; None before the first step. A collective."""
    return _full(
        param, lambda engine: lambda m: engine.optimizer.state.get(m, {}).get(optim_state_key)
    )


@torch.no_grad()
def safe_set_full_fp32_param(param: nn.Parameter, value: Tensor) -> None:
    """The master, and the weights that follow from it, on all ranks; value the same on all."""
    _, holder = _place(param)
    if holder is None:
        raise ConfigError("safe_set_full_fp32_param: the parameter is frozen; set its data")
    for span in holder.spans(every_rank=True):
        if span.param is param:
            part = flat(span.master)[span.of_master]
            part.copy_(value.reshape(-1)[span.start : span.start + len(part)])
    holder.publish()
