"""The kernels of a GPU backend, CUDA and ROCm alike: the operators of csrc/, whose device half
torch picks by device; attention and matrix products by torch. Where csrc/ is not built, Triton
kernels for the ops that have them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from glm_core import ops
from glm_core.backends.base import Backend
from glm_core.backends.cpu import backend as cpu
from glm_core.backends.cuda import attention
from glm_core.backends.cuda.extension import load
from glm_core.backends.cuda.supports import takes

SHARED = (
    "rms_norm",
    "layer_norm",
    "add_rms_norm",
    "add_layer_norm",
    "gelu",
    "geglu",
    "swiglu",
    "rope",
    "embedding",
    "quantized_linear",
    "linear_cross_entropy",
    "global_norm",
    "adamw",
)
"""ops whose operators have a device half in csrc/bindings/cuda"""


def equip(backend: Backend, module: str) -> None:
    """Gives the backend its kernels; those of `module` say why where they are not built."""
    trouble = load(module, backend.name)
    covered = _in_triton() if trouble else ()
    share(backend, lambda op: "" if op in covered else trouble)
    backend.implements(ops.linear, takes(backend, ops.linear))(linear)
    supports = attention.supports(backend, takes(backend, ops.attention))
    backend.implements(ops.attention, supports)(attention.attention)


_kept: list[Any] = []


def _in_triton() -> tuple[str, ...]:
    """The ops that Triton kernels serve from now on: none without a device, Triton or operators."""
    if not (torch.cuda.is_available() and find_spec("triton") and cpu.probe().ok):
        return ()
    from glm_core.backends import triton_ops

    _kept.append(triton_ops.register("CUDA"))
    return triton_ops.OPS


def share(backend: Backend, trouble: Callable[[str], str] = lambda op: "") -> None:
    """The operators of csrc/: one Python function serves every device. `trouble` says why an op has
    no kernel here."""
    for name in filter(cpu.kernels.__contains__, SHARED):
        op = ops.all_ops()[name]
        needs = takes(backend, op, partial(trouble, name))
        backend.implements(op, needs)(cpu.kernels[name].function)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.nn.functional.linear(x, weight, bias)
