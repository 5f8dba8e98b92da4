"""A model as data, for backends that take a whole decode step by themselves."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from glm_core import ops
from glm_core.decode_step import Layer, Norm, Product, Stack
from glm_core.model import glm
from glm_core.model.quantize import QuantizedLinear

Angles = Callable[[], tuple[Tensor, Tensor] | None]


class _Unknown(Exception):
    """Something that is not the plain model's: an adapter, a prefix, a shard."""


def angles(model: glm.GLM, length: int) -> tuple[Tensor, Tensor] | None:
    """cos and sin [length, G, P] of every position; None for a model that does not rotate."""
    if model.position_embedding is not None:
        return None
    every = torch.arange(length, device=model.embedding.device).expand(1, 2, -1)
    cos, sin = model.rotary(every)
    return cos[0], sin[0]


def stack(model: glm.GLM, rotary: Angles) -> Stack | None:
    """What the model is made of; `rotary` gives its `angles`. None where it is not all plain or
    quantised parts without hooks: its modules must then be called as they are."""
    try:
        return _stack(model, rotary)
    except _Unknown:
        return None


def _stack(model: glm.GLM, rotary: Angles) -> Stack:
    if any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        raise _Unknown
    if type(model) is not glm.GLM:
        raise _Unknown
    c, codes = model.config, model.head_codes
    head = Product(model.head_weight, None) if codes is None else _product(codes)
    tables = (model.position_embedding, model.block_embedding)
    return Stack(
        model.embedding,
        tables,
        rotary,
        tuple(map(_layer, model.blocks)),
        _norm(model.final_norm),
        head,
        c.num_heads,
        c.num_kv_heads,
        c.head_dim,
        c.norm_eps,
        glm.residual_scale(c),
        c.placement == "deepnorm",
        c.rope_interleaved,
        c.activation,
    )


def _layer(block: nn.Module) -> Layer:
    if type(block) is not glm.Block or type(block.mlp) is not glm.MLP:
        raise _Unknown
    attention, mlp = block.attention, block.mlp
    if type(attention) is not glm.Attention or attention.core is not ops.attention:
        raise _Unknown
    after = [block.post_attention_norm, block.post_mlp_norm]
    return Layer(
        _product(attention.qkv),
        _product(attention.out),
        _product(mlp.up),
        _product(mlp.down),
        _norm(block.input_norm),
        _norm(block.mlp_norm),
        *(None if norm is None else _norm(norm) for norm in after),
    )


def _product(m: nn.Module) -> Product:
    if type(m) is glm.Linear:
        return Product(m.weight, m.bias)
    if type(m) is QuantizedLinear:
        return Product(
            m.weight, m.bias, m.scale, m.quantization.bits, m.quantization.activation_bits
        )
    raise _Unknown


def _norm(m: nn.Module) -> Norm:
    if type(m) is not glm.Norm:
        raise _Unknown
    return Norm(m.weight, m.bias)
