"""What one rank of our own trainer takes and sends: formulas, written without running it. `plan
dry-run` holds them against the real code.

Letters: T tokens of a micro-batch, D width, F ffn width, H heads, K kv heads, E head dim, V
vocabulary; t, d tensor- and data-parallel ranks, m micro-batches of a data-parallel rank. The
working dtype has 2 bytes, float32 masters and moments 12."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator

from glm_core.config import ModelConfig
from glm_core.distributed.plan import Plan, stage_layers, stages_of

Shapes = list[tuple[int, int]]
"""(rows, columns) of matrices; vectors have one column"""
MESSAGE = 1 << 25
"""elements of a gradient that are summed at once, in float32"""
CHUNK = 1 << 22
"""float32 logits that the shared vocabulary's loss forms at once"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A rank's view of a step."""

    model: ModelConfig
    plan: Plan
    pp_rank: int
    length: int
    micro_batch: int
    """sequences of one micro-batch"""

    @property
    def tokens(self) -> int:
        return self.micro_batch * self.length

    @property
    def stages(self) -> list[int]:
        return stages_of(self.plan, self.pp_rank)

    @property
    def layers(self) -> list[int]:
        """Layers of each stage held."""
        split = stage_layers(self.model.num_layers, self.plan.stages)
        return [len(split[s]) for s in self.stages]

    @property
    def first(self) -> bool:
        return 0 in self.stages

    @property
    def last(self) -> bool:
        return self.plan.stages - 1 in self.stages


def layer_shapes(c: ModelConfig, t: int) -> Shapes:
    """One layer's parameters on a tensor-parallel rank."""
    e, gates = c.head_dim, 1 if c.activation == "gelu" else 2
    inner, qkv = c.num_heads * e // t, (c.num_heads + 2 * c.num_kv_heads) * e // t
    shapes = [*held_whole(c), (qkv, c.hidden), (c.hidden, inner)]
    shapes += [(gates * c.ffn // t, c.hidden), (c.hidden, c.ffn // t)]
    return shapes + [(qkv, 1)] * c.qkv_bias + [(gates * c.ffn // t, 1)] * c.linear_bias


def held_whole(c: ModelConfig) -> Shapes:
    """Of one layer what every tensor-parallel rank has: norms, biases after the sums."""
    norms = (4 if c.placement == "sandwich" else 2) * (2 if c.norm == "layer" else 1)
    return [(c.hidden, 1)] * (norms + 2 * c.linear_bias)


def end_shapes(job: Job) -> Shapes:
    """Embedding, position tables, final norm and head, as far as the rank holds them."""
    c = job.model
    table = (c.vocab // job.plan.tp, c.hidden)
    shapes = [table] * (job.first or (job.last and c.tied_head))
    if job.first and c.positions == "learned_2d":
        shapes += [(c.max_length + 1, c.hidden)] * 2
    if job.last:
        shapes += [(c.hidden, 1)] * (2 if c.norm == "layer" else 1)
        shapes += [table] * (not c.tied_head)
    return shapes


def count(shapes: Shapes, ranks: int = 1) -> int:
    """Elements; of a rank's rows where `ranks` share them out, the first ranks' share."""
    return sum(-(-rows // ranks) * columns for rows, columns in shapes)


def activations(job: Job) -> int:
    """Bytes one layer keeps of a micro-batch for its backward pass: the norms' sums, statistics and
    outputs (with SP gathered); a sandwich's outer norms keep their input; q, k after rotation and v
    within the fused projection; attention's and the activation's results; the activation's
    input."""
    c, p, tokens = job.model, job.plan, job.tokens
    own, stats = tokens // p.tp if p.sp else tokens, 8 if c.norm == "layer" else 4
    norms = own * (2 * c.hidden + stats) * (4 if c.placement == "sandwich" else 2)
    outputs = 2 * 2 * tokens * c.hidden
    heads = 2 * c.num_kv_heads + 2 * c.num_heads  # fused projection and result
    if c.positions != "learned_2d":
        heads += c.num_kv_heads + c.num_heads  # rotated q and k
    gates = 1 if c.activation == "gelu" else 2
    split = 2 * tokens * (heads * c.head_dim + (gates + 1) * c.ffn) // p.tp
    return norms + outputs + split


def carried(job: Job) -> int:
    """Bytes of one of the two tensors between blocks: 2 T D, or 2 T D / t with SP."""
    return 2 * job.tokens * job.model.hidden // (job.plan.tp if job.plan.sp else 1)


def backwards(job: Job) -> set[tuple[int, int, bool]]:
    """Of the backward passes of a step, without repetition: layers whose activations the rank keeps
    when it begins, which of its stages goes, whether every gradient was there before. The orders
    are GPipe's, 1F1B's and interleaved 1F1B's (torch 2.13, pipelining/schedules.py); the
    zero-bubble ones are taken as if input and weight went backward together."""
    p, layers = job.plan, job.layers
    v, waiting = len(layers), p.pp - job.pp_rank - 1
    total = p.micro_batches * v
    warm = (v - 1) * p.pp + (2 if p.schedule == "interleaved" else 1) * waiting
    warm = total if p.schedule == "gpipe" else min(total, warm)
    turns = [i // p.pp % v for i in range(total)]
    kept, seen, found = (
        sum(layers[s] for s in turns[:warm]),
        set[int](),
        set[tuple[int, int, bool]](),
    )
    for turn, forward in itertools.zip_longest(turns, turns[warm:]):
        kept += layers[forward] if forward is not None else 0
        stage = v - 1 - turn
        found.add((kept, stage, len(seen) == v))
        kept -= layers[stage]
        seen.add(stage)
    return found


def memory(job: Job) -> dict[str, int]:
    """Bytes by part at the peak: the fullest of a step's moments."""
    p = job.plan
    shapes = layer_shapes(job.model, p.tp) * sum(job.layers) + end_shapes(job)
    own = count(shapes, p.dp if p.zero else 1)
    # under ZeRO what a rank holds of the weights is float32, and so the masters
    parts = {"weights": (4 if p.zero else 2) * own, "optimizer": (8 if p.zero else 12) * own}
    moments = _sharded(job) if p.zero else _replicated(job)
    return parts | max(moments, key=lambda held: sum(held.values()))


def _kept(job: Job) -> tuple[int, int]:
    """Bytes that a layer keeps of a micro-batch, and that its backward pass works with besides."""
    if job.plan.recompute == "full":
        return 2 * carried(job), _transient(job) + activations(job)
    return activations(job), _transient(job)


def _replicated(job: Job) -> Iterator[dict[str, int]]:
    """Without ZeRO: as a backward pass begins, at its last layer, at the embedding, and where
    data-parallel ranks sum their gradients, a message at a time. Gradients are of the working dtype
    where there is one micro-batch, else float32, cast as they come."""
    layer = layer_shapes(job.model, job.plan.tp)
    n, (one, busy) = count(layer * sum(job.layers) + end_shapes(job)), _kept(job)
    several, table = job.plan.micro_batches > 1, job.model.vocab // job.plan.tp * job.model.hidden
    each = 4 if several else 2
    whole = each * n
    for layers, stage, there in backwards(job):
        kept, left = layers * one + _waiting(job, layers), _loss_left(job, stage)
        cast = 6 * table if several and left and job.plan.tp == 1 else 0
        yield _held(0, whole * there, kept + max(_head(job, stage) + cast, left + busy))
        first = job.stages[stage] == 0
        formed = 0 if there else each * (count(layer) + table * first)  # only now
        yield _held(0, whole - formed, kept - (job.layers[stage] - 1) * one + busy)
        if first:
            formed = 6 * table if several and there else 2 * table
            yield _held(0, whole, kept - job.layers[stage] * one + formed)
    yield _held(0, whole, 4 * min(n, MESSAGE) * (job.plan.dp > 1))


def _sharded(job: Job) -> Iterator[dict[str, int]]:
    """What a rank under ZeRO has beside its shards. FSDP2 (torch 2.13, fsdp/_fully_shard) gathers a
    layer into one message and copies it out; in stage 3 the next layer's comes while one computes.
    A layer's gradients leave in a float32 message, kept until the next one's. Stage 1, and in a
    pipeline every stage, sums them whole in float32 until the last micro-batch."""
    p, layer, ends = job.plan, count(layer_shapes(job.model, job.plan.tp)), count(end_shapes(job))
    num, m, (one, busy) = sum(job.layers), p.micro_batches, _kept(job)
    n, late = layer * num + ends, p.pp > 1 or (p.zero == 1 and m > 1)
    own = count(layer_shapes(job.model, p.tp) * num + end_shapes(job), p.dp)
    sums, whole = 4 * n if late else 4 * own, 2 * n if p.zero < 3 else 0
    for layers, stage, there in backwards(job):
        chunk, left, before = job.layers[stage], _loss_left(job, stage), sums * there
        kept = layers * one + _waiting(job, layers)
        others = 2 * layer * (num - chunk)
        two = whole or others + 2 * ends + 2 * min(2, chunk) * layer
        reshards = p.pp == 1 and m == 1 + there
        yield _held(whole or others + 4 * ends, before, kept + left)
        yield _held(whole or two - 2 * layer, before, kept + _head(job, stage))
        yield _held(two, before, kept + left + busy)
        gone = 2 * layer * (reshards and p.zero < 3)
        message = 0 if late and there else 4 * layer
        yield _held(two - gone, before + message, kept + left + busy - one)
        stays = 2 * n if p.pp > 1 or (p.zero < 3 and not reshards) else 2 * ends
        fresh = (2 if late else 4) * layer + 2 * ends * job.first + left
        yield _held(stays, sums, kept - one * chunk + fresh)
    # the ends' message last: from their gradients, then into the shard's part
    stays = 2 * n if p.pp > 1 or (p.zero < 3 and m > 1) else 0
    message = 4 * max(ends, layer) + (not late) * max(2 * ends, 4 * ends // p.dp)
    yield _held(stays, sums - (not late) * 4 * ends // p.dp, message)
    yield _held(0, sums, message * (m > 1))


def _held(gathered: int, gradients: int, passing: int) -> dict[str, int]:
    """Bytes of one moment beside weights, optimizer and buffers."""
    return {"gathered": gathered, "gradients": gradients, "passing": passing}


def _loss_left(job: Job, stage: int) -> int:
    """Of the loss, while the layers go backward: gradients of its input and weight."""
    c, last = job.model, job.stages[stage] == job.plan.stages - 1
    return 2 * c.hidden * (c.vocab // job.plan.tp + job.tokens) if last else 0


def _waiting(job: Job, layers: int) -> int:
    """What else is there for micro-batches of which so many layers are kept. GPipe's last stage has
    the loss's of every other one: without TP its gradients are made in the forward pass. Of the two
    tensors that go between stages, where they are not among a layer's: under full recompute what
    was sent, else what came and one of the sent, whose sum is a norm's. And of gradients the pair
    that came, that is formed and that is still being sent."""
    flights = layers / sum(job.layers)
    others = flights - 1 if job.plan.schedule == "gpipe" and job.plan.tp == 1 else 0
    come = sum(s > 0 for s in job.stages)
    gone = sum(s < job.plan.stages - 1 for s in job.stages)
    kept = 2 * gone if job.plan.recompute == "full" else 2 * come + gone
    between = carried(job) * (kept * flights + 2 * (gone + come))
    return int(others * _loss_left(job, 0) + between)


def _transient(job: Job) -> int:
    """Of the backward pass of the largest product: gradients of its output, input and weight, or of
    input and weight and the latter in float32."""
    c, t = job.model, job.plan.tp
    wide = (1 if c.activation == "gelu" else 2) * c.ffn // t
    weight = 6 * wide * c.hidden if job.plan.micro_batches > 1 and not job.plan.zero else 0
    formed = 2 * (job.tokens * (wide + c.ffn // t) + wide * c.hidden)
    return max(formed, 2 * job.tokens * c.ffn // t + weight)


def _head(job: Job, stage: int) -> int:
    """The loss: without TP its op's gradients of input and weight are made in the forward pass;
    with TP a float32 sum of the weight's gradient and, of one chunk of logits, the next addend or
    the next chunk."""
    c, t = job.model, job.plan.tp
    left, table = _loss_left(job, stage), c.vocab // t * c.hidden
    if t == 1 or not left:
        return left
    every = job.tokens * c.vocab // t
    logits = min(CHUNK, every)
    passing = max(10 * logits + 2 * table, (16 if every > logits else 12) * logits)
    return 4 * table + passing + 4 * job.tokens * c.hidden


def collectives(job: Job) -> dict[str, dict[str, int]]:
    """{name: {count, bytes}} of one step, bytes of the whole array each time."""
    found: dict[str, dict[str, int]] = {}
    for (name, size), times in messages(job).items():
        entry = found.setdefault(name, {"count": 0, "bytes": 0})
        entry["count"] += times
        entry["bytes"] += times * size
    return dict(sorted((k, v) for k, v in found.items() if v["count"]))


def _summed(elements: int, sent: Counter[tuple[str, int]]) -> None:
    """Gradients that several ranks hold, message by message."""
    full, rest = divmod(elements, MESSAGE)
    sent["all_reduce", 4 * MESSAGE] += full
    sent["all_reduce", 4 * rest] += rest > 0


def messages(job: Job) -> Counter[tuple[str, int]]:
    """How often one step sends (name, bytes of the whole array)."""
    sent: Counter[tuple[str, int]] = Counter()
    _tensor_parallel(job, sent)
    _pipeline(job, sent)
    _data_parallel(job, sent)
    return sent


def _tensor_parallel(job: Job, sent: Counter[tuple[str, int]]) -> None:
    """Two messages a layer forward and two backward, one or three more where it is computed again
    (what follows its last product is not); one at the embedding; at the loss one backward, and two
    numbers a token of every rank. With SP an all-reduce is a gather and a scatter."""
    p, c = job.plan, job.model
    if p.tp == 1:
        return
    m, full = p.micro_batches, 2 * job.tokens * c.hidden
    passed, again = m * sum(job.layers), p.recompute == "full"
    sent["all_gather", 8 * p.tp * job.tokens] += m * job.last
    if p.sp:
        sent["all_gather", full] += passed * (4 + 2 * again) + m * (job.first + job.last)
        sent["reduce_scatter", full] += passed * (4 + again) + m * (job.first + job.last)
        whole = held_whole(c) * sum(job.layers)
        whole += [s for s in end_shapes(job) if s[1] == 1 or s[0] == c.max_length + 1]
        _summed(count(whole, p.dp if p.zero else 1), sent)
    else:
        sent["all_reduce", full] += passed * (4 + again) + m * (job.first + job.last)
    sent["all_reduce", 4] += 1  # the norm


def _pipeline(job: Job, sent: Counter[tuple[str, int]]) -> None:
    """Two tensors a micro-batch and neighbour each way, and torch's greeting of 4 bytes; a tied
    embedding's gradient between the ends; loss and norm."""
    p, c = job.plan, job.model
    if p.pp == 1:
        return
    links = sum((s > 0) + (s < p.stages - 1) for s in job.stages)
    for name in ("send", "recv"):
        sent[name, carried(job)] += 2 * links * p.micro_batches
        sent[name, 4] += links
    if c.tied_head and job.first != job.last:
        _summed(count([(c.vocab // p.tp, c.hidden)], p.dp if p.zero else 1), sent)
    sent["all_reduce", 4] += 2


def _data_parallel(job: Job, sent: Counter[tuple[str, int]]) -> None:
    """Gradients once, or ZeRO's: weights gathered layer by layer, twice a micro-batch in stage 3,
    gradients scattered in float32 every micro-batch from stage 2 on; loss, and with ZeRO norm."""
    p, c = job.plan, job.model
    if p.dp == 1:
        return
    layer, ends = layer_shapes(c, p.tp), end_shapes(job)
    sent["all_reduce", 4] += 1 + (p.zero > 0)
    if not p.zero:
        _summed(count(layer * sum(job.layers) + ends), sent)
        return
    m = p.micro_batches
    # between a backward pass and the next one a pipeline's weights stay gathered, sums are local
    gathers = 1 if p.zero < 3 else 2 * m if p.pp == 1 else m + 1
    scatters = m if p.zero > 1 and p.pp == 1 else 1
    for shapes, times in ((layer, sum(job.layers)), (ends, 1 if ends else 0)):
        padded = p.dp * count(shapes, p.dp)
        sent["all_gather", 2 * padded] += times * gathers
        sent["reduce_scatter", 4 * padded] += times * scatters


def predict(model: ModelConfig, plan: Plan, rank: int, length: int, global_batch: int) -> Job:
    """The job of a global rank: tp fastest, then dp, then pp."""
    return Job(
        model=model,
        plan=plan,
        pp_rank=rank // (plan.tp * plan.dp),
        length=length,
        micro_batch=global_batch // (plan.dp * plan.micro_batches),
    )
