"""Hands a whole decode step to C++ (csrc/bindings/decode_step.cpp)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glm_core.backends.cpu import supports
from glm_core.decode_step import Product, Rows, Stack
from glm_core.spec import Support


class CpuDecodeStep:
    """The kernels of one step, called in a row without Python or torch's dispatcher in between."""

    def __init__(self, stack: Stack, max_rows: int) -> None:
        self.max_rows = max_rows
        self._step = torch.classes.glm_core.DecodeStep(
            stack.num_heads,
            stack.num_kv_heads,
            stack.head_dim,
            stack.head_dim**-0.5,
            stack.norm_eps,
            stack.alpha,
            stack.deepnorm,
            stack.rope_interleaved,
            stack.activation,
        )
        for layer in stack.layers:
            products = layer[:4]
            self._step.add_layer(
                [t for p in products for t in _tensors(p)],
                [p.bits for p in products],
                [p.activation_bits for p in products],
                [t for norm in layer[4:] for t in norm or (None, None)],
            )
        head = stack.head
        self._step.set_ends(
            [stack.embedding, *stack.position_embeddings],
            list(stack.rotary() or (None, None)),
            list(stack.final_norm),
            _tensors(head),
            head.bits,
            head.activation_bits,
        )

    def __call__(self, rows: Rows, cache: Tensor) -> Tensor:
        logits: Tensor = self._step.step(*rows, cache)
        return logits


def supported(stack: Stack) -> Support:
    """Returns whether every op of the step would have a kernel, with the first obstacle."""
    weights = [stack.embedding, *stack.position_embeddings]
    weights += [t for n in stack.norms() for t in n] + [p.bias for p in stack.products()]
    weights += [p.weight for p in stack.products() if not p.bits]
    support = supports.takes(*weights)
    for p in stack.products() if support.ok else ():
        if p.scale is not None:
            width = p.weight.shape[1] * 8 // p.bits
            row = torch.empty(1, width, dtype=stack.final_norm.weight.dtype)
            quantized = supports.quantized_linear(row, p.weight, p.scale, p.bias, p.bits)
            support = supports.both(support, quantized)
    return support


def _tensors(p: Product) -> list[Any]:
    return [p.weight, p.scale, p.bias]
