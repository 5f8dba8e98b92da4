"""Splits a layer's matrices over the ranks of a tensor-parallel group: the model's own modules at a
rank's sizes, whose projections communicate. `layout` says which rows a rank holds.

Every rank holds norms and the biases after a row-parallel product, and they stay equal. Shapes: B
batch, L sequence, D width, F features of all ranks, V vocabulary, t ranks."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from glm_core import dispatch, ops
from glm_core.config import ModelConfig
from glm_core.distributed import collectives, exact_tensor
from glm_core.distributed.vocabulary import parallel_cross_entropy
from glm_core.model.glm import MLP, Attention, Block, Linear, Norm


@dataclasses.dataclass(frozen=True, slots=True)
class Ranks:
    """The tensor-parallel group of this process."""

    group: ProcessGroup
    sp: bool
    """sequence parallelism: between the matrices each rank holds its part of the sequence"""

    @property
    def size(self) -> int:
        """t, the number of ranks."""
        return self.group.size()

    @property
    def rank(self) -> int:
        """This process's rank in the group."""
        return self.group.rank()

    def enter(self, x: Tensor) -> Tensor:
        """Enters what is split over ranks, as `collectives.enter`."""
        return collectives.enter(x, self.group, self.sp)

    def leave(self, x: Tensor) -> Tensor:
        """Leaves what is split over ranks, as `collectives.leave`."""
        return collectives.leave(x, self.group, self.sp)

    def whole(self, x: Tensor) -> Tensor:
        """Gathers the sequence in an exact run, where every rank has the whole gradient."""
        return exact_tensor.whole_sequence(x, self.group) if self.sp else x


class ColumnLinear(Linear):
    """A linear layer of which every rank computes its own features;  [B, L, D] -> [B, L, F/t]."""

    def __init__(self, linear: Linear, ranks: Ranks, sections: tuple[int, ...]) -> None:
        """sections: see exact_tensor.Sections."""
        torch.nn.Module.__init__(self)
        self.weight, self.bias, self.ranks = linear.weight, linear.bias, ranks
        self.sections = sections

    def forward(self, x: Tensor) -> Tensor:
        if dispatch.session().exact:
            own = self.weight, self.bias, self.sections
            return exact_tensor.column_linear(self.ranks.whole(x), *own, self.ranks.group)
        return ops.linear(self.ranks.enter(x), self.weight, self.bias)


class RowLinear(Linear):
    """A linear layer of which every rank multiplies its own features. The products are summed over
    ranks, then the bias is added once;  [B, L, F/t] -> [B, L, D]."""

    def __init__(self, linear: Linear, ranks: Ranks) -> None:
        torch.nn.Module.__init__(self)
        self.weight, self.bias, self.ranks = linear.weight, linear.bias, ranks

    def forward(self, x: Tensor) -> Tensor:
        if dispatch.session().exact:
            y = exact_tensor.row_linear(x, self.weight, self.bias, self.ranks.group)
            return exact_tensor.own_tokens(y, self.ranks.group) if self.ranks.sp else y
        y = self.ranks.leave(ops.linear(x, self.weight))
        return y if self.bias is None else y + self.bias


def part_of(config: ModelConfig, tp: int) -> ModelConfig:
    """Returns the config of one rank's modules: its heads, features and rows of the vocabulary."""
    return dataclasses.replace(
        config,
        num_heads=config.num_heads // tp,
        num_kv_heads=config.num_kv_heads // tp,
        ffn=config.ffn // tp,
        expert_ffn=config.expert_ffn // tp,
        vocab=config.vocab // tp,
    )


def share(block: Block, ranks: Ranks) -> None:
    """Makes the projections of a block of a rank's sizes, and its norms of a rank's tokens,
    communicate; experts are `expert_parallel`'s."""
    if ranks.sp:
        for name, norm in [(n, m) for n, m in block.named_children() if isinstance(m, Norm)]:
            setattr(block, name, exact_tensor.SequenceNorm(norm, ranks.group))
    if isinstance(block.attention, Attention):
        c = block.attention.config
        kv = c.num_kv_heads * c.head_dim
        sections = (c.num_heads * c.head_dim, kv, kv)
        block.attention.qkv = ColumnLinear(block.attention.qkv, ranks, sections)
    else:  # every rank makes the latents whole, for its own heads
        block.attention.register_forward_pre_hook(lambda _, args: (ranks.enter(args[0]), *args[1:]))
    block.attention.out = RowLinear(block.attention.out, ranks)
    if isinstance(block.mlp, MLP):
        share_mlp(block.mlp, ranks)


def share_mlp(mlp: MLP, ranks: Ranks) -> None:
    """Makes both projections of a feed-forward part of a rank's size communicate."""
    ffn = mlp.down.weight.shape[1]
    mlp.up = ColumnLinear(mlp.up, ranks, (ffn,) * (mlp.up.weight.shape[0] // ffn))
    mlp.down = RowLinear(mlp.down, ranks)


def embed(tokens: Tensor, table: Tensor, shrink: float, ranks: Ranks) -> Tensor:
    """Computes ops.embedding with a table whose rows are split over ranks: zeros for other ranks'
    tokens, then the sum, which is exact in every dtype;  tokens [B, L], table [V/t, D] ->
    [B, L, D] or [B, L/t, D]."""
    local = tokens - ranks.rank * table.shape[0]
    mine = (local >= 0) & (local < table.shape[0])
    x = ops.embedding(local.clamp(0, table.shape[0] - 1), table, shrink)
    return ranks.leave(x.where(mine[..., None], x.new_zeros(())))


def loss(
    hidden: Tensor, head: Tensor, labels: Tensor, token_weight: Tensor, ranks: Ranks
) -> Tensor:
    """Computes ops.linear_cross_entropy with a head whose rows are split over ranks;  hidden
    [B, L, D] or [B, L/t, D], head [V/t, D], labels and token_weight [B, L] -> float32 scalar, the
    same on every rank."""
    if dispatch.session().exact:
        return exact_tensor.loss(ranks.whole(hidden), head, labels, token_weight, ranks.group)
    x = ranks.enter(hidden).flatten(0, 1)  # [B L, D]
    return parallel_cross_entropy(x, head, labels.flatten(), token_weight.flatten(), ranks.group)


def own_tokens(x: Tensor, ranks: Ranks | None) -> Tensor:
    """Returns this rank's part of a sequence that every rank has whole;  [..., L] -> [..., L/t]
    under sequence parallelism."""
    if ranks is None or not ranks.sp:
        return x
    return x.chunk(ranks.size, -1)[ranks.rank]  # [..., L/t]
