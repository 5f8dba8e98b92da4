"""Counts the FLOPs, bytes and ideal seconds of one training step, whoever's software runs it. Every
function is one formula of `plan --explain`.

Letters: b micro-batch, s sequence, h width, F ffn width, V vocabulary, l layers; t, p, d, e the
sizes of the tensor-, pipeline-, data- and expert-parallel groups, m micro-batches, v chunks a chip.
X experts of a sparse layer, T of a token, G width of one. Dense and sparse layers are spread evenly
over stages, so a layer is a mean one; a layer of multi-token prediction is a sparse one."""

from __future__ import annotations

import dataclasses
import math

from glm_core.config import ModelConfig
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


def num_layers(c: ModelConfig) -> int:
    """Returns l, with the layers of multi-token prediction."""
    return c.num_layers + c.num_mtp_layers


def num_sparse(c: ModelConfig) -> int:
    """Returns the layers with experts."""
    return num_layers(c) - c.num_dense_layers if c.num_experts else 0


def attention_parameters(c: ModelConfig) -> int:
    """Returns h (H + 2 K) E + H E h, K kv heads of E dimensions. With latent attention: the
    products down to the latents and from them to H heads, and the output's."""
    if c.kv_latent:
        heads, rotated = c.num_heads * c.head_dim, c.rope_head_dim
        queries = c.q_latent * (c.hidden + heads) if c.q_latent else c.hidden * heads
        keys_values = c.num_heads * (c.head_dim - rotated + c.value_head_dim)
        out = c.num_heads * c.value_head_dim * c.hidden
        return queries + c.hidden * (c.kv_latent + rotated) + c.kv_latent * keys_values + out
    heads = c.num_heads + 2 * c.num_kv_heads
    return c.hidden * c.head_dim * (heads + c.num_heads)


def expert_parameters(c: ModelConfig) -> float:
    """Returns the parameters of a mean layer's X experts: 3 h G X of a sparse one."""
    return 3 * c.hidden * c.expert_ffn * c.num_experts * num_sparse(c) / num_layers(c)


def shared_parameters(c: ModelConfig) -> float:
    """Returns the parameters of a mean layer that every token passes: attention, norms, (2 or 3)
    h F of a dense layer; of a sparse one the router and the shared experts, and 2 h^2 where it
    predicts further tokens."""
    gates = 2 if c.activation == "gelu" else 3
    dense = (num_layers(c) - num_sparse(c)) * gates * c.hidden * c.ffn
    sparse = c.num_experts + 3 * c.num_shared_experts * c.expert_ffn
    feed_forward = dense + num_sparse(c) * sparse * c.hidden + c.num_mtp_layers * 2 * c.hidden**2
    return attention_parameters(c) + feed_forward / num_layers(c) + 4 * c.hidden


def layer_parameters(c: ModelConfig) -> float:
    """Returns the parameters of a mean layer."""
    return shared_parameters(c) + expert_parameters(c)


def embedding_parameters(c: ModelConfig) -> int:
    """Returns V h, twice that where the head is not tied."""
    return c.vocab * c.hidden * (1 if c.tied_head else 2)


def parameters(c: ModelConfig) -> int:
    """Returns the parameters of l layers, embedding, head and learned position tables, without
    biases."""
    positions = 2 * (c.max_length + 1) * c.hidden if c.positions == "learned_2d" else 0
    return round(num_layers(c) * layer_parameters(c)) + embedding_parameters(c) + positions


def layer_flops(work: Work) -> float:
    """Returns the FLOPs of one layer's matrix products for one sequence, forward: 2 s (weights of
    the layer that a token passes), of its experts T / X."""
    c = work.model
    chosen = expert_parameters(c) * c.experts_per_token / max(c.num_experts, 1)
    return 2.0 * work.seq * (shared_parameters(c) + chosen - 4 * c.hidden)


def attention_flops(work: Work) -> float:
    """Returns the FLOPs of one layer's attention for one sequence, forward: 4 s^2 H E; of latent
    attention 2 s^2 H (E + U), U the value head's size. Every pair of tokens counts, as in the
    papers."""
    c = work.model
    return 2.0 * work.seq**2 * c.num_heads * (c.head_dim + (c.value_head_dim or c.head_dim))


def head_flops(work: Work) -> float:
    """Returns the FLOPs of the head for one sequence, forward: 2 s h V, once more for each further
    token that is predicted."""
    c = work.model
    return 2.0 * work.seq * c.hidden * c.vocab * (1 + c.num_mtp_layers)


def model_flops(work: Work) -> float:
    """Returns the FLOPs of one sequence, forward and backward, without recomputation: 3
    (forward)."""
    layers = num_layers(work.model) * (layer_flops(work) + attention_flops(work))
    return 3.0 * (layers + head_flops(work))


def hardware_flops(work: Work, recompute: str) -> float:
    """Returns the FLOPs of one sequence with recomputation: `selective` adds a forward pass of
    attention's core, `full` one of the layers."""
    recomputed = {
        "none": 0.0,
        "selective": attention_flops(work),
        "full": layer_flops(work) + attention_flops(work),
    }[recompute]
    return model_flops(work) + num_layers(work.model) * recomputed


def stage_parameters(plan: Sizing, c: ModelConfig, stage: int = 0) -> float:
    """Returns the parameters on a chip: (l/p layers + tables) / t, of the experts 1/e."""
    return stage_shared(plan, c, stage) + stage_experts(plan, c)


def stage_experts(plan: Sizing, c: ModelConfig) -> float:
    """Returns the parameters of experts on a chip. d/e data-parallel chips hold the same ones."""
    return num_layers(c) / plan.pp * expert_parameters(c) / (plan.tp * plan.ep)


def stage_shared(plan: Sizing, c: ModelConfig, stage: int = 0) -> float:
    """Returns the other parameters on a chip. The first stage holds the embedding and the last the
    head, even where they are tied; a single stage holds tied weights once. With multi-token
    prediction the last stage has the embedding, too."""
    last = 2 if c.num_mtp_layers and not c.tied_head else 1
    tables = c.vocab * c.hidden * ((stage == 0) + last * (stage == plan.pp - 1))
    if plan.pp == 1:
        tables = embedding_parameters(c)
    return (num_layers(c) / plan.pp * shared_parameters(c) + tables) / plan.tp


def shard_parameters(plan: Sizing, c: ModelConfig, stage: int = 0) -> float:
    """Returns a chip's share of them where ZeRO shares them out: over d chips, experts over d/e."""
    return (stage_shared(plan, c, stage) + stage_experts(plan, c) * plan.ep) / plan.dp


def memory(plan: Sizing, work: Work, stage: int = 0) -> dict[str, float]:
    """Returns the bytes by part on a chip of a stage. Stage i keeps the activations of p - i
    micro-batches (1F1B), or of p (1 + (p - 1)/(p v)) when interleaved."""
    c, p = work.model, plan.pp
    whole, part = stage_parameters(plan, c, stage), shard_parameters(plan, c, stage)
    in_flight = p - stage if plan.virtual == 1 else p * (1 + (p - 1) / (p * plan.virtual))
    layers = num_layers(c) / p * min(plan.micro_batches, in_flight)
    kept = layers * layer_activations(plan, work, plan.recompute)
    if plan.recompute == "full":  # the layer that is being recomputed
        kept += layer_activations(plan, work, "none")
    logits = 6.0 * plan.micro_batch * work.seq * c.vocab / plan.tp if stage == p - 1 else 0.0
    of_layer = shared_parameters(c) + expert_parameters(c) / plan.ep
    gathered = 4.0 * of_layer / plan.tp if plan.zero == 3 else 0.0
    return {
        "weights": 2 * (part if plan.zero >= 3 else whole) + gathered,
        "gradients": 4 * (part if plan.zero >= 2 else whole),
        "optimizer": 12 * (part if plan.zero >= 1 else whole),
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
    of_heads_and_features = tokens * (heads + kept_features(c)) / t
    of_width += 4.0 * tokens * c.hidden * c.experts_per_token * num_sparse(c) / num_layers(c)
    scores = 5.0 * plan.micro_batch * work.seq**2 * c.num_heads / t
    keeps_scores = not (recompute == "selective" or work.fused_attention)
    return of_width + of_heads_and_features + (scores if keeps_scores else 0.0)


def kept_features(c: ModelConfig) -> float:
    """Returns the bytes that a mean layer's feed-forward part keeps of a token: (4 or 6) F, for a
    sparse layer 6 G of each expert that the token passes. The rows that go into its T experts, and
    come out of them, are 4 T h more."""
    dense = (4 if c.activation == "gelu" else 6) * c.ffn * (num_layers(c) - num_sparse(c))
    each = 6 * c.expert_ffn * (c.experts_per_token + c.num_shared_experts)
    return (dense + each * num_sparse(c)) / num_layers(c)


@dataclasses.dataclass(frozen=True, slots=True)
class Ideal:
    """The seconds of a step by part if everything ran at its nominal rate. Times the fitted factors
    they become a prediction."""

    matmul: float
    elementwise: float
    tensor_parallel: float
    expert_parallel: float
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
    layers = math.ceil(num_layers(c) / plan.pp)
    layers_of_last = num_layers(c) - (plan.pp - 1) * layers
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
    updated = shard_parameters(plan, c) if plan.zero else stage_parameters(plan, c)
    return Ideal(
        matmul=rounds * flops / cluster.peak,
        elementwise=rounds * traffic / cluster.memory_bandwidth,
        tensor_parallel=rounds * reduced / link,
        expert_parallel=rounds * layers * expert_parallel_seconds(plan, work, cluster),
        pipeline=m * sent / cluster.link_between_nodes,
        data_parallel=data_parallel_seconds(plan, work, cluster),
        optimizer=OPTIMIZER_BYTES * updated / cluster.memory_bandwidth,
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
    shared, experts = stage_shared(plan, work.model), stage_experts(plan, work.model)
    sent = shared * ring(plan.dp) + experts * ring(plan.dp // plan.ep)
    sent *= plan.micro_batches * 6.0 if plan.zero == 3 else 8.0
    of_one_node = max(1, min(plan.dp, cluster.chips_per_node // plan.tp))
    inner = sent / cluster.link_within_node if of_one_node > 1 else 0.0
    outer = sent / (of_one_node * cluster.link_between_nodes) if plan.dp > of_one_node else 0.0
    return max(inner, outer)


def expert_bytes(plan: Sizing, work: Work) -> float:
    """Returns the bytes of one all-to-all of a sparse layer and micro-batch on a chip: the rows of
    b s tokens for T experts each, 2 b s T h. Each of e chips has as many rows for every chip."""
    c = work.model
    return 2.0 * plan.micro_batch * work.seq * c.experts_per_token * c.hidden


def expert_parallel_seconds(plan: Sizing, work: Work, cluster: Cluster) -> float:
    """Returns the seconds of a mean layer's all-to-alls for one micro-batch: two forward, two
    backward, two more where the layer is recomputed; (e - 1)/e of the rows leave the chip. Chips of
    a node exchange theirs over its inner links, the rest crosses its border."""
    c = work.model
    if plan.ep == 1:
        return 0.0
    exchanges = 6 if plan.recompute == "full" else 4
    rows = exchanges * expert_bytes(plan, work) * num_sparse(c) / num_layers(c)
    of_one_node = max(1, min(plan.ep, cluster.chips_per_node // plan.tp))
    inner, outer = (of_one_node - 1) / plan.ep, (plan.ep - of_one_node) / plan.ep
    links = cluster.link_within_node, cluster.link_between_nodes
    return max(rows * inner / links[0], rows * outer / links[1])
