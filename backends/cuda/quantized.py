"""Decides which products with quantised weights are one Triton kernel, and makes it an operator of
torch: autograd, fake tensors and torch.compile see it like any other.

Shapes: W width, F outputs, G groups of a row."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from glm_core.backends.cpu import backend as cpu
from glm_core.backends.cuda import probe
from glm_core.backends.cuda.attention import HAS_TRITON, MATRIX_CORES

MANY_ROWS = 64
"""csrc/cuda has kernels of its own for so many rows, which wait for memory alone"""
TRITON_SINCE = (3, 6)
"""the oldest Triton whose code for the kernel was seen to spill no registers; that of 3.3 does"""
LEAST_GROUP = 32
"""inputs; a group is a multiple of it"""


def product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, bits: int) -> Tensor:
    """Returns x (codes scale)^T + bias, [..., F]."""
    from glm_core.backends.cuda import quantized_product

    return quantized_product.product(x, weight, scale, bias, bits)


def _fake(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, bits: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, scale, _, ctx.bits = inputs
    ctx.save_for_backward(weight, scale)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    backward = torch.ops.glm_core.quantized_linear_backward.default
    return backward(dy, *ctx.saved_tensors, ctx.bits), None, None, None, None


_library = torch.library.Library("glm_core_gpu", "FRAGMENT")
"""torch drops the operator with this object"""
_library.define(
    "quantized_product(Tensor x, Tensor weight, Tensor scale, Tensor? bias, int bits) -> Tensor"
)
_library.impl("quantized_product", product, "CUDA")
torch.library.register_fake("glm_core_gpu::quantized_product", _fake, lib=_library)
torch.library.register_autograd(
    "glm_core_gpu::quantized_product", _gradients, setup_context=_keep, lib=_library
)


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    bits: int = 8,
    activation_bits: int = 16,
) -> Tensor:
    """Calls the Triton kernel for many rows in half precision, and csrc's operator for others."""
    y: Tensor
    if activation_bits == 16 and in_one_kernel(x, scale):
        y = torch.ops.glm_core_gpu.quantized_product.default(x, weight, scale, bias, bits)
    else:
        function = cpu.kernels["quantized_linear"].function
        y = function(x, weight, scale, bias, bits, activation_bits)
    return y


def in_one_kernel(x: Tensor, scale: Tensor) -> bool:
    """Returns whether the Triton kernel takes the product."""
    many = x.dtype != torch.float32 and x.numel() > MANY_ROWS * x.shape[-1]
    groups = 1 if scale.ndim == 1 else scale.shape[1]
    if not (many and HAS_TRITON and x.shape[-1] // groups % LEAST_GROUP == 0):
        return False
    known = x.is_cuda and not torch.compiler.is_compiling() and not is_fake(x)
    return not known or suits(x.device.index or 0)


@functools.cache
def suits(index: int) -> bool:
    """Returns whether the chip multiplies both halves by tensor cores, and Triton compiles well for
    it."""
    import triton

    chip = probe.architecture(index)
    cores = int(chip[3:]) >= 80 if chip.startswith("sm_") else chip in MATRIX_CORES
    return cores and tuple(map(int, triton.__version__.split(".")[:2])) >= TRITON_SINCE
