"""Adds P-Tuning v2: learned keys and values before every text, in every layer, with the base
frozen.

Shapes: B batch, L queries, S keys of a call, P prefix length, N layers, K kv heads, E head dim, W
width of a projected table, D hidden width; S' keys with all prefixes among them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from glm_core.config import ModelConfig
from glm_core.errors import ShapeError
from glm_core.model.cache import Window
from glm_core.model.glm import Linear


class Prefix(nn.Module):
    """A table whose rows are the prefix: [P, 2N * K * E], each row seen as [2N, K, E]; entries 2i
    and 2i + 1 are the key and value of layer i. With a projection the table is [P, W], and the
    prefix is outer(tanh(inner(table))).

    Keys are not rotated, the text's positions do not move, and every token of the text sees the
    whole prefix before it. In training, a share `dropout` of each text's values is zeroed and the
    others are scaled up. Sources: Liu et al. 2021 (P-Tuning v2), section 3; ChatGLM-6B's
    PrefixEncoder and get_prompt (modeling_chatglm.py)."""

    def __init__(
        self, config: ModelConfig, length: int, width: int = 0, dropout: float = 0.0
    ) -> None:
        """width: W, or 0 without a projection."""
        super().__init__()
        self.length, self.dropout = length, dropout
        self.heads = (config.num_kv_heads, config.head_dim)
        values = values_width(config)
        self.table = nn.Parameter(torch.empty(length, width or values))
        self.inner = Linear(width, config.hidden, bias=True) if width else None
        self.outer = Linear(config.hidden, values, bias=True) if width else None

    def values(self) -> Tensor:
        """Returns the keys and values of all layers, [P, 2N, K, E]."""
        flat: Tensor = self.table
        if self.inner is not None and self.outer is not None:
            flat = self.outer(torch.tanh(self.inner(flat)))
        return flat.unflatten(1, (-1, *self.heads))  # [P, 2N, K, E]

    @torch.no_grad()
    def fold(self) -> None:
        """Replaces the projection by the values that it computes, once and for all calls."""
        flat = self.values().flatten(1)  # [P, 2N * K * E]
        self.table = nn.Parameter(flat, requires_grad=False)
        self.inner = self.outer = None

    def insert(
        self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Is a forward pre-hook of GLM: inserts the prefix and moves the mask. Packed samples get a
        copy each. A sample of one token, which is how batches are padded, gets none unless it is
        the first. Raises ShapeError if the masks of packed samples overlap."""
        names = ("tokens", "positions", "key_start", "key_end", "cache")
        inputs = {**dict(zip(names, args, strict=False)), **named}
        start, end, inner = inputs["key_start"], inputs["key_end"], inputs.get("cache")
        layout = PrefixLayout(start, self.length, inner)
        inputs["key_start"] = (start + self.length * layout.prior).int()
        moved = end + self.length * (layout.prior + layout.own)
        inputs["key_end"] = torch.where(end > start, moved, inputs["key_start"]).int()
        dropout = self.dropout if self.training else 0.0
        inputs["cache"] = PrefixWindow(self.values(), layout.index, inner, dropout)
        return (), inputs


def values_width(config: ModelConfig) -> int:
    """Returns 2N * K * E, the width of all layers' keys and values for one token of a prefix."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim


class PrefixLayout:
    """Where prefixes and keys stand in a call. For each query, `prior` counts the prefixes before
    its sample's own, and `own` is 1 if its sample has one; `index` [B, S'] picks from [prefix,
    keys]."""

    def __init__(self, start: Tensor, length: int, inner: Window | None) -> None:
        if inner is None:
            first, self.prior, self.own = _samples(start)
            columns, begin, prior, own = start.shape[1], start, self.prior, self.own
        else:
            first = begin = start[:, :1]
            if (start != first).any():
                raise ShapeError(
                    "prefix: with a cache, all queries of a row must start at the same key"
                )
            columns = inner.num_keys
            prior, own = torch.zeros_like(first), torch.ones_like(first)
            self.prior, self.own = prior, own
        keys = torch.arange(columns, device=start.device)
        token = keys + length * (prior + own * (keys >= begin))  # [B, S]
        steps = torch.arange(length, device=start.device)
        front = (begin + length * prior)[..., None] + steps  # [B, S or 1, P]
        rows, size = len(start), int(columns + length * (prior + own).max())
        # one column more, for the prefixes that samples of one token do not get
        index = torch.zeros(rows, size + 1, dtype=torch.long, device=start.device)
        front = torch.where(own[..., None] > 0, front, size).long().flatten(1)  # [B, (S or 1) * P]
        index.scatter_(1, front, steps.repeat(front.shape[1] // length).expand_as(front))
        index.scatter_(1, token.long(), (length + keys).expand(rows, -1))  # [B, S]
        self.index = index[:, :size]


def _samples(start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns for each query of start [B, L]: where its sample begins, how many prefixes stand
    before the sample's own, and whether it has one. A sample is a run of queries with one start."""
    keys = torch.arange(start.shape[1], device=start.device).expand_as(start)
    begins = torch.ones_like(start, dtype=torch.bool)
    begins[:, 1:] = start[:, 1:] != start[:, :-1]
    first = torch.where(begins, keys, 0).cummax(1).values
    if ((start < first) & (first > 0)).any():
        raise ShapeError(
            "prefix: a key_start points before its own sample; pack samples that share no keys"
        )
    number = begins.cumsum(1) - 1  # [B, L]
    counts = torch.zeros_like(number).scatter_add_(1, number, torch.ones_like(number))
    prefixed = counts > 1
    prefixed[:, 0] = True
    total = prefixed.long().cumsum(1)
    own = prefixed.gather(1, number).long()
    return first, total.gather(1, number) - own, own


class PrefixWindow(Window):
    """A cache window that puts the prefix before the keys and values of a call, or of its cache;
    values [P, 2N, K, E]. Each row draws its own dropout; samples packed into one row share it."""

    def __init__(
        self, values: Tensor, index: Tensor, inner: Window | None, dropout: float = 0.0
    ) -> None:
        self._values, self._index, self._inner = values, index, inner
        self._dropout = dropout
        self._rows = torch.arange(len(index), device=index.device)[:, None]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Returns prefix and keys, and prefix and values, [B, S', K, E] each;  k, v [B, L, K,
        E]."""
        if self._inner is not None:
            k, v = self._inner.append(layer, k, v)
        key, value = self._values[:, 2 * layer], self._values[:, 2 * layer + 1]
        return self._joined(key, k), self._joined(value, v)

    def _joined(self, front: Tensor, rest: Tensor) -> Tensor:
        front = front.to(rest.dtype).expand(len(rest), *front.shape)  # [B, P, K, E]
        if self._dropout:
            front = nn.functional.dropout(front, self._dropout)
        return torch.cat((front, rest), 1)[self._rows, self._index]
