"""Calls the ops of one decode step of a model that is described as data. All that changes from step
to step is read from device memory, so that a recording of the step serves every position.

Shapes: B rows, D width, H heads, K kv heads, E head dim, V vocabulary, S tokens a slot holds,
N positions, G position rows that are rotated, P pairs of rotated dimensions per row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from glm_core import ops
from glm_core.backends.cuda.attention import HAS_TRITON
from glm_core.decode_step import MLP, Attention, Norm, Product, Rows, Stack
from glm_core.spec import SUPPORTED, Support, unsupported

ACTIVATIONS = {"gelu": ops.gelu, "geglu": ops.geglu, "swiglu": ops.swiglu}


class Inputs(NamedTuple):
    """What a step feeds, on the device. All are views of `memory`, so that one copy fills them."""

    memory: Tensor
    """[5, B] int64"""
    tokens: Tensor
    """[B, 1] int64"""
    positions: Tensor
    """[2, B] int64"""
    places: Tensor
    """[B] int64"""
    key_start: Tensor
    """[B, 1] int32"""
    key_end: Tensor
    """[B, 1] int32"""


def packed(rows: Rows) -> Tensor:
    """Returns the rows as the memory of `Inputs` holds them, on the host."""
    first, second = rows.positions[::2], rows.positions[1::2]
    intervals = torch.tensor(rows.key_start + rows.key_end, dtype=torch.int32).view(torch.int64)
    wide = torch.tensor([rows.tokens, first, second, rows.places])  # [4, B]
    return torch.cat((wide, intervals[None]))


def inputs(memory: Tensor) -> Inputs:
    """Returns the views of a step's inputs in their memory."""
    tokens, _first, _second, places, intervals = memory
    start, end = intervals.view(torch.int32).view(2, -1, 1)
    return Inputs(memory, tokens[:, None], memory[1:3], places, start, end)


def recordable(stack: Stack) -> Support:
    """Returns whether `Step` knows every part of the model."""
    for i, layer in enumerate(stack.layers):
        plain = isinstance(layer.attention, Attention) and layer.attention.q_norm is None
        if not plain or not isinstance(layer.mlp, MLP):
            parts = "experts, latent attention or norms of the heads"
            return unsupported(f"layer {i} has {parts}, which are not recorded")
    return SUPPORTED


class Step:
    """The ops of one model's steps."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        angles = stack.rotary()
        self._angles = None if angles is None else torch.stack(angles)  # [2, N, G, P]
        gates, device = 0 if angles is None else angles[0].shape[1], stack.embedding.device
        self._gates = torch.arange(gates, device=device)
        tables = [t for t in (*stack.position_embeddings, *(angles or ())) if t is not None]
        self.num_positions = min(map(len, tables))
        """positions that the model knows"""

    def __call__(self, fed: Inputs, cache: Tensor) -> Tensor:
        """Returns logits [B, V] float32; writes into the cache [layers, 2, slots, K, S, E]."""
        s = self.stack
        delta, residual = None, self._embedded(fed)  # [B, 1, D]
        for layer, memory in zip(s.layers, cache, strict=True):
            normed, total = self._add(layer.input_norm, delta, residual)
            attention, mlp = layer.attention, layer.mlp
            assert isinstance(attention, Attention)  # `recordable`
            assert isinstance(mlp, MLP)
            delta = self._attention(attention, normed, fed, memory)
            if layer.post_attention_norm is not None:
                delta = self._norm(layer.post_attention_norm, delta)
            residual = normed if s.deepnorm else total
            normed, total = self._add(layer.mlp_norm, delta, residual)
            hidden = ACTIVATIONS[s.activation](product(mlp.up, normed))
            delta = product(mlp.down, hidden)
            if layer.post_mlp_norm is not None:
                delta = self._norm(layer.post_mlp_norm, delta)
            residual = normed if s.deepnorm else total
        hidden = self._add(s.final_norm, delta, residual)[0]
        return product(s.head, hidden[:, 0]).float()

    def _embedded(self, fed: Inputs) -> Tensor:
        x: Tensor = ops.embedding(fed.tokens, self.stack.embedding)
        for at, table in zip(fed.positions, self.stack.position_embeddings, strict=True):
            if table is not None:
                x = x + ops.embedding(at[:, None], table)
        return x

    def _attention(
        self,
        attention: Attention,
        x: Tensor,
        fed: Inputs,
        memory: Tensor,
    ) -> Tensor:
        """memory: the layer's keys and values [2, slots, K, S, E]."""
        s = self.stack
        qkv = product(attention.qkv, x).unflatten(-1, (-1, s.head_dim))  # [B, 1, H + 2K, E]
        q = self._kept(qkv, fed, memory)
        keys, values = memory[:, : len(x)].transpose(2, 3)  # [B, S, K, E]
        y = ops.attention(q, keys, values, fed.key_start, fed.key_end, s.head_dim**-0.5)
        return product(attention.out, y.flatten(2))  # [B, 1, H * E] -> [B, 1, D]

    def _kept(self, qkv: Tensor, fed: Inputs, memory: Tensor) -> Tensor:
        """Returns the rotated queries [B, 1, H, E]; writes rotated keys, and values, to the rows'
        places. On a GPU one kernel does it."""
        s, angles = self.stack, self._angles
        if qkv.is_cuda and HAS_TRITON and not is_fake(qkv):
            from glm_core.backends.cuda.keep_kernel import keep

            settings = (s.num_heads, s.rope_interleaved)
            return keep(qkv, angles, fed.positions, fed.places, memory, *settings)
        qk, v = qkv.split_with_sizes((s.num_heads + s.num_kv_heads, s.num_kv_heads), 2)
        if angles is not None:
            at = fed.positions[: len(self._gates)].t()  # [B, G]
            cos, sin = angles[:, at, self._gates][:, :, None]  # [2, B, 1, G, P]
            qk = ops.rope(qk, cos, sin, s.rope_interleaved)
        q, k = qk.split_with_sizes((s.num_heads, s.num_kv_heads), 2)
        rows = torch.arange(len(qkv), device=qkv.device)
        keys, values = memory[:, : len(qkv)].transpose(2, 3)  # [B, S, K, E]
        keys[rows, fed.places] = k[:, 0]
        values[rows, fed.places] = v[:, 0]
        return q

    def _norm(self, norm: Norm, x: Tensor) -> Tensor:
        y: Tensor
        if norm.bias is None:
            y = ops.rms_norm(x, norm.weight, norm.eps)
        else:
            y = ops.layer_norm(x, norm.weight, norm.bias, norm.eps)
        return y

    def _add(self, norm: Norm, delta: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Returns norm(sum) and the sum, as `model.glm.Norm.add`."""
        s = self.stack
        if delta is None:
            return self._norm(norm, residual), residual
        pair: tuple[Tensor, Tensor]
        if norm.bias is None:
            pair = ops.add_rms_norm(delta, residual, norm.weight, norm.eps, s.alpha)
        else:
            pair = ops.add_layer_norm(delta, residual, norm.weight, norm.bias, norm.eps, s.alpha)
        return pair


def product(p: Product, x: Tensor) -> Tensor:
    """Returns x w^T + bias."""
    y: Tensor
    if p.scale is None:
        y = ops.linear(x, p.weight, p.bias)
    else:
        y = ops.quantized_linear(x, p.weight, p.scale, p.bias, p.bits, p.activation_bits)
    return y
