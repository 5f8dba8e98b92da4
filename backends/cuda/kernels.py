"""Gives a GPU backend, CUDA or ROCm, its kernels. Most are the operators of csrc/, whose device
half torch picks by the tensors' device; attention and the ops of experts are ours in Triton, matrix
products are torch's.
Where csrc/ is not built, Triton kernels stand in for the ops that have them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from glm_core import dispatch, ops
from glm_core.backends.base import Backend
from glm_core.backends.cpu import backend as cpu
from glm_core.backends.cpu.extension import exact as exact_sums
from glm_core.backends.cuda import attention, experts, quantized
from glm_core.backends.cuda.extension import load
from glm_core.backends.cuda.supports import EXACT, EXACT_DTYPES, takes
from glm_core.backends.exact import Exact

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
FEW_ROWS = 8
"""rows that share one read of a weight in half precision; torch's product takes more"""


def equip(backend: Backend, module: str) -> None:
    """Gives the backend its kernels. Where `module` is not built, its ops refuse calls and say
    why."""
    trouble = load(module, backend.name)
    if not trouble:
        backend.exact = exact_kernels(backend)
    covered = _in_triton() if trouble else ()
    share(backend, lambda op: "" if op in covered else trouble)
    backend.implements(ops.linear, takes(backend, ops.linear))(linear if trouble else linear_few)
    if not trouble:
        needs = takes(backend, ops.quantized_linear)
        backend.implements(ops.quantized_linear, needs)(quantized.quantized_linear)
    supports = attention.supports(takes(backend, ops.attention))
    backend.implements(ops.attention, supports)(attention.attention)
    experts.equip(backend)


def exact_kernels(backend: Backend) -> Exact:
    """Returns what a backend with csrc's kernels sums exactly, in the dtypes it computes in. It
    lacks `balance_weight`, too: the experts' auxiliary loss is written in torch's operators, whose
    sums differ from device to device."""
    dtypes = tuple(d for d in EXACT_DTYPES if d in backend.dtypes)
    lacks = (*(name for name in ops.all_ops() if name not in EXACT), "balance_weight")
    return Exact(exact_sums, dtypes, lacks, plans=False)


_registrations: list[Any] = []
"""torch drops a registration with the object that made it"""


def _in_triton() -> tuple[str, ...]:
    """Registers the Triton kernels and returns the ops they serve; none without a device, Triton or
    the operators."""
    if not (torch.cuda.is_available() and find_spec("triton") and cpu.probe().ok):
        return ()
    from glm_core.backends import triton_ops

    _registrations.append(triton_ops.register("CUDA"))
    return triton_ops.OPS


def share(backend: Backend, trouble: Callable[[str], str] = lambda op: "") -> None:
    """Gives the backend the CPU backend's functions, since one operator serves every device.
    `trouble` says why an op has no kernel here, '' where it has one."""
    for name in filter(cpu.kernels.__contains__, SHARED):
        op = ops.all_ops()[name]
        needs = takes(backend, op, partial(trouble, name))
        backend.implements(op, needs)(cpu.kernels[name].function)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.nn.functional.linear(x, weight, bias)


def linear_few(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Calls our kernels for a few rows in half precision, as in decoding, and in exact runs."""
    if dispatch.session().exact:
        exact: Tensor = torch.ops.glm_core.linear.default(x, weight, bias)
        return exact
    differentiated = any(t is not None and t.requires_grad for t in (x, weight, bias))
    few = x.dtype != torch.float32 and x.numel() <= FEW_ROWS * x.shape[-1]
    if (differentiated and torch.is_grad_enabled()) or not few:
        return torch.nn.functional.linear(x, weight, bias)
    y: Tensor = torch.ops.glm_core.linear_few.default(x, weight, bias)
    return y
