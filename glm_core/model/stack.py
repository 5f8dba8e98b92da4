"""Describes a model as data (`decode_step.Stack`), for backends that take a whole decode step.

Shapes: L positions, G position rows that are rotated, P pairs of rotated dimensions per row."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from glm_core import ops
from glm_core.decode_step import Layer, Norm, Product, Stack
from glm_core.model import glm
from glm_core.model.quantize import QuantizedLinear
from glm_core.spec import Support, unsupported

Angles = Callable[[], tuple[Tensor, Tensor] | None]
M = TypeVar("M", bound=nn.Module)


class _NotPlain(Exception):
    """Some part of the model is not the plain one: an adapter, a prefix, a hook, a shard."""


def angles(model: glm.GLM, length: int) -> tuple[Tensor, Tensor] | None:
    """Returns cos and sin [L, G, P] of all positions below `length`, each as the last of its
    sequence; None for a model without rotary positions."""
    if model.position_embedding is not None:
        return None
    positions = torch.arange(length, device=model.embedding.device)
    cos, sin = model.rotary(positions[:, None, None].expand(-1, 2, 1))  # [L, 2, 1]
    return cos[:, 0], sin[:, 0]


def stack(model: glm.GLM, rotary: Angles) -> Stack | Support:
    """Returns the model's parts as data, or the reason why its modules must be called as they are:
    only plain and quantised parts without hooks can be described. `rotary` returns the model's
    `angles`."""
    try:
        return _stack(model, rotary)
    except _NotPlain as obstacle:
        return unsupported(str(obstacle))


def _stack(model: glm.GLM, rotary: Angles) -> Stack:
    if hasattr(model, "prefix"):
        raise _NotPlain("the model has a prefix (P-Tuning)")
    _plain(model, glm.GLM, "the model")
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise _NotPlain(f"{name or 'the model'} has a hook")
    c, codes = model.config, model.head_codes
    return Stack(
        embedding=model.embedding,
        position_embeddings=(model.position_embedding, model.block_embedding),
        rotary=rotary,
        layers=tuple(_layer(b, f"blocks.{i}") for i, b in enumerate(model.blocks)),
        final_norm=_norm(model.final_norm, "final_norm"),
        head=Product(model.head_weight, None) if codes is None else _product(codes, "the head"),
        num_heads=c.num_heads,
        num_kv_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        norm_eps=c.norm_eps,
        alpha=glm.residual_scale(c),
        deepnorm=c.placement == "deepnorm",
        rope_interleaved=c.rope_interleaved,
        activation=c.activation,
    )


def _layer(block: nn.Module, name: str) -> Layer:
    block = _plain(block, glm.Block, name)
    attention = _plain(block.attention, glm.Attention, f"{name}.attention")
    mlp = _plain(block.mlp, glm.MLP, f"{name}.mlp")
    if attention.q_norm is not None:
        raise _NotPlain(f"{name}.attention norms its heads")
    if attention.core is not ops.attention:
        raise _NotPlain(f"{name}.attention.core is not the op attention")
    after = {n: getattr(block, n) for n in ("post_attention_norm", "post_mlp_norm")}
    return Layer(
        qkv=_product(attention.qkv, f"{name}.attention.qkv"),
        out=_product(attention.out, f"{name}.attention.out"),
        up=_product(mlp.up, f"{name}.mlp.up"),
        down=_product(mlp.down, f"{name}.mlp.down"),
        input_norm=_norm(block.input_norm, f"{name}.input_norm"),
        mlp_norm=_norm(block.mlp_norm, f"{name}.mlp_norm"),
        **{n: None if m is None else _norm(m, f"{name}.{n}") for n, m in after.items()},
    )


def _product(module: nn.Module, name: str) -> Product:
    if type(module) is QuantizedLinear:
        q = module.quantization
        return Product(module.weight, module.bias, module.scale, q.bits, q.activation_bits)
    linear = _plain(module, glm.Linear, name)
    return Product(linear.weight, linear.bias)


def _norm(module: nn.Module | None, name: str) -> Norm:
    norm = _plain(module, glm.Norm, name)
    return Norm(norm.weight, norm.bias)


def _plain(module: nn.Module | None, kind: type[M], name: str) -> M:
    """Returns the module if it is of exactly this class: a subclass may compute something else."""
    if isinstance(module, kind) and type(module) is kind:
        return module
    raise _NotPlain(f"{name} is a {type(module).__name__}, not a {kind.__name__}")
