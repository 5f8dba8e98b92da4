"""A model as data, for a backend that takes a whole decode step by itself: one token for each of a
few sequences, where calling ops one by one costs as much as what they do."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor


class Product(NamedTuple):
    """y = x weight^T + bias: a float weight, or the codes of the op `quantized_linear`."""

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None = None
    bits: int = 0
    """0: a float weight"""
    activation_bits: int = 16


class Norm(NamedTuple):
    """Layer norm, or RMS norm where there is no bias."""

    weight: Tensor
    bias: Tensor | None


class Layer(NamedTuple):
    """What a block of the model holds."""

    qkv: Product
    out: Product
    up: Product
    down: Product
    input_norm: Norm
    mlp_norm: Norm
    post_attention_norm: Norm | None
    post_mlp_norm: Norm | None


class Stack(NamedTuple):
    """A whole model; sizes and factors as ModelConfig and Block have them. P positions, G rows of
    them that turn heads."""

    embedding: Tensor
    position_embeddings: tuple[Tensor | None, Tensor | None]
    """[P, D], added for rows 0 and 1 of the positions"""
    rotary: Callable[[], tuple[Tensor, Tensor] | None]
    """cos and sin [P, G, pairs] float32 of every position, made when asked for; None: no heads are
    turned"""
    layers: tuple[Layer, ...]
    final_norm: Norm
    head: Product
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    alpha: float
    """of the residual"""
    deepnorm: bool
    """the residual is the norm's output"""
    rope_interleaved: bool
    activation: str
    """gelu, geglu or swiglu"""

    def products(self) -> list[Product]:
        """All of them, in order."""
        return [p for x in self.layers for p in (x.qkv, x.out, x.up, x.down)] + [self.head]

    def norms(self) -> list[Norm]:
        """All there are, in order."""
        found = [n for x in self.layers for n in x[4:] if n is not None]
        return [*found, self.final_norm]


class Rows(NamedTuple):
    """One token of each sequence: row b's goes to slot b of the cache."""

    tokens: list[int]
    positions: list[int]
    """two a row: rows 0 and 1 of GLM.forward's"""
    key_start: list[int]
    key_end: list[int]
    places: list[int]
    """of the new keys and values in the slots"""


class DecodeStep(Protocol):
    """Takes decode steps of one model. Results are those of the ops, in the same bits."""

    max_rows: int
    """sequences it takes at once"""

    def __call__(self, rows: Rows, cache: Tensor) -> Tensor:
        """Logits [B, V] float32;  cache [layers, 2, slots, K, S, E], keys before values, is written
        to. Raises IndexError for what lies outside of the model or the cache."""
        ...
