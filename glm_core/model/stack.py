"""Describes a model as data (`decode_step.Stack`), for backends that take a whole decode step.

Shapes: L positions, G position rows that are rotated, P pairs of rotated dimensions per row."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor, nn

from glm_core import ops
from glm_core.decode_step import (
    MLP,
    Attention,
    Experts,
    LatentAttention,
    Layer,
    Norm,
    Product,
    Stack,
)
from glm_core.model import glm
from glm_core.model.quantize import QuantizedGroupedLinear, QuantizedHeads, QuantizedLinear
from glm_core.ops.precision import wide
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
        # layers of multi-token prediction stand behind
        layers=tuple(
            _layer(b, f"blocks.{i}") for i, b in enumerate(islice(model.blocks, c.num_layers))
        ),
        final_norm=_norm(model.final_norm, "final_norm"),
        head=Product(model.head_weight, None) if codes is None else _product(codes, "the head"),
        num_heads=c.num_heads,
        num_kv_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        alpha=glm.residual_scale(c),
        deepnorm=c.placement == "deepnorm",
        rope_interleaved=c.rope_interleaved,
        activation=c.activation,
    )


def _layer(block: nn.Module, name: str) -> Layer:
    block = _plain(block, glm.Block, name)
    after = {n: getattr(block, n) for n in ("post_attention_norm", "post_mlp_norm")}
    return Layer(
        attention=_attention(block.attention, f"{name}.attention"),
        mlp=_mlp(block.mlp, f"{name}.mlp"),
        input_norm=_norm(block.input_norm, f"{name}.input_norm"),
        mlp_norm=_norm(block.mlp_norm, f"{name}.mlp_norm"),
        **{n: None if m is None else _norm(m, f"{name}.{n}") for n, m in after.items()},
    )


def _attention(module: nn.Module, name: str) -> Attention | LatentAttention:
    if isinstance(module, glm.LatentAttention):
        return _latent(_plain(module, glm.LatentAttention, name), name)
    attention = _plain(module, glm.Attention, name)
    _with_own_core(attention, name)
    norms = {n: getattr(attention, n) for n in ("q_norm", "k_norm")}
    return Attention(
        qkv=_product(attention.qkv, f"{name}.qkv"),
        out=_product(attention.out, f"{name}.out"),
        **{n: None if m is None else _norm(m, f"{name}.{n}") for n, m in norms.items()},
    )


def _with_own_core(attention: glm.Attention | glm.LatentAttention, name: str) -> None:
    if attention.core is not ops.attention:
        raise _NotPlain(f"{name}.core is not the op attention")


def _latent(attention: glm.LatentAttention, name: str) -> LatentAttention:
    _with_own_core(attention, name)
    c = attention.config
    heads = _plain(attention.get_submodule("kv_b"), QuantizedHeads, f"{name}.kv_b")
    return LatentAttention(
        q_a=_product(attention.q_a, f"{name}.q_a") if c.q_latent else None,
        q_a_norm=_norm(attention.q_a_norm, f"{name}.q_a_norm") if c.q_latent else None,
        q_b=_product(attention.q_b if c.q_latent else attention.q, f"{name}.q"),
        kv_a=_product(attention.kv_a, f"{name}.kv_a"),
        kv_a_norm=_norm(attention.kv_a_norm, f"{name}.kv_a_norm"),
        to_latent=_product(heads.keys, f"{name}.kv_b.keys"),
        from_latent=_product(heads.values, f"{name}.kv_b.values"),
        out=_product(attention.out, f"{name}.out"),
        scale=attention.scale,
    )


def _mlp(module: nn.Module, name: str) -> MLP | Experts:
    if not isinstance(module, glm.Experts):
        mlp = _plain(module, glm.MLP, name)
        return MLP(_product(mlp.up, f"{name}.up"), _product(mlp.down, f"{name}.down"))
    experts = _plain(module, glm.Experts, name)
    router = _plain(experts.router, glm.Router, f"{name}.router")
    shared = None if experts.shared is None else _mlp(experts.shared, f"{name}.shared")
    assert not isinstance(shared, Experts)
    c = experts.config
    return Experts(
        router=Product(wide(router.weight), router.bias),
        up=_product(experts.experts_up, f"{name}.experts_up"),
        down=_product(experts.experts_down, f"{name}.experts_down"),
        shared=shared,
        top_k=c.experts_per_token,
        groups=c.expert_groups,
        top_groups=c.top_groups,
        scale=c.expert_scale,
        normalize=c.normalize_experts,
    )


def _product(module: nn.Module, name: str) -> Product:
    if isinstance(module, QuantizedLinear):
        grouped = isinstance(module, QuantizedGroupedLinear)
        module = _plain(module, QuantizedGroupedLinear if grouped else QuantizedLinear, name)
        q = module.quantization
        return Product(module.weight, module.bias, module.scale, q.bits, q.activation_bits)
    if isinstance(module, glm.GroupedLinear):
        return Product(_plain(module, glm.GroupedLinear, name).weight, None)
    linear = _plain(module, glm.Linear, name)
    return Product(linear.weight, linear.bias)


def _norm(module: nn.Module | None, name: str) -> Norm:
    norm = _plain(module, glm.Norm, name)
    return Norm(norm.weight, norm.bias, norm.eps)


def _plain(module: nn.Module | None, kind: type[M], name: str) -> M:
    """Returns the module if it is of exactly this class: a subclass may compute something else."""
    if isinstance(module, kind) and type(module) is kind:
        return module
    raise _NotPlain(f"{name} is a {type(module).__name__}, not a {kind.__name__}")
