"""Gives the GPU backends kernels for the parts of a layer of experts. They are Triton kernels for
the operators that csrc/bindings/experts.cpp declares, so autograd, fake tensors and torch.compile
are the CPU's."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from glm_core import dispatch, ops
from glm_core.backends.base import Backend
from glm_core.backends.cpu import backend as cpu
from glm_core.backends.cuda import probe
from glm_core.backends.cuda.attention import HAS_TRITON, chip_trouble
from glm_core.backends.cuda.supports import EXACT_DTYPES, takes
from glm_core.spec import Support, unsupported

MODULES = {
    "route": "expert_rows",
    "permute": "expert_rows",
    "unpermute": "expert_rows",
    "grouped_linear": "grouped_product",
    "quantized_grouped_linear": "grouped_codes",
}
"""op -> the module whose functions OP_forward and OP_backward run it"""
LEAST_GROUP = 32
"""inputs; a group of codes that share a scale is a multiple of it, or a whole row"""


def device_half(module: str, name: str) -> Callable[..., Any]:
    """Returns what runs an operator on a GPU: in exact runs csrc's kernels, else Triton's, which
    are imported when it is called."""

    def call(*args: Any) -> Any:
        ours = getattr(torch.ops.glm_core, f"exact_{name}", None)
        if ours and args[0].dtype in EXACT_DTYPES and torch.ops.glm_core.exact():
            return ours.default(*args)
        return getattr(import_module(f"glm_core.backends.cuda.{module}"), name)(*args)

    return call


@cache
def register() -> Any:
    """Registers the kernels with torch once, and returns the library that holds them."""
    library = torch.library.Library("glm_core", "IMPL")
    for op, module in MODULES.items():
        for name in (f"{op}_forward", f"{op}_backward"):
            library.impl(name, device_half(module, name), "CUDA")
    return library


def equip(backend: Backend) -> None:
    """Gives the backend the five ops where the operators are built; without them it has none."""
    if not cpu.probe().ok:
        return
    register()
    for name in MODULES:
        op = ops.all_ops()[name]
        rule = _groups if name == "quantized_grouped_linear" else _any
        backend.implements(op, _supports(takes(backend, op), rule))(cpu.kernels[name].function)


def _supports(takes: Callable[..., Support], rule: Callable[..., str]) -> Callable[..., Support]:
    """Returns an op's predicate; `rule` gives a reason of the op's own, or ''."""

    def supports(*args: Any, **kwargs: Any) -> Support:
        support = takes(*args, **kwargs)
        if not support.ok:
            return support
        if dispatch.session().exact:  # whose kernels are not Triton's
            return support
        first = next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
        reason = _trouble(first) or rule(*args, **kwargs)
        return unsupported(reason) if reason else support

    return supports


def _trouble(x: Tensor) -> str:
    """Says why Triton's kernels cannot run for a tensor; '' where they can."""
    if not HAS_TRITON:
        return "the kernels of experts need Triton, which is not installed; pip install triton"
    if x.is_cuda and not torch.compiler.is_compiling() and not is_fake(x):
        return chip_trouble(probe.architecture(x.device.index or 0))
    return ""


def _any(*args: Any, **kwargs: Any) -> str:
    return ""


def _groups(
    rows: Tensor,
    weight: Tensor,
    scale: Tensor,
    counts: Tensor,
    bits: int = 8,
    activation_bits: int = 16,
) -> str:
    """Requires groups that a step of the kernel divides."""
    group = rows.shape[-1] // (scale.shape[2] if scale.dim() == 3 else 1)
    if scale.dim() == 3 and scale.shape[2] > 1 and group % LEAST_GROUP:
        return f"kernels take groups of {LEAST_GROUP} n inputs, received {group}"
    return ""
