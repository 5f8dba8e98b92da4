"""Which arguments the GPU kernels take; the reasons reach the user unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glm_core.backends.base import Backend
from glm_core.dispatch import Op
from glm_core.spec import SUPPORTED, Support, unsupported


class Rule(NamedTuple):
    """Parameters whose dtype is not the working dtype."""

    float32: tuple[str, ...] = ()
    int64: tuple[str, ...] = ()
    int32: tuple[str, ...] = ()

    def fixed(self, name: str) -> torch.dtype | None:
        """The dtype `name` must have, None for the working dtype."""
        dtypes = ("float32", "int64", "int32")
        return next((getattr(torch, d) for d in dtypes if name in getattr(self, d)), None)


RULES = {
    "rope": Rule(float32=("cos", "sin")),
    "embedding": Rule(int64=("ids",)),
    "attention": Rule(int32=("key_start", "key_end")),
    "linear_cross_entropy": Rule(float32=("token_weight",), int64=("labels",)),
    "adamw": Rule(float32=("params", "exp_avgs", "exp_avg_sqs", "grad_scale")),
}


def named(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a call with its parameter's name, those in lists too."""
    for name, value in (*zip(op.parameters, args, strict=False), *kwargs.items()):
        for t in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(t, Tensor):
                yield name, t


def takes(
    backend: Backend, op: Op, trouble: Callable[[], str] = lambda: ""
) -> Callable[..., Support]:
    """The kernels' rule: tensors on one device of the backend's type, floating ones in one of its
    dtypes, except those whose dtype the op fixes. `trouble` says why there are no kernels."""
    rule = RULES.get(op.name, Rule())

    def supports(*args: Any, **kwargs: Any) -> Support:
        if reason := trouble():
            return unsupported(reason)
        first: Tensor | None = None
        working: torch.dtype | None = None
        for name, t in named(op, args, kwargs):
            first = t if first is None else first
            fixed = rule.fixed(name)
            if t.device.type != backend.device_type or t.device != first.device:
                where = f"{first.device} and {t.device}" if t is not first else str(t.device)
                return unsupported(
                    f"kernels take tensors on one {backend.device_type} device, received {where}"
                )
            if fixed is not None:
                if t.dtype != fixed:
                    return unsupported(f"kernels take {name} in {fixed}, received {t.dtype}")
                continue
            if t.dtype not in backend.dtypes:
                return unsupported(f"{_kinds(backend)}, received {t.dtype}")
            working = working or t.dtype
            if t.dtype != working:
                return unsupported(f"kernels take one dtype, received {working} and {t.dtype}")
        return SUPPORTED

    return supports


def _kinds(backend: Backend) -> str:
    return "kernels take " + ", ".join(str(d).removeprefix("torch.") for d in backend.dtypes)
