"""Decides which arguments the GPU kernels take; the reasons reach the user unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from glm_core import dispatch
from glm_core.backends.base import Backend
from glm_core.dispatch import Op
from glm_core.spec import SUPPORTED, Support, unsupported

_float32, _int64, _int32 = (torch.float32,), (torch.int64,), (torch.int32,)
FIXED: dict[str, dict[str, tuple[torch.dtype, ...]]] = {
    "rope": dict.fromkeys(("cos", "sin"), _float32),
    "embedding": {"ids": _int64},
    "attention": dict.fromkeys(("key_start", "key_end"), _int32),
    "linear_cross_entropy": {"token_weight": _float32, "labels": _int64},
    "adamw": dict.fromkeys(("params", "exp_avgs", "exp_avg_sqs", "grad_scale"), _float32),
    "quantized_linear": {"weight": (torch.int8,), "scale": (torch.float16, torch.float32)},
    "route": dict.fromkeys(("weight", "bias"), _float32),
    "permute": {"experts": _int64},
    "unpermute": {"order": _int64, "weights": _float32},
    "grouped_linear": {"counts": _int64},
    "quantized_grouped_linear": {
        "weight": (torch.int8,),
        "scale": (torch.float16, torch.float32),
        "counts": _int64,
    },
}
"""op -> parameters whose dtype is not the working dtype -> the dtypes each may have"""

EXACT = (
    *("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm", "gelu", "geglu", "swiglu"),
    *("rope", "embedding", "linear", "attention", "linear_cross_entropy", "global_norm", "adamw"),
    *("route", "permute", "unpermute", "grouped_linear"),
)
"""ops that have exact kernels (docs/exact.md)"""
EXACT_DTYPES = (torch.float32, torch.bfloat16)


def named(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yields every tensor of a call, those in lists too, with its parameter's name."""
    for name, value in (*zip(op.parameters, args, strict=False), *kwargs.items()):
        for t in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(t, Tensor):
                yield name, t


def takes(
    backend: Backend, op: Op, trouble: Callable[[], str] = lambda: ""
) -> Callable[..., Support]:
    """Returns the op's predicate: all tensors on one device of the backend's type and in one of its
    dtypes, except those whose dtype the op fixes. `trouble` says why there is no kernel, or ''."""
    rule = FIXED.get(op.name, {})

    def supports(*args: Any, **kwargs: Any) -> Support:
        if reason := trouble():
            return unsupported(reason)
        exact = dispatch.session().exact
        if exact and op.name not in EXACT:
            return unsupported("the backend has no exact kernel of it; leave exact out")
        dtypes = tuple(d for d in backend.dtypes if not exact or d in EXACT_DTYPES)
        first: Tensor | None = None
        working: torch.dtype | None = None
        for name, t in named(op, args, kwargs):
            first = t if first is None else first
            fixed = rule.get(name)
            if t.device.type != backend.device_type or t.device != first.device:
                where = f"{first.device} and {t.device}" if t is not first else str(t.device)
                return unsupported(
                    f"kernels take tensors on one {backend.device_type} device, received {where}"
                )
            if fixed is not None:
                if t.dtype not in fixed:
                    kinds = " or ".join(map(str, fixed))
                    return unsupported(f"kernels take {name} in {kinds}, received {t.dtype}")
                continue
            if t.dtype not in dtypes:
                kinds = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
                who = "exact kernels" if exact else "kernels"
                return unsupported(f"{who} take {kinds}, received {t.dtype}")
            working = working or t.dtype
            if t.dtype != working:
                return unsupported(f"kernels take one dtype, received {working} and {t.dtype}")
        return SUPPORTED

    return supports
