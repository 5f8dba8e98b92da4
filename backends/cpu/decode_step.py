"""Hands a whole decode step to C++ (csrc/bindings/decode_step.cpp)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from glm_core.backends.cpu import supports
from glm_core.decode_step import (
    MLP,
    Experts,
    LatentAttention,
    Layer,
    Norm,
    Product,
    Rows,
    Stack,
)
from glm_core.spec import Support


class CpuDecodeStep:
    """The kernels of one step, called in a row without Python or torch's dispatcher in between."""

    def __init__(self, stack: Stack, max_rows: int) -> None:
        self.max_rows = max_rows
        first = stack.layers[0].attention
        kv_heads, key_dim = stack.num_kv_heads, stack.head_dim
        if isinstance(first, LatentAttention):
            kv_heads, key_dim = 1, first.kv_a.weight.shape[0]
        self._step = torch.classes.glm_core.DecodeStep(
            stack.num_heads,
            kv_heads,
            stack.head_dim,
            key_dim,
            stack.alpha,
            stack.deepnorm,
            stack.rope_interleaved,
            stack.activation,
        )
        for layer in stack.layers:
            parts = _parts(layer)
            self._step.add_layer(
                [t for p in parts.products for t in _tensors(p)],
                [p.bits if p else 0 for p in parts.products],
                [p.activation_bits if p else 0 for p in parts.products],
                [t for norm in parts.norms for t in (norm or (None, None))[:2]],
                [norm.eps if norm else 0.0 for norm in parts.norms],
                parts.scale or stack.head_dim**-0.5,
            )
            if isinstance(layer.mlp, Experts):
                self._step.set_routing(*layer.mlp[4:])
        head, norm = stack.head, stack.final_norm
        self._step.set_ends(
            [stack.embedding, *stack.position_embeddings],
            list(stack.rotary() or (None, None)),
            [norm.weight, norm.bias],
            norm.eps,
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
    weights += [t for n in stack.norms() for t in (n.weight, n.bias)]
    weights += [p.bias for p in stack.products()]
    weights += [p.weight for p in stack.products() if not p.bits]
    support = supports.takes(*weights)
    for p in stack.products() if support.ok else ():
        if p.scale is not None:
            width = p.weight.shape[-1] * 8 // p.bits
            row = torch.empty(1, width, dtype=stack.final_norm.weight.dtype)
            codes, scale = p.weight, p.scale
            if codes.dim() == 3:
                codes, scale = codes.flatten(0, 1), scale.flatten(0, 1)
            quantized = supports.quantized_linear(row, codes, scale, p.bias, p.bits)
            support = supports.both(support, quantized)
    for p in stack.routers():
        support = supports.both(support, supports.exactly(torch.float32, weight=p.weight))
    return support


class _Parts(NamedTuple):
    """A layer's products and norms in the order of csrc/bindings/decode_parts.h."""

    products: list[Product | None]
    norms: list[Norm | None]
    scale: float
    """factor of the attention's scores; 0: the usual one"""


def _parts(layer: Layer) -> _Parts:
    a, mlp = layer.attention, layer.mlp
    qkv, scale = None, 0.0
    norms = [layer.input_norm, layer.mlp_norm, layer.post_attention_norm, layer.post_mlp_norm]
    latent: list[Product | None] = [None] * 5
    if isinstance(a, LatentAttention):
        latent, scale = [a.q_a, a.q_b, a.kv_a, a.to_latent, a.from_latent], a.scale
        norms += [None, None, a.q_a_norm, a.kv_a_norm]
    else:
        qkv = a.qkv
        norms += [a.q_norm, a.k_norm, None, None]
    dense, sparse = (mlp, [None] * 3) if isinstance(mlp, MLP) else (mlp.shared, list(mlp[:3]))
    return _Parts([qkv, a.out, *(dense or (None, None)), *latent, *sparse], norms, scale)


def _tensors(p: Product | None) -> list[Tensor | None]:
    return [p.weight, p.scale, p.bias] if p else [None] * 3
