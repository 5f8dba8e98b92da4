"""What one rank of our own trainer takes and sends: formulas, written without running it. `plan
dry-run` holds them against the real code.

Letters: T tokens of a micro-batch, D width, F ffn width, H heads, K kv heads, E head dim, V
vocabulary; t, d tensor- and data-parallel ranks, m micro-batches of a data-parallel rank. The
working dtype has 2 bytes, float32 masters and moments 12."""

from __future__ import annotations

import dataclasses
from collections import Counter

from glm_core.config import ModelConfig
from glm_core.distributed.plan import Plan, stage_layers, stages_of

Shapes = list[tuple[int, int]]
"""(rows, columns) of matrices; vectors have one column"""
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
    norms = 4 if c.placement == "sandwich" else 2
    shapes = [(c.hidden, 1)] * norms * (2 if c.norm == "layer" else 1)
    shapes += [(qkv, c.hidden), (c.hidden, inner)]
    shapes += [(gates * c.ffn // t, c.hidden), (c.hidden, c.ffn // t)]
    shapes += [(qkv, 1)] * c.qkv_bias
    return shapes + [(c.hidden, 1), (gates * c.ffn // t, 1), (c.hidden, 1)] * c.linear_bias


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
    outputs; q, k after rotation and v within the fused projection; attention's and the
    activation's results; the activation's input."""
    c, t, tokens = job.model, job.plan.tp, job.tokens
    own = tokens // t if job.plan.sp else tokens
    stats = 8 if c.norm == "layer" else 4
    norms = 2 * own * (2 * 2 * c.hidden + stats)
    gathered = 2 * 2 * tokens * c.hidden if job.plan.sp else 0
    heads = 3 * c.num_kv_heads + 3 * c.num_heads  # fused projection, rotated q and k, result
    gates = 1 if c.activation == "gelu" else 2
    split = 2 * tokens * (heads * c.head_dim + (gates + 1) * c.ffn) // t
    return norms + gathered + split


def carried(job: Job) -> int:
    """Bytes of one of the two tensors between blocks: 2 T D, or 2 T D / t with SP."""
    return 2 * job.tokens * job.model.hidden // (job.plan.tp if job.plan.sp else 1)


def in_flight(job: Job) -> int:
    """Micro-batches whose activations a stage keeps at once: all of GPipe, p - i of 1F1B."""
    p, m = job.plan, job.plan.micro_batches
    if p.pp == 1:
        return 1
    return m if p.schedule == "gpipe" else min(m, p.pp - job.pp_rank)


def buffers(job: Job) -> int:
    """Receive buffers of torch's PipelineStage: one per micro-batch and tensor from either
    neighbour, all held from the first step on (torch 2.13, pipelining/stage.py)."""
    stages = job.stages
    links = sum((s > 0) + (s < job.plan.stages - 1) for s in stages)
    return links * 2 * job.plan.micro_batches * carried(job)


def memory(job: Job) -> dict[str, int]:
    """Bytes by part at the peak: during a backward pass, or where data-parallel ranks sum their
    gradients in one flat message (the message and its sum)."""
    c, p = job.model, job.plan
    d = p.dp if p.zero else 1
    layer = layer_shapes(c, p.tp)
    shapes = layer * sum(job.layers) + end_shapes(job)
    n, own = count(shapes), count(shapes, d)
    kept = activations(job) if p.recompute != "full" else 2 * carried(job)
    kept *= in_flight(job) * sum(job.layers)
    working = activations(job) if p.recompute == "full" else 0
    backward = kept + working + _transient(job) + _head(job)
    parts = {"weights": 2 * own, "optimizer": 12 * own, "buffers": buffers(job)}
    if not p.zero:
        summed = 4 * n if p.dp > 1 else 0
        if p.micro_batches > 1:
            return parts | {"gradients": 2 * n, "passing": max(backward, summed)}
        # no gradient is there yet when the only backward pass begins with the loss
        later = 2 * n + max(activations(job) + _transient(job), summed)
        begin = kept + _head(job)
        return parts | ({"passing": begin} if begin > later else
                        {"gradients": 2 * n, "passing": later - 2 * n})  # fmt: skip
    block = count(layer)
    gathered = 2 * n if p.zero < 3 else 2 * (2 * block + count(end_shapes(job)))
    unshared = 4 * n if p.zero == 1 and p.micro_batches > 1 else 4 * block + 2 * block
    gradients = 2 * own if p.zero > 1 else 0
    return parts | {"gathered": gathered, "gradients": unshared + gradients, "passing": backward}


def _transient(job: Job) -> int:
    """Of the backward pass of the largest product: gradients of its output, input and weight."""
    c, t = job.model, job.plan.tp
    wide = (1 if c.activation == "gelu" else 2) * c.ffn // t
    return 2 * (job.tokens * (wide + c.ffn // t) + wide * c.hidden)


def _head(job: Job) -> int:
    """The loss: without TP its op's gradients of input and weight are made in the forward pass;
    with TP a float32 sum of the weight's gradient, its last addend, and one chunk of logits."""
    if not job.last:
        return 0
    c, t = job.model, job.plan.tp
    table = c.vocab // t * c.hidden
    if t == 1:
        return 2 * (table + job.tokens * c.hidden)
    logits = min(CHUNK, job.tokens * c.vocab // t)
    return 4 * table + 2 * table + 12 * logits + 4 * job.tokens * c.hidden


def collectives(job: Job) -> dict[str, dict[str, int]]:
    """{name: {count, bytes}} of one step, bytes of the whole array each time."""
    sent: Counter[tuple[str, int]] = Counter()
    _tensor_parallel(job, sent)
    _pipeline(job, sent)
    _data_parallel(job, sent)
    found: dict[str, dict[str, int]] = {}
    for (name, size), times in sent.items():
        entry = found.setdefault(name, {"count": 0, "bytes": 0})
        entry["count"] += times
        entry["bytes"] += times * size
    return dict(sorted((k, v) for k, v in found.items() if v["count"]))


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
        whole = [s for s in layer_shapes(c, p.tp) if s == (c.hidden, 1)] * sum(job.layers)
        whole += [s for s in end_shapes(job) if s[1] == 1 or s[0] == c.max_length + 1]
        sent["all_reduce", 2 * count(whole)] += 1
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
        sent["all_reduce", 2 * count([(c.vocab // p.tp, c.hidden)])] += 1
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
        sent["all_reduce", 2 * count(layer * sum(job.layers) + ends)] += 1
        return
    m = p.micro_batches
    gathers = 2 * m if p.zero == 3 else 1
    scatters = m if p.zero > 1 else 1
    for shapes, times in ((layer, sum(job.layers)), (ends, 1 if ends else 0)):
        padded = p.dp * count(shapes, p.dp)
        sent["all_gather", 2 * padded] += times * gathers
        sent["reduce_scatter", 4 * padded] += times * scatters


def predict(model: ModelConfig, plan: Plan, rank: int, length: int, global_batch: int) -> Job:
    """The job of a global rank: tp fastest, then dp, then pp."""
    return Job(
        model=model, plan=plan, pp_rank=rank // (plan.tp * plan.dp), length=length,
        micro_batch=global_batch // (plan.dp * plan.micro_batches),
    )  # fmt: skip
