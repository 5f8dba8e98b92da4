"""Describes a model as data, for a backend that takes a whole decode step in one call.

A decode step feeds one token to each of a few sequences. Its ops are so small that calling them one
by one costs as much as running them (ADR 9).

Shapes: B rows, D width, K kv heads, E head dim, V vocabulary, S tokens a slot holds, N positions,
G position rows that are rotated, P pairs of rotated dimensions per row."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor


class Product(NamedTuple):
    """A linear layer, y = x weight^T + bias, with a float weight or the codes of the op
    `quantized_linear`."""

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None = None
    """scales of the codes"""
    bits: int = 0
    """width of the codes; 0: a float weight"""
    activation_bits: int = 16


class Norm(NamedTuple):
    """A layer norm, or an RMS norm where there is no bias."""

    weight: Tensor
    bias: Tensor | None


class Layer(NamedTuple):
    """The parameters of one block of the model; names as in `model.glm.Block`."""

    qkv: Product
    out: Product
    up: Product
    down: Product
    input_norm: Norm
    mlp_norm: Norm
    post_attention_norm: Norm | None
    post_mlp_norm: Norm | None


class Stack(NamedTuple):
    """A whole model: its parameters, and the sizes and factors of ModelConfig and Block."""

    embedding: Tensor
    """[V, D]"""
    position_embeddings: tuple[Tensor | None, Tensor | None]
    """[N, D] each, added for rows 0 and 1 of the positions"""
    rotary: Callable[[], tuple[Tensor, Tensor] | None]
    """returns cos and sin [N, G, P] float32 of every position, computed at the call; None for a
    model without rotary positions"""
    layers: tuple[Layer, ...]
    final_norm: Norm
    head: Product
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    alpha: float
    """factor of the residual"""
    deepnorm: bool
    """whether the residual is the norm's output"""
    rope_interleaved: bool
    activation: str
    """gelu, geglu or swiglu"""

    def identity(self) -> tuple[object, ...]:
        """Returns a value that is equal for stacks of the same tensors and settings; a callable
        that was made for one serves the others. A tensor that is not contiguous equals none, since
        the callable may hold a copy of it."""
        return _identity((*self[:2], *self[3:]))

    def products(self) -> list[Product]:
        """Returns all linear layers in the order of use."""
        return [p for x in self.layers for p in (x.qkv, x.out, x.up, x.down)] + [self.head]

    def norms(self) -> list[Norm]:
        """Returns all norms: each layer's, then the final one."""
        inside = [n for x in self.layers for n in x[4:] if n is not None]
        return [*inside, self.final_norm]


def _identity(part: object) -> tuple[object, ...]:
    if isinstance(part, Tensor):
        return (part.data_ptr(), part.dtype, part.shape) if part.is_contiguous() else (object(),)
    return tuple(map(_identity, part)) if isinstance(part, tuple) else (part,)


class Rows(NamedTuple):
    """The tokens of one step; row b's keys and values go to slot b of the cache."""

    tokens: list[int]
    positions: list[int]
    """[2B]: rows 0 and 1 of the positions (see GLM.forward), token after token"""
    key_start: list[int]
    key_end: list[int]
    places: list[int]
    """where in its slot each row's new key and value are written"""


class DecodeStep(Protocol):
    """A callable that takes decode steps of one model, with the same bits as its ops one by one."""

    max_rows: int
    """the most rows of one call"""

    def __call__(self, rows: Rows, cache: Tensor) -> Tensor:
        """Returns logits [B, V] float32 and writes the new keys and values into the cache [layers,
        2, slots, K, S, E] (keys, then values). Raises IndexError for a token, position or place
        outside of the model or the cache."""
        ...
