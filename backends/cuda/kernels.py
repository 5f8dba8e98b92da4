"""The kernels of a GPU backend, CUDA and ROCm alike: the operators of csrc/, whose device half
torch picks by device; attention and matrix products by torch."""

from __future__ import annotations

from collections.abc import Callable

from glm_core import ops
from glm_core.backends.base import Backend
from glm_core.backends.cpu import backend as cpu
from glm_core.backends.cuda import attention
from glm_core.backends.cuda.extension import load
from glm_core.backends.cuda.supports import takes

TORCH = ("linear", "attention")
"""ops that torch's own libraries compute"""


def equip(backend: Backend, module: str) -> None:
    """Gives the backend its kernels; those of `module` say why where they are not built."""
    trouble = load(module, backend.name)
    share(backend, lambda: trouble)
    backend.implements(ops.linear, takes(backend, ops.linear))(cpu.kernels["linear"].function)
    supports = attention.supports(backend, takes(backend, ops.attention))
    backend.implements(ops.attention, supports)(attention.attention)


def share(backend: Backend, trouble: Callable[[], str] = lambda: "") -> None:
    """The operators of csrc/: one Python function serves every device."""
    for name, kernel in cpu.kernels.items():
        if name not in TORCH:
            op = ops.all_ops()[name]
            backend.implements(op, takes(backend, op, trouble))(kernel.function)
