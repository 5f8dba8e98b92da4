"""Describes a model as data, for a backend that takes a whole decode step in one call.

A decode step feeds one token to each of a few sequences. Its ops are so small that calling them one
by one costs as much as running them (ADR 9).

Shapes: B rows, D width, H heads, K kv heads, E head dim, V vocabulary, S tokens a slot holds, N
positions, G position rows that are rotated, P pairs of rotated dimensions per row, F features, X
experts. Latent attention: C width of the latent, R rotated dimensions, U value head dim."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from torch import Tensor


class Product(NamedTuple):
    """A linear layer, y = x weight^T + bias, with a float weight or the codes of the op
    `quantized_linear`. Of experts, or heads, it holds a matrix each: weight [X, F, D]."""

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
    eps: float


class Attention(NamedTuple):
    """Grouped-query attention; names as in `model.glm.Attention`."""

    qkv: Product
    out: Product
    q_norm: Norm | None
    k_norm: Norm | None


class LatentAttention(NamedTuple):
    """Latent attention in its absorbed form; names as in `model.glm.LatentAttention`. The cache
    holds C + R numbers a token, in place of keys."""

    q_a: Product | None
    q_a_norm: Norm | None
    q_b: Product
    """of the hidden state where there is no q_a"""
    kv_a: Product
    kv_a_norm: Norm
    to_latent: Product
    """of each head's query, weight [H, C, E - R]"""
    from_latent: Product
    """of each head's sum of latents, weight [H, U, C]"""
    out: Product
    scale: float
    """factor of the scores"""


class MLP(NamedTuple):
    """A dense feed-forward part; names as in `model.glm.MLP`."""

    up: Product
    down: Product


class Experts(NamedTuple):
    """A sparse feed-forward part; names as in `model.glm.Experts`, settings of the op `route`."""

    router: Product
    """in float32; its bias corrects the choice only"""
    up: Product
    """weight [X, F, D]"""
    down: Product
    shared: MLP | None
    top_k: int
    groups: int
    top_groups: int
    scale: float
    normalize: bool


class Layer(NamedTuple):
    """The parameters of one block of the model; names as in `model.glm.Block`."""

    attention: Attention | LatentAttention
    mlp: MLP | Experts
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
        """Returns all linear layers but the routers."""
        return [p for p in _parts((self.layers, self.head)) if isinstance(p, Product)]

    def routers(self) -> list[Product]:
        """Returns the router of each sparse layer."""
        return [x.mlp.router for x in self.layers if isinstance(x.mlp, Experts)]

    def norms(self) -> list[Norm]:
        """Returns all norms."""
        return [n for n in _parts((self.layers, self.final_norm)) if isinstance(n, Norm)]


def _parts(part: object) -> Iterator[object]:
    """Yields every product and norm in a part but a router, which is in float32."""
    if isinstance(part, Product | Norm):
        yield part
    elif isinstance(part, tuple):
        for inner in part[1:] if isinstance(part, Experts) else part:
            yield from _parts(inner)


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
        2, slots, K, S, E] (keys, then values), or latents into [layers, 1, slots, 1, S, C + R]. The
        cache may have more layers, which are left alone. Raises IndexError for a token, position
        or place outside of the model or the cache."""
        ...
