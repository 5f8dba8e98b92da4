"""Predicts the memory of one rank of our own trainer at the fullest instant of a step.

Letters as in `rank`. Activations and gathered weights have the working dtype's 2 bytes an element,
masters and moments 12."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from glm_core.planner.rank import (
    BF16,
    FP32,
    Rank,
    between_blocks,
    count,
    end_shapes,
    layer_shapes,
    rank_shapes,
    up_width,
)
from glm_core.planner.rank_messages import MESSAGE

CHUNK = 1 << 22
"""float32 logits that the tensor-parallel loss forms at once"""


def memory(rank: Rank) -> dict[str, int]:
    """Returns the bytes by part at the fullest instant of a step."""
    zero = rank.plan.zero
    own = count(rank_shapes(rank), rank.plan.dp if zero else 1)
    # under ZeRO the weights that a rank holds are float32 and are their own masters
    state = {
        "weights": (FP32 if zero else BF16) * own,
        "optimizer": (2 * FP32 if zero else 3 * FP32) * own,
    }
    instants = _instants_with_zero(rank) if zero else _instants_without_zero(rank)
    return state | max(instants, key=lambda parts: sum(parts.values()))


def _instant(gathered: int, gradients: int, passing: int) -> dict[str, int]:
    """Returns what one instant adds to weights and optimizer: weights gathered from other ranks,
    gradients, and activations with temporary tensors."""
    return {"gathered": gathered, "gradients": gradients, "passing": passing}


class BackwardPass(NamedTuple):
    """The backward pass of one micro-batch through one stage."""

    kept_layers: int
    """layers, counted once for each micro-batch, whose activations exist when it begins"""
    stage: int
    """index into the rank's stages"""
    has_gradients: bool
    """every gradient of the rank existed before"""


def backward_passes(rank: Rank) -> set[BackwardPass]:
    """Returns the different backward passes of a step. The orders are GPipe's, 1F1B's and
    interleaved 1F1B's (torch 2.13, pipelining/schedules.py). Zero-bubble schedules are treated as
    if the gradients of input and weight were computed together."""
    p, layers = rank.plan, rank.layers
    num_stages, ranks_behind = len(layers), p.pp - rank.pp_rank - 1
    total = p.micro_batches * num_stages
    in_flight = (2 if p.schedule == "interleaved" else 1) * ranks_behind
    warmup = min(total, (num_stages - 1) * p.pp + in_flight)
    if p.schedule == "gpipe":
        warmup = total
    forwards = [i // p.pp % num_stages for i in range(total)]
    kept = sum(layers[s] for s in forwards[:warmup])
    done, passes = set[int](), set[BackwardPass]()
    for mirrored, forward in itertools.zip_longest(forwards, forwards[warmup:]):
        kept += layers[forward] if forward is not None else 0
        stage = num_stages - 1 - mirrored
        passes.add(BackwardPass(kept, stage, len(done) == num_stages))
        kept -= layers[stage]
        done.add(stage)
    return passes


def _instants_without_zero(rank: Rank) -> Iterator[dict[str, int]]:
    """Yields the candidates for the fullest instant without ZeRO. Gradients have the working dtype
    where there is one micro-batch; else they are float32 sums, to which each is cast and added."""
    plan, layers = rank.plan, rank.layers
    several = plan.micro_batches > 1
    elements = count(rank_shapes(rank))
    layer_elements = count(layer_shapes(rank.model, plan.tp))
    table = rank.model.vocab // plan.tp * rank.model.hidden
    cast_table = (BF16 + FP32) * table
    kept_layer, working = kept_of_layer(rank), working_of_layer(rank)
    gradient = FP32 if several else BF16
    for p in backward_passes(rank):
        kept = p.kept_layers * kept_layer + _kept_for_pipeline(rank, p.kept_layers)
        before = gradient * elements * p.has_gradients
        # the pass begins: at the loss or in the stage's last layer
        from_loss = _gradients_of_loss(rank, p.stage)
        at_loss = _loss(rank, p.stage)
        if several and from_loss and plan.tp == 1:
            at_loss += cast_table
        yield _instant(0, before, kept + max(at_loss, from_loss + working))
        # in the stage's first layer, whose gradients, with the embedding's, are still missing
        embeds = rank.stages[p.stage] == 0
        missing = 0 if p.has_gradients else gradient * (layer_elements + table * embeds)
        first_layer = kept - (layers[p.stage] - 1) * kept_layer
        yield _instant(0, gradient * elements - missing, first_layer + working)
        if embeds:
            new_table = cast_table if several and p.has_gradients else BF16 * table
            rest = kept - layers[p.stage] * kept_layer
            yield _instant(0, gradient * elements, rest + new_table)
    summed_at_once = FP32 * min(elements, MESSAGE) if plan.dp > 1 else 0
    yield _instant(0, gradient * elements, summed_at_once)


def _instants_with_zero(rank: Rank) -> Iterator[dict[str, int]]:
    """Yields the candidates for the fullest instant under ZeRO. FSDP2 (torch 2.13,
    fsdp/_fully_shard) gathers a layer in one message and copies it out; in stage 3 the next layer
    is gathered while one computes. A layer's gradients leave in a float32 message, which is kept
    until the next layer's. Stage 1, and every stage in a pipeline, sums whole gradients in float32
    and reduces them after the last micro-batch."""
    plan = rank.plan
    dp, m, num_layers = plan.dp, plan.micro_batches, sum(rank.layers)
    layer, ends = count(layer_shapes(rank.model, plan.tp)), count(end_shapes(rank))
    elements, shard = layer * num_layers + ends, count(rank_shapes(rank), dp)
    reduced_late = plan.pp > 1 or (plan.zero == 1 and m > 1)
    sums = FP32 * (elements if reduced_late else shard)
    all_weights = BF16 * elements
    always_whole = all_weights if plan.zero < 3 else 0
    kept_layer, working = kept_of_layer(rank), working_of_layer(rank)
    for p in backward_passes(rank):
        stage_layers = rank.layers[p.stage]
        kept = p.kept_layers * kept_layer + _kept_for_pipeline(rank, p.kept_layers)
        from_loss = _gradients_of_loss(rank, p.stage)
        before = sums * p.has_gradients
        is_last_pass = m == 1 + p.has_gradients
        frees_weights = plan.pp == 1 and is_last_pass
        other_stages = BF16 * layer * (num_layers - stage_layers)
        at_once = min(2, stage_layers)  # while one layer computes, the next is gathered
        two_layers = always_whole or other_stages + BF16 * (ends + at_once * layer)
        one_layer = always_whole or two_layers - BF16 * layer
        # the pass begins: the ends' weights are copied out of their message
        ends_alone = always_whole or other_stages + 2 * BF16 * ends
        yield _instant(ends_alone, before, kept + from_loss)
        yield _instant(one_layer, before, kept + _loss(rank, p.stage))
        # in the stage's last layer
        yield _instant(two_layers, before, kept + from_loss + working)
        # in the layer before it, while the last layer's gradients leave
        freed = BF16 * layer * (frees_weights and plan.zero < 3)
        message = 0 if reduced_late and p.has_gradients else FP32 * layer
        passing = kept + from_loss + working - kept_layer
        yield _instant(two_layers - freed, before + message, passing)
        # the pass ends: no activation of the stage is left
        stays_whole = plan.pp > 1 or (plan.zero < 3 and not frees_weights)
        stays = all_weights if stays_whole else BF16 * ends
        layer_gradients = (BF16 if reduced_late else FP32) * layer
        end_gradients = BF16 * ends * rank.has_first_stage
        rest = kept - stage_layers * kept_layer
        yield _instant(stays, sums, rest + layer_gradients + end_gradients + from_loss)
    # the ends' message leaves last: it is made from their gradients, then copied into the shard
    stays = all_weights if plan.pp > 1 or (plan.zero < 3 and m > 1) else 0
    message = FP32 * max(ends, layer)
    if reduced_late:
        yield _instant(stays, sums, message)
    else:
        ends_shard = FP32 * ends // dp
        message += max(BF16 * ends, ends_shard)
        yield _instant(stays, sums - ends_shard, message)
    yield _instant(0, sums, message * (m > 1))


def kept_of_layer(rank: Rank) -> int:
    """Returns the bytes that a layer keeps of a micro-batch for its backward pass."""
    if rank.plan.recompute == "full":
        return 2 * between_blocks(rank)
    return activations(rank)


def working_of_layer(rank: Rank) -> int:
    """Returns the bytes that a layer's backward pass needs besides: gradients, and with full
    recomputation the activations."""
    again = activations(rank) if rank.plan.recompute == "full" else 0
    return _gradients_of_layer(rank) + again


def activations(rank: Rank) -> int:
    """Returns the bytes of one layer's activations for one micro-batch, nothing recomputed."""
    c, p, tokens = rank.model, rank.plan, rank.tokens
    own_tokens = tokens // p.tp if p.sp else tokens
    num_norms = 4 if c.placement == "sandwich" else 2
    statistics = (2 if c.norm == "layer" else 1) * FP32
    norm_inputs = num_norms * own_tokens * (BF16 * c.hidden + statistics)
    norm_outputs = 2 * BF16 * tokens * c.hidden  # of the norms before products; with SP gathered
    qkv_and_result = c.num_heads + 2 * c.num_kv_heads + c.num_heads
    rotated = 0 if c.positions == "learned_2d" else c.num_heads + c.num_kv_heads
    attention = (qkv_and_result + rotated) * c.head_dim
    mlp = up_width(c, 1) + c.ffn  # what goes into the activation function and its result
    return norm_inputs + norm_outputs + BF16 * tokens * (attention + mlp) // p.tp


def _kept_for_pipeline(rank: Rank, kept_layers: int) -> int:
    """Returns the bytes kept for the micro-batches in flight, of which `kept_layers` layers are
    kept, outside these layers.

    GPipe's last stage without TP keeps the gradients of every other micro-batch's loss, which its
    op makes in the forward pass. A tensor between stages counts where no layer counts it: under
    full recomputation those sent, else those received and one of the two sent, whose sum is a
    norm's input. Of gradients, one pair has arrived or is formed, and one is still being sent."""
    in_flight = kept_layers / sum(rank.layers)
    waiting_losses = 0.0
    if rank.plan.schedule == "gpipe" and rank.plan.tp == 1:
        waiting_losses = in_flight - 1
    receiving = sum(s > 0 for s in rank.stages)
    sending = sum(s < rank.plan.stages - 1 for s in rank.stages)
    kept_tensors = 2 * sending if rank.plan.recompute == "full" else 2 * receiving + sending
    gradient_tensors = 2 * (sending + receiving)
    between = between_blocks(rank) * (kept_tensors * in_flight + gradient_tensors)
    return int(waiting_losses * _gradients_of_loss(rank, 0) + between)


def _gradients_of_layer(rank: Rank) -> int:
    """Returns the bytes of the gradients that exist at once in a layer: of the activation
    function's input and result with the up projection's weight, or of the result with the weight
    and its float32 copy."""
    c, t = rank.model, rank.plan.tp
    up = up_width(c, t)
    result = BF16 * rank.tokens * c.ffn // t
    both = BF16 * (rank.tokens * (up + c.ffn // t) + up * c.hidden)
    casts = rank.plan.micro_batches > 1 and not rank.plan.zero
    return max(both, result + (BF16 + FP32) * up * c.hidden * casts)


def _gradients_of_loss(rank: Rank, stage: int) -> int:
    """Returns the bytes of the gradients of the loss's input and weight, which exist while the
    layers go backward; 0 for a stage without the head."""
    c = rank.model
    if rank.stages[stage] != rank.plan.stages - 1:
        return 0
    return BF16 * c.hidden * (c.vocab // rank.plan.tp + rank.tokens)


def _loss(rank: Rank, stage: int) -> int:
    """Returns the bytes of the loss. Without TP its op makes the gradients of input and weight in
    the forward pass. With TP there are a float32 sum of the weight's gradient, input and gradient
    of the input, and a chunk of logits with the next addend of the sum or with the next chunk."""
    c, t = rank.model, rank.plan.tp
    gradients = _gradients_of_loss(rank, stage)
    if t == 1 or not gradients:
        return gradients
    table = c.vocab // t * c.hidden
    all_logits = rank.tokens * c.vocab // t
    chunk = min(CHUNK, all_logits)
    adding = (2 * FP32 + BF16) * chunk + BF16 * table
    next_chunk = ((4 if all_logits > chunk else 3) * FP32) * chunk
    weight_sum, input_and_gradient = FP32 * table, 2 * BF16 * rank.tokens * c.hidden
    return weight_sum + max(adding, next_chunk) + input_and_gradient
