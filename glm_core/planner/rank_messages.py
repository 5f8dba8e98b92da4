"""Predicts the messages that one rank of our own trainer sends in a step. Letters as in `rank`;
bytes are those of the whole array, as nccl-tests counts them."""

from __future__ import annotations

from collections import Counter

from glm_core.planner.rank import (
    BF16,
    FP32,
    Rank,
    Shapes,
    between_blocks,
    count,
    end_shapes,
    layer_shapes,
    rank_shapes,
    replicated_shapes,
)

MESSAGE = 1 << 25
"""elements of a gradient that are summed at once, in float32"""
Messages = Counter[tuple[str, int]]
"""(collective, bytes): how often a step sends it"""


def collectives(rank: Rank) -> dict[str, dict[str, int]]:
    """Returns {name: {count, bytes}} of one step."""
    totals: dict[str, dict[str, int]] = {}
    for (name, size), times in messages(rank).items():
        total = totals.setdefault(name, {"count": 0, "bytes": 0})
        total["count"] += times
        total["bytes"] += times * size
    return dict(sorted((name, total) for name, total in totals.items() if total["count"]))


def messages(rank: Rank) -> Messages:
    """Returns how often one step sends each message."""
    sent: Messages = Counter()
    _add_tensor_parallel(rank, sent)
    _add_pipeline(rank, sent)
    _add_data_parallel(rank, sent)
    return sent


def _add_gradient_sum(shapes: Shapes, ranks: int, sent: Messages) -> None:
    """Adds the all-reduce of gradients that several ranks hold, in messages of MESSAGE elements;
    `ranks` ranks share their rows."""
    full_messages, rest = divmod(count(shapes, ranks), MESSAGE)
    sent["all_reduce", FP32 * MESSAGE] += full_messages
    sent["all_reduce", FP32 * rest] += rest > 0


def _add_tensor_parallel(rank: Rank, sent: Messages) -> None:
    """Adds the messages between tensor-parallel ranks. With SP an all-reduce is an all-gather and a
    reduce-scatter, and the backward pass gathers each product's input once more."""
    p, c = rank.plan, rank.model
    if p.tp == 1:
        return
    m, layers = p.micro_batches, p.micro_batches * sum(rank.layers)
    recomputed = p.recompute == "full"  # the sum after a layer's last product is not recomputed
    activation = BF16 * rank.tokens * c.hidden
    embeddings, losses = m * rank.has_first_stage, m * rank.has_last_stage
    numbers_of_loss = 2 * FP32 * p.tp * rank.tokens  # logsumexp and label's logit of every token
    sent["all_gather", numbers_of_loss] += losses
    if p.sp:
        gathers, scatters = 4 + 2 * recomputed, 4 + recomputed
        sent["all_gather", activation] += layers * gathers + embeddings + losses
        sent["reduce_scatter", activation] += layers * scatters + embeddings + losses
        replicated = replicated_shapes(c) * sum(rank.layers)
        replicated += [
            (rows, columns)
            for rows, columns in end_shapes(rank)
            if columns == 1 or rows == c.max_length + 1
        ]
        _add_gradient_sum(replicated, p.dp if p.zero else 1, sent)
    else:
        sums = 4 + recomputed
        sent["all_reduce", activation] += layers * sums + embeddings + losses
    sent["all_reduce", FP32] += 1  # the gradient norm


def _add_pipeline(rank: Rank, sent: Messages) -> None:
    """Adds the messages between stages: two tensors for each micro-batch, neighbour and direction,
    a tied embedding's gradient between the ends, loss and norm."""
    p, c = rank.plan, rank.model
    if p.pp == 1:
        return
    neighbours = sum((s > 0) + (s < p.stages - 1) for s in rank.stages)
    for name in ("send", "recv"):
        sent[name, between_blocks(rank)] += 2 * neighbours * p.micro_batches
    if c.tied_head and rank.has_first_stage != rank.has_last_stage:
        _add_gradient_sum([(c.vocab // p.tp, c.hidden)], p.dp if p.zero else 1, sent)
    sent["all_reduce", FP32] += 2  # loss and norm


def _add_data_parallel(rank: Rank, sent: Messages) -> None:
    """Adds the messages between data-parallel ranks: gradients once; or under ZeRO weights gathered
    layer by layer, in stage 3 twice for each micro-batch, and gradients scattered in float32, from
    stage 2 on for each micro-batch. Loss, and under ZeRO the norm, are sums of one number."""
    p = rank.plan
    if p.dp == 1:
        return
    sent["all_reduce", FP32] += 1 + (p.zero > 0)  # loss; norm
    if not p.zero:
        _add_gradient_sum(rank_shapes(rank), 1, sent)
        return
    m = p.micro_batches
    gathers = 1
    if p.zero == 3:  # a pipeline's weights stay gathered between a backward pass and the next
        gathers = 2 * m if p.pp == 1 else m + 1
    scatters = m if p.zero > 1 and p.pp == 1 else 1  # a pipeline sums on the rank first
    ends = end_shapes(rank)
    for shapes, times in (
        (layer_shapes(rank.model, p.tp), sum(rank.layers)),
        (ends, 1 if ends else 0),
    ):
        padded = p.dp * count(shapes, p.dp)
        sent["all_gather", BF16 * padded] += times * gathers
        sent["reduce_scatter", FP32 * padded] += times * scatters
