"""Counts the FLOPs, bytes and ideal seconds of one training step, whoever's software runs it. Every
function is one formula of `plan --explain`.

Letters: b micro-batch, s sequence, h width, F ffn width, V vocabulary, l layers; t, p, d the sizes
of the tensor-, pipeline- and data-parallel groups, m micro-batches, v chunks a chip."""

from __future__ import annotations

import dataclasses
import math

from glm_core.config import ModelConfig, require_dense
from glm_core.planner.cluster import Cluster
from glm_core.planner.sizing import Sizing


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """A model, its sequence length, and whether attention is fused."""

    model: ModelConfig
    seq: int
    """tokens of a sequence"""
    fused_attention: bool = True
    """no [s, s] matrix of scores is written to memory"""

    def __post_init__(self) -> None:
        require_dense(self.model, "planner")


def layer_parameters(c: ModelConfig) -> int:
    """Returns the parameters of one layer: h (H + 2 K) E + H E h + (2 or 3) h F + norms; K kv heads
    of E dimensions."""
    heads = c.num_heads + 2 * c.num_kv_heads
    attention = c.hidden * c.head_dim * (heads + c.num_heads)
    gates = 2 if c.activation == "gelu" else 3
    return attention + gates * c.hidden * c.ffn + 4 * c.hidden


def embedding_parameters(c: ModelConfig) -> int:
    """Returns V h, twice that where the head is not tied."""
    return c.vocab * c.hidden * (1 if c.tied_head else 2)


def parameters(c: ModelConfig) -> int:
    """Returns the parameters of l layers, embedding, head and learned position tables, without
    biases."""
    positions = 2 * (c.max_length + 1) * c.hidden if c.positions == "learned_2d" else 0
    return c.num_layers * layer_parameters(c) + embedding_parameters(c) + positions


def layer_flops(work: Work) -> float:
    """Returns the FLOPs of one layer's matrix products for one sequence, forward: 2 s (weights of
    the layer)."""
    c = work.model
    return 2.0 * work.seq * (layer_parameters(c) - 4 * c.hidden)


def attention_flops(work: Work) -> float:
    """Returns the FLOPs of one layer's attention for one sequence, forward: 4 s^2 H E. Every pair
    of tokens counts, as in the papers."""
    c = work.model
    return 4.0 * work.seq**2 * c.num_heads * c.head_dim


def head_flops(work: Work) -> float:
    """Returns the FLOPs of the head for one sequence, forward: 2 s h V."""
    return 2.0 * work.seq * work.model.hidden * work.model.vocab


def model_flops(work: Work) -> float:
    """Returns the FLOPs of one sequence, forward and backward, without recomputation: 3
    (forward)."""
    layers = work.model.num_layers * (layer_flops(work) + attention_flops(work))
    return 3.0 * (layers + head_flops(work))


def hardware_flops(work: Work, recompute: str) -> float:
    """Returns the FLOPs of one sequence with recomputation: `selective` adds a forward pass of
    attention's core, `full` one of the layers."""
    recomputed = {
        "none": 0.0,
        "selective": attention_flops(work),
        "full": layer_flops(work) + attention_flops(work),
    }[recompute]
    return model_flops(work) + work.model.num_layers * recomputed


def stage_parameters(plan: Sizing, c: ModelConfig, stage: int = 0) -> float:
    """Returns the parameters on a chip: (l/p layers + tables) / t. The first stage holds the
    embedding and the last the head, even where they are tied; a single stage holds tied weights
    once."""
    tables = c.vocab * c.hidden * ((stage == 0) + (stage == plan.pp - 1))
    if plan.pp == 1:
        tables = embedding_parameters(c)
    return (c.num_layers / plan.pp * layer_parameters(c) + tables) / plan.tp


def memory(plan: Sizing, work: Work, stage: int = 0) -> dict[str, float]:
    """Returns the bytes by part on a chip of a stage. Stage i keeps the activations of p - i
    micro-batches (1F1B), or of p (1 + (p - 1)/(p v)) when interleaved."""
    c, d, p = work.model, plan.dp, plan.pp
    n = stage_parameters(plan, c, stage)
    in_flight = p - stage if plan.virtual == 1 else p * (1 + (p - 1) / (p * plan.virtual))
    layers = c.num_layers / p * min(plan.micro_batches, in_flight)
    kept = layers * layer_activations(plan, work, plan.recompute)
    if plan.recompute == "full":  # the layer that is being recomputed
        kept += layer_activations(plan, work, "none")
    logits = 6.0 * plan.micro_batch * work.seq * c.vocab / plan.tp if stage == p - 1 else 0.0
    gathered = 4.0 * layer_parameters(c) / plan.tp if plan.zero == 3 else 0.0
    return {
        "weights": 2 * n / (d if plan.zero >= 3 else 1) + gathered,
        "gradients": 4 * n / (d if plan.zero >= 2 else 1),
        "optimizer": 12 * n / (d if plan.zero >= 1 else 1),
        "activations": kept,
        "logits": logits,
        "runtime": RUNTIME_BYTES,
    }


def stages(plan: Sizing, work: Work) -> list[dict[str, float]]:
    """Returns the memory of every stage."""
    return [memory(plan, work, stage) for stage in range(plan.pp)]


def fullest_stage(plan: Sizing, work: Work) -> dict[str, float]:
    """Returns the memory of the first stage, which keeps most micro-batches, or of the last, which
    has the logits: whichever needs more."""
    ends = (memory(plan, work, stage) for stage in {0, plan.pp - 1})
    return max(ends, key=lambda parts: sum(parts.values()))


RUNTIME_BYTES = 2e9
"""context, communication buffers and fragmentation of a chip: assumed"""
OPTIMIZER_BYTES = 28.0
"""memory traffic of an update for each parameter: float32 gradient, master and two moments read;
master and moments written"""


def layer_activations(plan: Sizing, work: Work, recompute: str) -> float:
    """Returns the bytes that one layer keeps of one micro-batch. Without recomputation they are
    s b h (10 + 24/t + 5 a s/(h t)) for a GELU layer of F = 4h, and with SP everything / t.
    Selective recomputation and fused attention drop the last term; full keeps the layer's input,
    2 s b h."""
    c, t = work.model, plan.tp
    tokens = plan.micro_batch * work.seq
    if recompute == "full":
        return 2.0 * tokens * c.hidden / (t if plan.sp else 1)
    of_width = 10.0 * tokens * c.hidden / (t if plan.sp else 1)
    heads = 2 * (c.num_heads * 2 + c.num_kv_heads * 2) * c.head_dim
    features = (4 if c.activation == "gelu" else 6) * c.ffn
    of_heads_and_features = tokens * (heads + features) / t
    scores = 5.0 * plan.micro_batch * work.seq**2 * c.num_heads / t
    keeps_scores = not (recompute == "selective" or work.fused_attention)
    return of_width + of_heads_and_features + (scores if keeps_scores else 0.0)


@dataclasses.dataclass(frozen=True, slots=True)
class Ideal:
    """The seconds of a step by part if everything ran at its nominal rate. Times the fitted factors
    they become a prediction."""

    matmul: float
    elementwise: float
    tensor_parallel: float
    pipeline: float
    data_parallel: float
    optimizer: float
    launches: float
    """passes of a layer: a count, no seconds"""
    bubble: float
    """share of the step, 0 to 1"""


def ideal(plan: Sizing, work: Work, cluster: Cluster) -> Ideal:
    """Returns the seconds of a step at nominal rates. The slowest stage works m times; filling and
    draining the pipeline adds (p - 1)/v times a stage. All stages but the last hold ceil(l/p)
    layers; the last has the head in place of those it lacks."""
    c, b, m = work.model, plan.micro_batch, plan.micro_batches
    rounds = m + (plan.pp - 1) / plan.virtual
    layers = math.ceil(c.num_layers / plan.pp)
    layers_of_last = c.num_layers - (plan.pp - 1) * layers
    passes = {"none": 3, "selective": 3, "full": 4}[plan.recompute]
    attention_passes = passes + (plan.recompute == "selective")
    products, attention = passes * layer_flops(work), attention_passes * attention_flops(work)
    layer = b * (products + attention) / plan.tp
    head = 3 * b * head_flops(work) / plan.tp
    flops = max(layers * layer, layers_of_last * layer + head)
    traffic = layers * elementwise_bytes(plan, work, attention_passes)
    reduced = layers * 2.0 * all_reduces(plan) * ring(plan.tp) * b * work.seq * c.hidden * 2
    link = cluster.link_within_node
    if plan.tp > cluster.chips_per_node:
        link = cluster.link_between_nodes
    sent = 4.0 * b * work.seq * c.hidden / plan.tp * plan.virtual if plan.pp > 1 else 0.0
    updated = OPTIMIZER_BYTES * stage_parameters(plan, c) / (plan.dp if plan.zero else 1)
    return Ideal(
        matmul=rounds * flops / cluster.peak,
        elementwise=rounds * traffic / cluster.memory_bandwidth,
        tensor_parallel=rounds * reduced / link,
        pipeline=m * sent / cluster.link_between_nodes,
        data_parallel=data_parallel_seconds(plan, work, cluster),
        optimizer=updated / cluster.memory_bandwidth,
        launches=rounds * layers * attention_passes,
        bubble=plan.bubble,
    )


def ring(n: int) -> float:
    """Returns the share of the data that each of n ranks sends in a ring all-gather or
    reduce-scatter."""
    return (n - 1) / n


def all_reduces(plan: Sizing) -> int:
    """Returns the all-reduces of a layer: two forward, two backward, two more where the layer is
    recomputed."""
    return 6 if plan.recompute == "full" else 4


def elementwise_bytes(plan: Sizing, work: Work, passes: float) -> float:
    """Returns the memory traffic of one layer and micro-batch: each pass writes and reads its
    activations once. Scores that are written cost 10 bytes for each pair and pass."""
    scores = 10.0 * plan.micro_batch * work.seq**2 * work.model.num_heads / plan.tp
    fused = dataclasses.replace(work, fused_attention=True)
    activations = layer_activations(plan, fused, "none")
    return passes * (2 * activations + (0.0 if work.fused_attention else scores))


def data_parallel_seconds(plan: Sizing, work: Work, cluster: Cluster) -> float:
    """Returns the seconds of data-parallel messages. Gradients are all-reduced once a step, 2 x 4 n
    bytes; under ZeRO 3 weights are gathered twice and gradients scattered in every micro-batch,
    3 x 2 n bytes. The ranks of a node share its outer links: a buffer crosses each node's border
    once, and passes every chip's inner link."""
    n = stage_parameters(plan, work.model)
    sent = plan.micro_batches * 6.0 * n if plan.zero == 3 else 8.0 * n
    sent *= ring(plan.dp)
    of_one_node = max(1, min(plan.dp, cluster.chips_per_node // plan.tp))
    inner = sent / cluster.link_within_node if of_one_node > 1 else 0.0
    outer = sent / (of_one_node * cluster.link_between_nodes) if plan.dp > of_one_node else 0.0
    return max(inner, outer)
