"""`deepspeed.utils`: masters, gradients and moments of one parameter, whole or this rank's part,
whatever the stage."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from glm_core.deepspeed.runtime.dataloader import RepeatingLoader as RepeatingLoader
from glm_core.deepspeed.settings import say_once
from glm_core.distributed.placement import Holder, flat
from glm_core.errors import ConfigError

logger = logging.getLogger("glm_core.deepspeed")
Of = Callable[[nn.Parameter], Tensor | None]
"""of a master: itself, its gradient, or a moment"""


def log_dist(message: str, ranks: list[int] | None = None, level: int = logging.INFO) -> None:
    """Logs on the given ranks (None or -1: all)."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    if not ranks or -1 in ranks or rank in ranks:
        logger.log(level, message)


def set_z3_leaf_modules(model: nn.Module, leaf_module_classes: list[Any]) -> list[nn.Module]:
    """No effect: FSDP2 gathers the layers of a ModuleList whole already. The modules meant."""
    say_once("set_z3_leaf_modules has no effect: whole layers are gathered at once anyway")
    kinds = tuple(k for k in leaf_module_classes if isinstance(k, type))
    return [m for m in model.modules() if isinstance(m, kinds)]


def _place(param: nn.Parameter, call: str) -> tuple[Any, Holder | None]:
    place = getattr(param, "glm_core_place", None)
    if place is None:
        raise ConfigError(f"{call}: not a parameter of an engine; call initialize first")
    engine = place[0]
    return engine, next((h for h in engine.holders if any(p is param for p in h.params)), None)


def _master(engine: Any) -> Of:
    return lambda master: master


def _grad(engine: Any) -> Of:
    return lambda master: master.grad


def _moment(key: str) -> Callable[[Any], Of]:
    return lambda engine: lambda master: engine.optimizer.state.get(master, {}).get(key)


def _full(param: nn.Parameter, call: str, of: Callable[[Any], Of]) -> Tensor | None:
    engine, holder = _place(param, call)
    found = None if holder is None else holder.full(param, of(engine))
    return None if found is None else found.float()


def safe_get_full_fp32_param(param: nn.Parameter) -> Tensor | None:
    """The float32 master; None for a frozen parameter. A collective: call it on all ranks."""
    return _full(param, "safe_get_full_fp32_param", _master)


def safe_get_full_grad(param: nn.Parameter) -> Tensor | None:
    """The reduced gradient, loss scale removed, between the last `backward` and `step`. A
    collective."""
    found = _full(param, "safe_get_full_grad", _grad)
    return None if found is None else found / _place(param, "")[0].scaler.scale


def safe_get_full_optimizer_state(param: nn.Parameter, optim_state_key: str) -> Tensor | None:
    """`exp_avg`, `exp_avg_sq`, ...; None before the first step. A collective."""
    return _full(param, "safe_get_full_optimizer_state", _moment(optim_state_key))


@torch.no_grad()
def _set_full(param: nn.Parameter, value: Tensor, call: str, of: Callable[[Any], Of]) -> Holder:
    """This rank's part of `value` into what `of` selects."""
    engine, holder = _place(param, call)
    if holder is None:
        raise ConfigError(f"{call}: the parameter is frozen; set its data")
    for span in holder.spans(every_rank=True):
        if span.param is param:
            target = of(engine)(span.master)
            if target is None:
                raise ConfigError(f"{call}: there is none yet; call it after backward or step")
            part = flat(target)[span.of_master]
            part.copy_(value.reshape(-1)[span.start : span.start + len(part)])
    return holder


def safe_set_full_fp32_param(param: nn.Parameter, value: Tensor) -> None:
    """The master, and the weights that follow from it, on all ranks; value the same on all."""
    _set_full(param, value, "safe_set_full_fp32_param", _master).publish()


def safe_set_full_optimizer_state(param: nn.Parameter, value: Tensor, optim_state_key: str) -> None:
    """A moment, on all ranks; value the same on all."""
    _set_full(param, value, "safe_set_full_optimizer_state", _moment(optim_state_key))


def safe_set_full_grad(param: nn.Parameter, value: Tensor) -> None:
    """The reduced gradient, between the last `backward` and `step`, on all ranks."""
    scale = _place(param, "safe_set_full_grad")[0].scaler.scale
    _set_full(param, value * scale, "safe_set_full_grad", _grad)


def _local(param: nn.Parameter, call: str, of: Callable[[Any], Of]) -> Tensor | None:
    """This rank's part, a vector that shares its memory; empty where it has none."""
    engine, holder = _place(param, call)
    if engine.settings.stage != 3:
        raise ConfigError(f"{call}: only ZeRO 3 has parts of parameters; use safe_get_full_*")
    found = None if holder is None else of(engine)(param)
    return None if found is None else flat(found)


def _set_local(param: nn.Parameter, value: Tensor, call: str, of: Callable[[Any], Of]) -> None:
    part = _local(param, call, of)
    if part is None or part.numel() != value.numel():
        have = "none" if part is None else f"{part.numel()} elements"
        raise ConfigError(f"{call}: this rank's part has {have}, received {value.numel()}")
    part.copy_(value.reshape(-1))


def safe_get_local_fp32_param(param: nn.Parameter) -> Tensor | None:
    """This rank's rows of the master, as a vector (DeepSpeed cuts the flat parameter into equal
    parts instead, the last one padded)."""
    return _local(param, "safe_get_local_fp32_param", _master)


def safe_get_local_grad(param: nn.Parameter) -> Tensor | None:
    """This rank's rows of the reduced gradient, loss scale removed."""
    found = _local(param, "safe_get_local_grad", _grad)
    return None if found is None else found / _place(param, "")[0].scaler.scale


def safe_get_local_optimizer_state(param: nn.Parameter, optim_state_key: str) -> Tensor | None:
    """This rank's rows of a moment."""
    return _local(param, "safe_get_local_optimizer_state", _moment(optim_state_key))


def safe_set_local_fp32_param(param: nn.Parameter, value: Tensor) -> None:
    """As safe_get_local_fp32_param."""
    _set_local(param, value, "safe_set_local_fp32_param", _master)


def safe_set_local_grad(param: nn.Parameter, value: Tensor) -> None:
    """As safe_get_local_grad."""
    scale = _place(param, "safe_set_local_grad")[0].scaler.scale
    _set_local(param, value * scale, "safe_set_local_grad", _grad)


def safe_set_local_optimizer_state(
    param: nn.Parameter, value: Tensor, optim_state_key: str
) -> None:
    """As safe_get_local_optimizer_state."""
    _set_local(param, value, "safe_set_local_optimizer_state", _moment(optim_state_key))
