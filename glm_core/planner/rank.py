"""Describes one rank of our own trainer under a plan: its layers and the shapes of its parameters.
`rank_memory` and `rank_messages` predict from it, without running the trainer; `plan dry-run` holds
both predictions against the real code.

Letters: T tokens of a micro-batch, D width, F ffn width, H heads, K kv heads, E head dim, V
vocabulary; t, d tensor- and data-parallel ranks, m micro-batches of a data-parallel rank."""

from __future__ import annotations

import dataclasses

from glm_core.config import ModelConfig, require_dense
from glm_core.distributed.plan import Plan, stage_layers, stages_of

BF16, FP32 = 2, 4
"""bytes of an element: of the working dtype, and of masters, moments and sums"""
Shapes = list[tuple[int, int]]
"""(rows, columns) of matrices; a vector has one column"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rank:
    """One rank of a job and the size of its micro-batches."""

    model: ModelConfig
    plan: Plan
    pp_rank: int
    """its place in the pipeline"""
    length: int
    """tokens of a sequence"""
    micro_batch: int
    """sequences of one micro-batch"""

    def __post_init__(self) -> None:
        require_dense(self.model, "prediction of a step of our own trainer")

    @property
    def tokens(self) -> int:
        """T"""
        return self.micro_batch * self.length

    @property
    def stages(self) -> list[int]:
        """The pipeline stages that the rank holds."""
        return stages_of(self.plan, self.pp_rank)

    @property
    def layers(self) -> list[int]:
        """The number of layers of each of its stages."""
        split = stage_layers(self.model.num_layers, self.plan.stages)
        return [len(split[s]) for s in self.stages]

    @property
    def has_first_stage(self) -> bool:
        return 0 in self.stages

    @property
    def has_last_stage(self) -> bool:
        return self.plan.stages - 1 in self.stages


def planned_rank(model: ModelConfig, plan: Plan, rank: int, length: int, global_batch: int) -> Rank:
    """Returns the description of global rank `rank`. Ranks are numbered with tp fastest, then dp,
    then pp."""
    return Rank(
        model=model,
        plan=plan,
        pp_rank=rank // (plan.tp * plan.dp),
        length=length,
        micro_batch=global_batch // (plan.dp * plan.micro_batches),
    )


def up_width(c: ModelConfig, t: int) -> int:
    """Returns the features of a rank's up projection: F / t, twice that where it is gated."""
    gates = 1 if c.activation == "gelu" else 2
    return gates * c.ffn // t


def layer_shapes(c: ModelConfig, t: int) -> Shapes:
    """Returns the shapes of one layer's parameters on a tensor-parallel rank."""
    qkv = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim // t
    heads = c.num_heads * c.head_dim // t
    up = up_width(c, t)
    attention = [(qkv, c.hidden), (c.hidden, heads)]
    mlp = [(up, c.hidden), (c.hidden, c.ffn // t)]
    biases = [(qkv, 1)] * c.qkv_bias + [(up, 1)] * c.linear_bias
    return [*replicated_shapes(c), *attention, *mlp, *biases]


def replicated_shapes(c: ModelConfig) -> Shapes:
    """Returns the shapes of a layer's parameters that every tensor-parallel rank holds whole: norms
    and the biases that are added after a sum over ranks."""
    norms = 4 if c.placement == "sandwich" else 2
    vectors_of_norm = 2 if c.norm == "layer" else 1
    return [(c.hidden, 1)] * (norms * vectors_of_norm + 2 * c.linear_bias)


def end_shapes(rank: Rank) -> Shapes:
    """Returns the shapes of embedding, position tables, final norm and head, as far as the rank
    holds them."""
    c = rank.model
    table = (c.vocab // rank.plan.tp, c.hidden)
    shapes = [table] * (rank.has_first_stage or (rank.has_last_stage and c.tied_head))
    if rank.has_first_stage and c.positions == "learned_2d":
        shapes += [(c.max_length + 1, c.hidden)] * 2
    if rank.has_last_stage:
        shapes += [(c.hidden, 1)] * (2 if c.norm == "layer" else 1)
        shapes += [table] * (not c.tied_head)
    return shapes


def rank_shapes(rank: Rank) -> Shapes:
    """Returns the shapes of all parameters of the rank."""
    return layer_shapes(rank.model, rank.plan.tp) * sum(rank.layers) + end_shapes(rank)


def count(shapes: Shapes, ranks: int = 1) -> int:
    """Returns the number of elements. Where `ranks` ranks share the rows, it is the first rank's,
    which has the most: rows are rounded up."""
    return sum(-(-rows // ranks) * columns for rows, columns in shapes)


def between_blocks(rank: Rank) -> int:
    """Returns the bytes of one of the two tensors, delta and residual, that pass from block to
    block: 2 T D, or 2 T D / t with SP."""
    return BF16 * rank.tokens * rank.model.hidden // (rank.plan.tp if rank.plan.sp else 1)
