"""The planted bugs: what a port of GLM to a new device gets wrong, as backends to be convicted."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from glm_core import ops
from glm_core.faults import wrong, wrong_attention, wrong_norm, wrong_training
from glm_core.faults.rearranged import native_layer_norm, native_residual
from glm_core.faults.variants import (
    BFLOAT16,
    FLOAT32,
    Bug,
    Function,
    Kernels,
    Kind,
    backward_only,
    changed,
    edited,
    forward_only,
    splice,
)

ATTENTION, CE = ops.attention, ops.linear_cross_entropy
CONTRACT = "no error there: one rounding of an intermediate to the working dtype or a finer one"
ONLY_LOW = "in float32 nothing is rounded to a narrower dtype or copied"


def one(op: str, function: Function) -> Callable[[], Kernels]:
    """The same kernel on every use."""
    return lambda: {op: function}


def fresh(op: str, make: Callable[[], Function]) -> Callable[[], Kernels]:
    """A new kernel for every backend."""
    return lambda: {op: make()}


def norms(kind: str, function: Function) -> Callable[[], Kernels]:
    """A norm with the mistake, alone and fused with the residual."""
    return lambda: {f"{kind}_norm": function, f"add_{kind}_norm": wrong_norm.added(function)}


def eps_norms(kind: str, eps: float) -> Callable[[], Kernels]:
    """A norm with another eps, alone and fused with the residual."""
    both = (f"{kind}_norm", f"add_{kind}_norm")
    return lambda: {op: changed(ops.all_ops()[op], eps=eps) for op in both}


def norm_gradients(kind: str, function: Function) -> Callable[[], Kernels]:
    """A norm whose gradients alone are those of `function`."""
    both = {f"{kind}_norm": function, f"add_{kind}_norm": wrong_norm.added(function)}
    return lambda: {op: backward_only(ops.all_ops()[op], f) for op, f in both.items()}


NORM = (
    Bug(
        "layer-norm-eps-1e-6",
        "eps",
        "layer_norm",
        "both",
        "eps 1e-6 for 1e-5",
        eps_norms("layer", 1e-6),
    ),
    Bug(
        "rms-norm-eps-2e-5", "eps", "rms_norm", "both", "eps 2e-5 for 1e-5", eps_norms("rms", 2e-5)
    ),
    Bug(
        "rms-norm-eps-outside-root",
        "eps",
        "rms_norm",
        "both",
        "x / (rms + eps)",
        norms("rms", wrong_norm.eps_outside_rms_norm),
    ),
    Bug(
        "layer-norm-unbiased-variance",
        "formula",
        "layer_norm",
        "both",
        "variance over D - 1",
        norms("layer", wrong_norm.unbiased_layer_norm),
    ),
    Bug(
        "layer-norm-dx-without-mean",
        "gradient",
        "layer_norm",
        "backward",
        "dx misses the mean's term",
        norm_gradients("layer", wrong_norm.no_mean_gradient),
    ),
    Bug(
        "rms-norm-dx-without-projection",
        "gradient",
        "rms_norm",
        "backward",
        "dx misses the root mean square's term",
        norm_gradients("rms", wrong_norm.no_projection_gradient),
    ),
    Bug(
        "layer-norm-dgamma-whole-tiles",
        "rare shape",
        "layer_norm",
        "backward",
        "dgamma sums whole tiles of 48 rows only",
        norm_gradients("layer", wrong_norm.without_tail(48, "weight")(ops.layer_norm.reference)),
    ),
    Bug(
        "layer-norm-no-dbeta",
        "gradient",
        "layer_norm",
        "backward",
        "dbeta is not computed",
        norm_gradients("layer", wrong_norm.without_tail(10**9, "bias")(ops.layer_norm.reference)),
    ),
    Bug(
        "add-layer-norm-alpha-0.1%",
        "scale",
        "add_layer_norm",
        "both",
        "DeepNorm's alpha too large by 0.1 %",
        one("add_layer_norm", changed(ops.add_layer_norm, alpha=lambda a: a["alpha"] * 1.001)),
    ),
    Bug(
        "add-layer-norm-no-alpha-in-gradient",
        "gradient",
        "add_layer_norm",
        "backward",
        "the residual's gradient is not multiplied by alpha",
        one("add_layer_norm", edited(ops.add_layer_norm, wrong_norm.alpha_forgotten)),
    ),
    Bug(
        "layer-norm-float16-internals",
        "dtype",
        "add_layer_norm",
        "both",
        "arithmetic in float16",
        one("add_layer_norm", wrong.inside(ops.add_layer_norm, torch.float16)),
        "",
        FLOAT32,
        CONTRACT,
    ),
    Bug(
        "rms-norm-bfloat16-internals",
        "dtype",
        "rms_norm",
        "both",
        "arithmetic in bfloat16",
        one("rms_norm", wrong.inside(ops.rms_norm, torch.bfloat16)),
        "",
        FLOAT32,
        CONTRACT,
    ),
    Bug(
        "rms-norm-bfloat16-sum",
        "dtype",
        "rms_norm",
        "both",
        "the mean square is accumulated in bfloat16",
        norms("rms", wrong_norm.low_sum_rms_norm),
    ),
    Bug(
        "add-layer-norm-bfloat16-alpha",
        "dtype",
        "add_layer_norm",
        "both",
        "torch.add in bfloat16, which rounds DeepNorm's alpha to bfloat16 (0.15 % here)",
        one("add_layer_norm", native_residual),
        "",
        BFLOAT16,
        "in float32 it is a benign change",
    ),
    Bug(
        "layer-norm-native-bfloat16",
        "dtype",
        "layer_norm",
        "backward",
        "torch's own kernel, whose dgamma and dbeta are summed in bfloat16",
        norms("layer", native_layer_norm),
        "",
        BFLOAT16,
        "in float32 it is a benign change",
    ),
    Bug(
        "layer-norm-truncated",
        "rounding",
        "add_layer_norm",
        "forward",
        "result cut to bfloat16",
        one(
            "add_layer_norm",
            forward_only(
                ops.add_layer_norm, wrong_norm.added(wrong.rounds(ops.layer_norm, wrong.truncated))
            ),
        ),
        "",
        BFLOAT16,
        ONLY_LOW,
    ),
    Bug(
        "residual-half-away",
        "rounding",
        "add_layer_norm",
        "forward",
        "the sum with the residual rounds ties away from zero",
        one("add_layer_norm", forward_only(ops.add_layer_norm, wrong_norm.half_away_residual)),
        "glm",
        BFLOAT16,
        ONLY_LOW,
    ),
    Bug(
        "layer-norm-stale-statistics",
        "stale",
        "add_layer_norm",
        "both",
        "every fifth call uses the previous call's mean and variance",
        fresh("add_layer_norm", lambda: wrong_norm.added(wrong_norm.stale_statistics(5))),
    ),
)

ACTIVATION = (
    Bug(
        "geglu-tanh",
        "formula",
        "geglu",
        "both",
        "tanh form for the erf form",
        one("geglu", wrong.gated(wrong.tanh_gelu, 1)),
    ),
    Bug(
        "geglu-halves-swapped",
        "formula",
        "geglu",
        "both",
        "gate and value exchanged",
        one("geglu", wrong.gated(torch.nn.functional.gelu, 0)),
    ),
    Bug(
        "geglu-gradient-tanh",
        "gradient",
        "geglu",
        "backward",
        "derivative of the tanh form",
        one("geglu", backward_only(ops.geglu, wrong.gated(wrong.tanh_gelu, 1))),
    ),
    Bug(
        "gelu-erf",
        "formula",
        "gelu",
        "both",
        "erf form for the tanh form",
        one("gelu", wrong.erf_gelu),
    ),
    Bug(
        "gelu-gradient-erf",
        "gradient",
        "gelu",
        "backward",
        "derivative of the erf form",
        one("gelu", backward_only(ops.gelu, wrong.erf_gelu)),
    ),
    Bug(
        "gelu-sigmoid",
        "formula",
        "gelu",
        "both",
        "x sigmoid(1.702 x)",
        one("gelu", wrong.sigmoid_gelu),
    ),
    Bug(
        "swiglu-halves-swapped",
        "formula",
        "swiglu",
        "both",
        "gate and value exchanged",
        one("swiglu", wrong.gated(torch.nn.functional.silu, 1)),
    ),
    Bug(
        "swiglu-rough-exp",
        "formula",
        "swiglu",
        "both",
        "exp with a relative error of 1e-4",
        one("swiglu", wrong.gated(wrong.rough_silu, 0)),
        "",
        FLOAT32,
        CONTRACT,
    ),
    Bug(
        "swiglu-half-derivative",
        "gradient",
        "swiglu",
        "backward",
        "misses the derivative of the sigmoid",
        one("swiglu", backward_only(ops.swiglu, wrong.gated(wrong.half_silu, 0))),
    ),
    Bug(
        "swiglu-float16-internals",
        "dtype",
        "swiglu",
        "both",
        "arithmetic in float16",
        one("swiglu", wrong.inside(ops.swiglu, torch.float16)),
        "",
        FLOAT32,
        CONTRACT,
    ),
    Bug(
        "swiglu-leaning-rounding",
        "rounding",
        "swiglu",
        "forward",
        "stochastic rounding, away from zero too often by 1/16",
        one("swiglu", forward_only(ops.swiglu, wrong.rounds(ops.swiglu, wrong.leaning))),
        "",
        BFLOAT16,
        ONLY_LOW,
    ),
    Bug(
        "swiglu-last-row-lost",
        "rare shape",
        "swiglu",
        "both",
        "the last row is zero where rows do not fill tiles of 64",
        one("swiglu", wrong.lost_last_row(64)),
    ),
)


def tables(change: Callable[[Tensor], Tensor]) -> Callable[[], Kernels]:
    """Rotation with both tables changed."""
    sides = {"cos": lambda a: change(a["cos"]), "sin": lambda a: change(a["sin"])}
    return one("rope", changed(ops.rope, **sides))


ROPE = (
    Bug(
        "rope-off-by-one",
        "position",
        "rope",
        "both",
        "every position takes its neighbour's angle",
        tables(lambda t: t.roll(1, 1)),
    ),
    Bug(
        "rope-interleaved-for-half",
        "position",
        "rope",
        "both",
        "pairs (2i, 2i + 1)",
        one("rope", changed(ops.rope, interleaved=True)),
    ),
    Bug(
        "rope-half-for-interleaved",
        "position",
        "rope",
        "both",
        "pairs (i, i + P)",
        one("rope", changed(ops.rope, interleaved=False)),
        "glm4",
    ),
    Bug(
        "rope-one-frequency-1%",
        "position",
        "rope",
        "both",
        "angle of pair 1 too large by 1 %",
        one(
            "rope",
            changed(
                ops.rope, cos=wrong.one_frequency(torch.cos), sin=wrong.one_frequency(torch.sin)
            ),
        ),
    ),
    Bug(
        "rope-gradient-wrong-way",
        "gradient",
        "rope",
        "backward",
        "rotates forwards again",
        one("rope", backward_only(ops.rope, changed(ops.rope, sin=lambda a: -a["sin"]))),
    ),
    Bug(
        "rope-bfloat16-tables",
        "dtype",
        "rope",
        "both",
        "cos and sin rounded to bfloat16",
        tables(wrong.through(torch.bfloat16)),
        "",
        FLOAT32,
        CONTRACT,
    ),
    Bug(
        "rope-last-pair-unrotated",
        "position",
        "rope",
        "both",
        "the slowest pair stays as it is",
        one("rope", wrong.last_pair_unrotated),
        "glm4",
    ),
    Bug(
        "rope-last-rows-repeat",
        "rare shape",
        "rope",
        "both",
        "rows past whole blocks of 16 use the last block's angles",
        tables(wrong.last_rows_repeat(16)),
        "glm4",
    ),
)


def attends(weights: wrong_attention.Weights) -> Callable[[], Kernels]:
    """Attention with these probabilities."""
    return one("attention", wrong_attention.attend(weights))


bf16 = wrong.through(torch.bfloat16)
SCORES = (
    Bug(
        "attention-scale-0.1%",
        "scale",
        "attention",
        "both",
        "scores too large by 0.1 %",
        one("attention", changed(ATTENTION, scale=lambda a: a["scale"] * 1.001)),
    ),
    Bug(
        "attention-scale-0.01%",
        "scale",
        "attention",
        "both",
        "scores too large by 0.01 %",
        one("attention", changed(ATTENTION, scale=lambda a: a["scale"] * 1.0001)),
    ),
    Bug(
        "attention-wrong-layer-scale",
        "scale",
        "attention",
        "both",
        "multiplied by the previous layer's number",
        one("attention", changed(ATTENTION, scale=wrong_attention.previous_layer)),
    ),
    Bug(
        "attention-one-key-too-many",
        "mask",
        "attention",
        "both",
        "key_end off by one",
        one("attention", changed(ATTENTION, key_end=wrong_attention.one_more_key)),
    ),
    Bug(
        "attention-causal-prefix",
        "mask",
        "attention",
        "both",
        "the prefix is causal",
        one("attention", changed(ATTENTION, key_end=wrong_attention.causal_end)),
    ),
    Bug(
        "attention-packed-leak",
        "mask",
        "attention",
        "both",
        "samples see each other",
        one("attention", changed(ATTENTION, key_start=lambda a: torch.zeros_like(a["key_start"]))),
    ),
    Bug(
        "attention-leaking-key",
        "mask",
        "attention",
        "both",
        "key 0 is visible to every query",
        one("attention", wrong_attention.leaking_key),
    ),
    Bug(
        "attention-leaking-head",
        "mask",
        "attention",
        "both",
        "head 0 sees one key too many",
        one("attention", wrong_attention.leaking_head),
    ),
    Bug(
        "attention-last-key-lost",
        "rare shape",
        "attention",
        "both",
        "the last key is unseen where keys do not fill blocks of 16",
        one("attention", changed(ATTENTION, key_end=wrong_attention.without_last_key)),
        "glm4",
    ),
    Bug(
        "attention-groups-interleaved",
        "formula",
        "attention",
        "both",
        "head h reads kv head h % K",
        one("attention", wrong_attention.interleaved_groups),
        "glm4",
    ),
    Bug(
        "attention-blocks-not-rescaled",
        "formula",
        "attention",
        "both",
        "online softmax keeps old sums when the maximum rises",
        attends(wrong_attention.unscaled_blocks(16)),
    ),
    Bug(
        "attention-bfloat16-softmax",
        "dtype",
        "attention",
        "both",
        "scores and probabilities in bfloat16",
        attends(wrong_attention.softmax(rounding=bf16)),
        "",
        FLOAT32,
        CONTRACT,
    ),
    Bug(
        "attention-float16-scores",
        "dtype",
        "attention",
        "both",
        "scores and probabilities in float16",
        attends(wrong_attention.softmax(rounding=wrong.through(torch.float16))),
        "",
        FLOAT32,
        CONTRACT,
    ),
    Bug(
        "attention-bfloat16-denominator",
        "dtype",
        "attention",
        "both",
        "the softmax's sum accumulated in bfloat16",
        attends(wrong_attention.softmax(total=wrong_attention.low_total(bf16, 4))),
    ),
    Bug(
        "attention-rough-exp",
        "formula",
        "attention",
        "both",
        "exp with a relative error of 1e-4",
        attends(wrong_attention.softmax(exp=wrong.rough_exp)),
        "",
        FLOAT32,
        CONTRACT,
    ),
    Bug(
        "attention-stale-result",
        "stale",
        "attention",
        "forward",
        "every seventh call returns the previous result",
        fresh("attention", lambda: forward_only(ATTENTION, wrong.stale(ATTENTION, 7))),
    ),
    Bug(
        "attention-dk-first-head",
        "gradient",
        "attention",
        "backward",
        "dk is not summed over the heads of a group",
        one("attention", backward_only(ATTENTION, wrong_attention.first_head_only("k"))),
        "glm4",
    ),
    Bug(
        "attention-dv-last-query-lost",
        "rows",
        "attention",
        "backward",
        "dv misses the last query",
        one("attention", backward_only(ATTENTION, wrong_attention.last_query_lost)),
    ),
    Bug(
        "attention-dq-0.1%",
        "scale",
        "attention",
        "backward",
        "dq too large by 0.1 %",
        one(
            "attention",
            splice(ATTENTION, ATTENTION.reference, wrong_attention.scaled_gradient("q", 1.001)),
        ),
    ),
    Bug(
        "attention-no-row-term",
        "gradient",
        "attention",
        "backward",
        "softmax's backward without the row sum",
        one(
            "attention",
            splice(
                ATTENTION,
                ATTENTION.reference,
                wrong_attention.flash_backward(wrong_attention.no_row_term),
            ),
        ),
    ),
    Bug(
        "attention-bfloat16-row-term",
        "dtype",
        "attention",
        "backward",
        "softmax's backward takes the row sum from a bfloat16 result",
        one(
            "attention",
            splice(
                ATTENTION,
                ATTENTION.reference,
                wrong_attention.flash_backward(wrong_attention.low_row_term),
            ),
        ),
        "",
        FLOAT32,
        CONTRACT,
    ),
)


def inputs(change: Callable[[Tensor], Tensor]) -> Callable[[], Kernels]:
    """The matrix product with both inputs changed."""
    sides = {"x": lambda a: change(a["x"]), "weight": lambda a: change(a["weight"])}
    return one("linear", changed(ops.linear, **sides))


LINEAR = (
    Bug(
        "linear-tf32",
        "dtype",
        "linear",
        "both",
        "inputs cut to 10 bits of mantissa",
        inputs(wrong.ten_bits),
        "",
        FLOAT32,
        CONTRACT,
    ),
    Bug(
        "linear-bfloat16-inputs",
        "dtype",
        "linear",
        "both",
        "inputs rounded to bfloat16",
        inputs(bf16),
        "",
        FLOAT32,
        CONTRACT,
    ),
    Bug(
        "linear-float16-accumulator",
        "dtype",
        "linear",
        "both",
        "running sum in float16",
        one("linear", wrong.partial_sums(torch.float16, 16)),
        "",
        FLOAT32,
        CONTRACT,
    ),
    Bug(
        "linear-bfloat16-accumulator",
        "dtype",
        "linear",
        "both",
        "running sum in bfloat16",
        one("linear", wrong.partial_sums(torch.bfloat16, 8)),
    ),
    Bug(
        "linear-truncated",
        "rounding",
        "linear",
        "forward",
        "result cut to bfloat16",
        one("linear", forward_only(ops.linear, wrong.rounds(ops.linear, wrong.truncated))),
        "",
        BFLOAT16,
        ONLY_LOW,
    ),
    Bug(
        "linear-no-dbias",
        "gradient",
        "linear",
        "backward",
        "dbias is not computed",
        one("linear", edited(ops.linear, wrong.no_bias_gradient)),
    ),
    Bug(
        "linear-dbias-last-row-lost",
        "rows",
        "linear",
        "backward",
        "dbias misses the last row",
        one("linear", splice(ops.linear, ops.linear.reference, wrong.linear_backward("bias"))),
    ),
    Bug(
        "linear-dweight-last-row-lost",
        "rows",
        "linear",
        "backward",
        "dweight misses the last row",
        one("linear", splice(ops.linear, ops.linear.reference, wrong.linear_backward("weight"))),
    ),
    Bug(
        "linear-row-repeated",
        "rows",
        "linear",
        "forward",
        "the last row of the last tile of 64 is the one before",
        one("linear", forward_only(ops.linear, wrong.repeated_row(64))),
    ),
    Bug(
        "linear-dx-stale-weight",
        "stale",
        "linear",
        "backward",
        "every fifth dx uses the previous weight of the same shape",
        fresh("linear", lambda: splice(ops.linear, ops.linear.reference, wrong.stale_weight(5))),
    ),
)

EMBEDDING = (
    Bug(
        "embedding-duplicates-overwritten",
        "rows",
        "embedding",
        "backward",
        "a row that occurs twice keeps one gradient",
        one("embedding", splice(ops.embedding, ops.embedding.reference, wrong.overwritten)),
    ),
    Bug(
        "embedding-no-shrink",
        "scale",
        "embedding",
        "backward",
        "the gradient is not shrunk",
        one("embedding", changed(ops.embedding, shrink=1.0)),
    ),
    Bug(
        "embedding-shrink-0.11",
        "scale",
        "embedding",
        "backward",
        "0.11 for 0.1",
        one("embedding", changed(ops.embedding, shrink=0.11)),
    ),
    Bug(
        "embedding-shrinks-value",
        "scale",
        "embedding",
        "forward",
        "the value is shrunk too",
        one("embedding", forward_only(ops.embedding, wrong.shrunk_value)),
    ),
    Bug(
        "embedding-last-token-lost",
        "rows",
        "embedding",
        "backward",
        "the last token's gradient is dropped",
        one("embedding", backward_only(ops.embedding, wrong.without_last_token)),
    ),
)

LOSS = (
    Bug(
        "ce-equal-weights-in-gradient",
        "gradient",
        "linear_cross_entropy",
        "backward",
        "every token has the same weight",
        one(CE.name, backward_only(CE, changed(CE, token_weight=wrong_training.equal_weights))),
    ),
    Bug(
        "ce-token-lost",
        "rows",
        "linear_cross_entropy",
        "both",
        "the last token is not counted",
        one(CE.name, changed(CE, token_weight=wrong_training.last_counted(0.0))),
    ),
    Bug(
        "ce-token-twice",
        "rows",
        "linear_cross_entropy",
        "both",
        "the last token is counted twice",
        one(CE.name, changed(CE, token_weight=wrong_training.last_counted(2.0))),
    ),
    Bug(
        "ce-bfloat16-logits",
        "dtype",
        "linear_cross_entropy",
        "both",
        "logits rounded to bfloat16",
        one(CE.name, wrong_training.cross_entropy(logits=bf16)),
        "",
        FLOAT32,
        CONTRACT,
    ),
    Bug(
        "ce-log-eps",
        "eps",
        "linear_cross_entropy",
        "both",
        "-log(p + 1e-6)",
        one(CE.name, wrong_training.cross_entropy(each=wrong_training.safe_log)),
    ),
    Bug(
        "ce-float16-logit-gradient",
        "dtype",
        "linear_cross_entropy",
        "backward",
        "the logits' gradient in float16 without loss scale",
        one(CE.name, splice(CE, CE.reference, wrong_training.half_logit_gradient)),
    ),
    Bug(
        "ce-last-class-lost",
        "rows",
        "linear_cross_entropy",
        "backward",
        "the last vocabulary row receives no gradient",
        one(CE.name, edited(CE, wrong_training.last_class_lost)),
        "glm4",
    ),
)


def adam(name: str, description: str, make: Function, kind: Kind = "optimizer") -> Bug:
    """A bug of the update."""
    return Bug(name, kind, "adamw", "update", description, one("adamw", make))


OPTIMIZER = (
    Bug(
        "norm-last-tensor-lost",
        "optimizer",
        "global_norm",
        "update",
        "the last tensor is missing",
        one("global_norm", changed(ops.global_norm, tensors=wrong_training.all_but_last)),
    ),
    Bug(
        "norm-sum-of-norms",
        "optimizer",
        "global_norm",
        "update",
        "norms added, not their squares",
        one("global_norm", wrong_training.sum_of_norms),
    ),
    Bug(
        "norm-bfloat16",
        "dtype",
        "global_norm",
        "update",
        "the norm of each tensor in bfloat16",
        one("global_norm", wrong_training.low_norm),
    ),
    adam("adamw-eps-1e-6", "1e-6 for 1e-8", changed(ops.adamw, eps=1e-6), "eps"),
    adam(
        "adamw-eps-inside-root",
        "sqrt(v + eps)",
        wrong_training.adam(denominator=wrong_training.eps_inside_root),
        "eps",
    ),
    adam(
        "adamw-coupled-decay",
        "weight decay through the gradient",
        wrong_training.adam(gradient=wrong_training.coupled, decoupled=False),
    ),
    adam(
        "adamw-decay-after-update",
        "decays the updated weights",
        wrong_training.adam(decay_first=False),
    ),
    adam(
        "adamw-vectors-decay",
        "norms and biases decay too",
        changed(ops.adamw, weight_decay=lambda a: a["weight_decay"] or 0.1),
    ),
    adam("adamw-beta2-0.999", "0.999 for 0.95", changed(ops.adamw, beta2=0.999)),
    adam(
        "adamw-step-off-by-one",
        "bias correction one step late",
        changed(ops.adamw, step=lambda a: a["step"] + 1),
    ),
    adam(
        "adamw-v-uncorrected",
        "no bias correction of the second moment",
        wrong_training.adam(denominator=wrong_training.uncorrected_root),
    ),
    adam(
        "adamw-no-clip",
        "the clip coefficient is ignored",
        changed(ops.adamw, grad_scale=lambda a: torch.ones_like(a["grad_scale"])),
    ),
    adam(
        "adamw-bfloat16-moments",
        "moments stored in bfloat16",
        wrong_training.adam(keep=bf16),
        "dtype",
    ),
    Bug(
        "adamw-copies-truncated",
        "rounding",
        "adamw",
        "update",
        "working copies cut to bfloat16",
        one("adamw", wrong_training.adam(store=wrong.truncated)),
        "",
        BFLOAT16,
        ONLY_LOW,
    ),
    Bug(
        "adamw-copies-stale",
        "stale",
        "adamw",
        "update",
        "working copies made before the update",
        one("adamw", wrong_training.adam(copy_first=True)),
        "",
        BFLOAT16,
        ONLY_LOW,
    ),
)

BUGS: tuple[Bug, ...] = (
    *NORM,
    *ACTIVATION,
    *ROPE,
    *SCORES,
    *LINEAR,
    *EMBEDDING,
    *LOSS,
    *OPTIMIZER,
)
