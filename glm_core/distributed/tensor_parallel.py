"""How the ranks of a tensor-parallel group share one layer's matrices: the model's own modules, of
a rank's sizes, whose projections talk to each other. Which rows a rank holds is said in layout.

Norms, and the biases after a row-parallel product, are held by every rank and stay equal. Shapes:
D width, F features of all ranks, t ranks."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from glm_core import ops
from glm_core.config import ModelConfig
from glm_core.distributed import collectives
from glm_core.distributed.vocabulary import parallel_cross_entropy
from glm_core.model.glm import Block, Linear


@dataclasses.dataclass(frozen=True, slots=True)
class Ranks:
    """One tensor-parallel group as a member sees it."""

    group: ProcessGroup
    sp: bool
    """sequence parallel: between the layers each rank holds its part of the sequence"""

    @property
    def size(self) -> int:
        """t"""
        return self.group.size()

    @property
    def rank(self) -> int:
        """This process's place in the group."""
        return self.group.rank()

    def enter(self, x: Tensor) -> Tensor:
        """Into what ranks share out; see collectives."""
        return collectives.enter(x, self.group, self.sp)

    def leave(self, x: Tensor) -> Tensor:
        """Out of it; see collectives."""
        return collectives.leave(x, self.group, self.sp)


class ColumnLinear(Linear):
    """Every rank computes its own features;  [B, L, D] -> [B, L, F/t]."""

    def __init__(self, of: Linear, ranks: Ranks) -> None:
        torch.nn.Module.__init__(self)
        self.weight, self.bias, self.ranks = of.weight, of.bias, ranks

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(self.ranks.enter(x), self.weight, self.bias)


class RowLinear(Linear):
    """Every rank multiplies its own features, the products are added, then the bias, once;  [B, L,
    F/t] -> [B, L, D]."""

    def __init__(self, of: Linear, ranks: Ranks) -> None:
        torch.nn.Module.__init__(self)
        self.weight, self.bias, self.ranks = of.weight, of.bias, ranks

    def forward(self, x: Tensor) -> Tensor:
        y = self.ranks.leave(ops.linear(x, self.weight))
        return y if self.bias is None else y + self.bias


def part_of(config: ModelConfig, tp: int) -> ModelConfig:
    """The sizes of one rank's modules: its heads, its features, its rows of the vocabulary."""
    return dataclasses.replace(
        config,
        num_heads=config.num_heads // tp,
        num_kv_heads=config.num_kv_heads // tp,
        ffn=config.ffn // tp,
        vocab=config.vocab // tp,
    )


def share(block: Block, ranks: Ranks) -> None:
    """Makes a block of a rank's sizes one part of the whole block."""
    block.attention.qkv = ColumnLinear(block.attention.qkv, ranks)
    block.attention.out = RowLinear(block.attention.out, ranks)
    block.mlp.up = ColumnLinear(block.mlp.up, ranks)
    block.mlp.down = RowLinear(block.mlp.down, ranks)


def embed(tokens: Tensor, table: Tensor, shrink: float, ranks: Ranks) -> Tensor:
    """ops.embedding of a table whose rows the ranks share out: zeros for the others' tokens, then
    the sum, exact in every dtype;  tokens [B, L], table [V/t, D] -> [B, L, D] or [B, L/t, D]."""
    local = tokens - ranks.rank * table.shape[0]
    mine = (local >= 0) & (local < table.shape[0])
    x = ops.embedding(local.clamp(0, table.shape[0] - 1), table, shrink)
    return ranks.leave(x.where(mine[..., None], x.new_zeros(())))


def loss(
    hidden: Tensor, head: Tensor, labels: Tensor, token_weight: Tensor, ranks: Ranks
) -> Tensor:
    """ops.linear_cross_entropy of a head whose rows the ranks share out;  hidden [B, L, D] or [B,
    L/t, D], head [V/t, D], labels and token_weight [B, L] -> float32 scalar, the same on every
    rank."""
    x = ranks.enter(hidden).flatten(0, 1)
    return parallel_cross_entropy(x, head, labels.flatten(), token_weight.flatten(), ranks.group)


def replicated(name: str) -> bool:
    """Is this parameter held whole by every rank? Under sequence parallelism each rank then has
    only its tokens' share of the gradient, and the shares are added."""
    table = name in ("embedding", "head")
    matrix = any(f".{part}." in name for part in ("qkv", "up"))
    return not (table or matrix or name.endswith(("out.weight", "down.weight")))


def own_tokens(x: Tensor, ranks: Ranks | None) -> Tensor:
    """Returns this rank's part of a sequence that every rank has whole;  [..., L] -> [..., L/t]
    under sequence parallelism."""
    if ranks is None or not ranks.sp:
        return x
    return x.chunk(ranks.size, -1)[ranks.rank]  # [..., L/t]
