"""Reads and sets one parameter's master, gradient or moment (`deepspeed.utils.tensor_fragment`):
the whole tensor (`safe_*_full_*`) or this rank's part of it (`safe_*_local_*`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from glm_core.distributed.placement import MasterStore, Select, flat
from glm_core.errors import ConfigError


def _engine_and_store(param: nn.Parameter, call: str) -> tuple[Any, MasterStore | None]:
    """Returns the parameter's engine and master store; a frozen parameter has no store."""
    place = getattr(param, "glm_core_place", None)
    if place is None:
        raise ConfigError(f"{call}: the parameter belongs to no engine; call initialize first")
    engine = place[0]
    return engine, next((s for s in engine.stores if any(p is param for p in s.params)), None)


def _master(engine: Any) -> Select:
    return lambda master: master


def _grad(engine: Any) -> Select:
    return lambda master: master.grad


def _moment(key: str) -> Callable[[Any], Select]:
    return lambda engine: lambda master: engine.optimizer.state.get(master, {}).get(key)


def _full(param: nn.Parameter, call: str, select: Callable[[Any], Select]) -> Tensor | None:
    engine, store = _engine_and_store(param, call)
    value = None if store is None else store.full(param, select(engine))
    return None if value is None else value.float()


def safe_get_full_fp32_param(param: nn.Parameter) -> Tensor | None:
    """Returns the float32 master, None for a frozen parameter. A collective: call it on all
    ranks."""
    return _full(param, "safe_get_full_fp32_param", _master)


def safe_get_full_grad(param: nn.Parameter) -> Tensor | None:
    """Returns the reduced gradient without the loss scale; it exists between an update's last
    `backward` and its `step`. Inside `no_sync` it is this rank's own sum. A collective."""
    engine, store = _engine_and_store(param, "safe_get_full_grad")
    if engine.inside_no_sync_ctxt and store is not None and engine.settings.stage < 3:
        return store.unreduced(param).detach().float() / engine.scaler.scale  # type: ignore[attr-defined]  # not in Zero3Store
    grad = _full(param, "safe_get_full_grad", _grad)
    return None if grad is None else grad / engine.scaler.scale


def safe_get_full_optimizer_state(param: nn.Parameter, optim_state_key: str) -> Tensor | None:
    """Returns a moment (`exp_avg`, `exp_avg_sq`, ...), None before the first step. A collective."""
    return _full(param, "safe_get_full_optimizer_state", _moment(optim_state_key))


@torch.no_grad()
def _set_full(
    param: nn.Parameter, value: Tensor, call: str, select: Callable[[Any], Select]
) -> MasterStore:
    """Copies this rank's part of `value` into the selected tensor."""
    engine, store = _engine_and_store(param, call)
    if store is None:
        raise ConfigError(f"{call}: the parameter is frozen; set its data")
    for span in store.spans(every_rank=True):
        if span.param is param:
            target = select(engine)(span.master)
            if target is None:
                raise ConfigError(f"{call}: there is none yet; call it after backward or step")
            span.copy_from(value, flat(target))
    return store


def safe_set_full_fp32_param(param: nn.Parameter, value: Tensor) -> None:
    """Sets the master, and the weights that follow from it. Call it on all ranks with the same
    value."""
    _set_full(param, value, "safe_set_full_fp32_param", _master).publish()


def safe_set_full_optimizer_state(param: nn.Parameter, value: Tensor, optim_state_key: str) -> None:
    """Sets a moment. Call it on all ranks with the same value."""
    _set_full(param, value, "safe_set_full_optimizer_state", _moment(optim_state_key))


def safe_set_full_grad(param: nn.Parameter, value: Tensor) -> None:
    """Sets the reduced gradient between an update's last `backward` and its `step`. Call it on all
    ranks with the same value."""
    scale = _engine_and_store(param, "safe_set_full_grad")[0].scaler.scale
    _set_full(param, value * scale, "safe_set_full_grad", _grad)


def safe_update_full_grad_vectorized(
    param_list: Iterable[nn.Parameter], update_func: Callable[[Tensor, nn.Parameter], Tensor]
) -> None:
    """Sets the reduced gradient of each parameter to update_func(gradient, parameter), where it has
    one. A collective."""
    for param in param_list:
        if param.requires_grad and (grad := safe_get_full_grad(param)) is not None:
            safe_set_full_grad(param, update_func(grad, param))


def _local(param: nn.Parameter, call: str, select: Callable[[Any], Select]) -> Tensor | None:
    """Returns this rank's part as a vector that shares its memory; empty where it has none."""
    engine, store = _engine_and_store(param, call)
    if engine.settings.stage != 3:
        raise ConfigError(f"{call}: only ZeRO 3 has parts of parameters; use safe_get_full_*")
    value = None if store is None else select(engine)(store.master(param))  # type: ignore[attr-defined]  # Zero3Store's
    return None if value is None else flat(value)


def _set_local(
    param: nn.Parameter, value: Tensor, call: str, select: Callable[[Any], Select]
) -> None:
    part = _local(param, call, select)
    if part is None or part.numel() != value.numel():
        have = "none" if part is None else f"{part.numel()} elements"
        raise ConfigError(
            f"{call}: this rank's part has {have}, received {value.numel()}; give as many"
        )
    part.copy_(value.reshape(-1))


def safe_get_local_fp32_param(param: nn.Parameter) -> Tensor | None:
    """Returns this rank's rows of the master as a vector. (DeepSpeed instead cuts the flattened
    parameter into equal parts, the last one padded.)"""
    return _local(param, "safe_get_local_fp32_param", _master)


def safe_get_local_grad(param: nn.Parameter) -> Tensor | None:
    """Returns this rank's rows of the reduced gradient, without the loss scale."""
    grad = _local(param, "safe_get_local_grad", _grad)
    return None if grad is None else grad / _engine_and_store(param, "")[0].scaler.scale


def safe_get_local_optimizer_state(param: nn.Parameter, optim_state_key: str) -> Tensor | None:
    """Returns this rank's rows of a moment."""
    return _local(param, "safe_get_local_optimizer_state", _moment(optim_state_key))


def safe_set_local_fp32_param(param: nn.Parameter, value: Tensor) -> None:
    """Sets the rows that safe_get_local_fp32_param returns."""
    _set_local(param, value, "safe_set_local_fp32_param", _master)
    store = _engine_and_store(param, "safe_set_local_fp32_param")[1]
    assert store is not None  # else there were no rows to set
    store.publish()


def safe_set_local_grad(param: nn.Parameter, value: Tensor) -> None:
    """Sets the rows that safe_get_local_grad returns."""
    scale = _engine_and_store(param, "safe_set_local_grad")[0].scaler.scale
    _set_local(param, value * scale, "safe_set_local_grad", _grad)


def safe_set_local_optimizer_state(
    param: nn.Parameter, value: Tensor, optim_state_key: str
) -> None:
    """Sets the rows that safe_get_local_optimizer_state returns."""
    _set_local(param, value, "safe_set_local_optimizer_state", _moment(optim_state_key))
