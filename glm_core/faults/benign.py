"""The benign changes: what an honest port does differently and must not be convicted for."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from glm_core import ops
from glm_core.backends import registry
from glm_core.backends.base import Backend
from glm_core.faults import rearranged as other
from glm_core.faults import rearranged_training as late
from glm_core.faults.variants import BFLOAT16, BOTH, FLOAT32, Function, Kernels, backend, splice
from glm_core.faults.wrong import gated
from glm_core.faults.wrong_attention import attend, flash_backward
from glm_core.faults.wrong_training import cross_entropy
from glm_core.ops.precision import wide


@dataclasses.dataclass(frozen=True, slots=True)
class Benign:
    """One honest change: kernels that round differently, another backend, or another way to run."""

    name: str
    op: str
    """the op it changes; empty = all"""
    description: str
    kernels: Kernels = dataclasses.field(default_factory=dict)
    setup: str = ""
    """the small model it runs in (`catalogue.SETUPS`); empty = the one for its op"""
    dtypes: tuple[str, ...] = BOTH
    """working dtypes in which some bit changes"""
    registered: str = ""
    """a registered backend's name, in place of kernels"""
    micro_batch: int = 0
    """sequences per forward; 0 = the whole global batch"""
    threads: int = 1
    neutral: bool = False
    """so small a model changes no bit: it runs, but is no evidence and not counted"""

    def backend(self) -> Backend:
        """The changed backend."""
        if self.registered:
            return registry.get(self.registered)
        return backend(f"benign:{self.name}", self.kernels)


F = torch.nn.functional
CE = ops.linear_cross_entropy


def linear(name: str, description: str, kernel: Function, **rest: Any) -> Benign:
    """A change of the matrix product."""
    return Benign(f"linear-{name}", "linear", description, {"linear": kernel}, **rest)


def attention(name: str, description: str, kernel: Function, **rest: Any) -> Benign:
    """A change of attention."""
    return Benign(f"attention-{name}", "attention", description, {"attention": kernel}, **rest)


def loss(name: str, description: str, kernel: Function, **rest: Any) -> Benign:
    """A change of the loss."""
    return Benign(f"ce-{name}", CE.name, description, {CE.name: kernel}, **rest)


def layer_norm(name: str, description: str, kernel: Function, **rest: Any) -> Benign:
    """A change of layer norm, alone and fused with the residual."""
    kernels = other.both_norms(kernel, "layer")
    return Benign(f"layer-norm-{name}", "layer_norm", description, kernels, **rest)


def rms_norm(name: str, description: str, kernel: Function, **rest: Any) -> Benign:
    """A change of RMS norm, alone and fused with the residual."""
    kernels = other.both_norms(kernel, "rms")
    return Benign(f"rms-norm-{name}", "rms_norm", description, kernels, **rest)


def activation(op: str, name: str, description: str, kernel: Function, **rest: Any) -> Benign:
    """A change of an activation."""
    return Benign(f"{op}-{name}", op, description, {op: kernel}, **rest)


LINEAR = (
    linear("permuted", "sum over D in a random order", other.ordered_linear(other.shuffled)),
    linear("reversed", "sum over D from the end", other.ordered_linear(other.reversed_order)),
    *(
        linear(f"split-{n}", f"sum over D in {n} parts", other.split_linear(other.in_parts(n)))
        for n in (2, 3, 5, 8)
    ),
    linear(
        "pairwise",
        "blocks of 8 added pairwise",
        other.split_linear(lambda n: 8, other.stacked(other.pairwise)),
    ),
    linear(
        "kahan",
        "blocks of 4 added with compensation",
        other.split_linear(lambda n: 4, other.stacked(other.kahan)),
    ),
    linear("float64", "float64 inside", other.precise(ops.linear)),
    linear("transposed", "(w x^T)^T", other.transposed_linear),
    linear("separate-bias", "product and bias rounded apart", other.separate_bias, dtypes=BFLOAT16),
    *(
        linear(
            f"dweight-split-{n}",
            f"gradients of weight and bias over {n} parts of the rows",
            splice(ops.linear, ops.linear.reference, other.weight_gradient_in_parts(n)),
        )
        for n in (2, 7)
    ),
)

NORM = (
    layer_norm("blocked-16", "sums in blocks of 16", other.layer_norm_by(other.blocked(16))),
    layer_norm("pairwise", "pairwise sums", other.layer_norm_by(other.pairwise)),
    layer_norm("kahan", "compensated sums", other.layer_norm_by(other.kahan)),
    layer_norm("float64", "float64 inside", other.precise(ops.layer_norm)),
    layer_norm("one-pass", "E[x^2] - E[x]^2, affine folded", other.one_pass_layer_norm),
    layer_norm("native", "torch's own kernel", other.native_layer_norm, dtypes=FLOAT32),
    layer_norm(
        "sqrt-division",
        "1 / sqrt for rsqrt",
        other.layer_norm_by(lambda t: t.sum(-1, keepdim=True), lambda t: 1 / t.sqrt()),
    ),
    layer_norm(
        "rounded-before-affine",
        "normalised values rounded",
        other.rounded_layer_norm,
        dtypes=BFLOAT16,
    ),
    Benign(
        "layer-norm-reads-unrounded-sum",
        "add_layer_norm",
        "the norm reads the float32 sum",
        {"add_layer_norm": other.unrounded_sum(ops.layer_norm.reference)},
        dtypes=BFLOAT16,
    ),
    Benign(
        "add-layer-norm-native-add",
        "add_layer_norm",
        "torch.add(x, residual, alpha)",
        {"add_layer_norm": other.native_residual},
        dtypes=FLOAT32,
    ),
    rms_norm("blocked-8", "sum in blocks of 8", other.rms_norm_by(other.blocked(8))),
    rms_norm("kahan", "compensated sum", other.rms_norm_by(other.kahan)),
    rms_norm("float64", "float64 inside", other.precise(ops.rms_norm)),
    rms_norm(
        "rounded-before-weight",
        "normalised values rounded, as transformers does",
        other.rounded_rms_norm,
        dtypes=BFLOAT16,
    ),
)

ACTIVATION = (
    activation("geglu", "float64", "float64 inside", other.precise(ops.geglu)),
    activation("geglu", "erf", "0.5 b (1 + erf)", gated(other.erf_gelu, 1)),
    activation("geglu", "erfc", "erfc in place of 1 + erf", gated(other.erfc_gelu, 1)),
    activation(
        "geglu",
        "rounded-before-product",
        "both steps in the working dtype",
        other.gated_native(F.gelu, 1),
        dtypes=BFLOAT16,
    ),
    activation("gelu", "float64", "float64 inside", other.precise(ops.gelu)),
    activation(
        "gelu",
        "sigmoid-form",
        "x sigmoid(2 u)",
        lambda x: other.sigmoid_tanh_gelu(x.float()).to(x.dtype),
    ),
    activation(
        "gelu",
        "written-out",
        "x/2 (1 + tanh(..x (1 + ..x^2)))",
        lambda x: other.written_tanh_gelu(x.float()).to(x.dtype),
    ),
    activation("swiglu", "float64", "float64 inside", other.precise(ops.swiglu)),
    activation("swiglu", "exp", "g / (1 + exp(-g))", gated(other.exp_silu, 0)),
    activation("swiglu", "tanh", "g/2 (1 + tanh(g/2))", gated(other.tanh_silu, 0)),
    activation(
        "swiglu",
        "rounded-before-product",
        "both steps in the working dtype",
        other.gated_native(F.silu, 0),
        dtypes=BFLOAT16,
    ),
    activation("rope", "float64", "float64 inside", other.precise(ops.rope)),
    activation(
        "rope",
        "fused-multiply-add",
        "one rounding for a c - b s's second product",
        other.fused_rope,
    ),
)

rows = lambda do, o: (do * o).sum(-1, keepdim=True)  # noqa: E731
ATTENTION = (
    attention("permuted", "sum over E in a random order", late.ordered_heads(other.shuffled)),
    attention("reversed", "sum over E from the end", late.ordered_heads(other.reversed_order)),
    attention("float64", "float64 inside", other.precise(ops.attention)),
    *(
        attention(f"flash-{n}", f"online softmax, blocks of {n} keys", late.flash(n, False))
        for n in (16, 32, 64)
    ),
    attention(
        "flash-32-rounded",
        "online softmax, probabilities in the working dtype",
        late.flash(32, True),
        dtypes=BFLOAT16,
    ),
    attention("native", "torch's kernel in the working dtype", late.native_attention(lambda t: t)),
    attention("native-float32", "torch's kernel in float32", late.native_attention(wide)),
    attention("exp2", "base 2", attend(late.binary_softmax)),
    attention("no-maximum", "exp without the maximum", attend(late.softmax_without_max)),
    attention("late-scale", "scaled after the product", late.late_scale(late.binary_softmax)),
    attention(
        "padded-keys",
        "five keys before the first that nobody sees",
        late.padded_keys(5),
        dtypes=FLOAT32,
    ),
    attention("query-blocks-16", "queries in blocks of 16", late.query_blocks(16)),
    attention(
        "flash-backward",
        "closed-form backward, row term from the stored result",
        splice(ops.attention, ops.attention.reference, flash_backward(rows)),
    ),
    attention(
        "flash-32-grouped", "online softmax with grouped heads", late.flash(32, False), setup="glm4"
    ),
    attention(
        "native-pb-relax",
        "torch's kernel in place of PB-relax",
        late.native_attention(wide),
        setup="glm",
    ),
)

LOSS = (
    loss("float64", "float64 inside", other.precise(CE)),
    loss(
        "split-vocabulary", "logsumexp over 3 parts", cross_entropy(each=late.split_vocabulary(3))
    ),
    *(loss(f"chunked-{n}", f"chunks of {n} tokens", late.chunked_loss(n)) for n in (32, 100)),
    loss("padded", "11 tokens of weight 0 before the first", late.padded_loss),
    loss("unrounded-logits", "logits stay in float32", late.unrounded_logits, dtypes=BFLOAT16),
    Benign(
        "embedding-float64-sums",
        "embedding",
        "gradients of equal rows summed in float64",
        {"embedding": splice(ops.embedding, ops.embedding.reference, late.summed_wide)},
    ),
    Benign(
        "embedding-reversed-sums",
        "embedding",
        "gradients of equal rows summed from the end",
        {"embedding": splice(ops.embedding, ops.embedding.reference, late.summed_backwards)},
    ),
    Benign(
        "embedding-one-hot", "embedding", "product with one-hot rows", {"embedding": late.one_hot}
    ),
)

OPTIMIZER = (
    Benign("norm-flat", "global_norm", "one sum over everything", {"global_norm": late.flat_norm}),
    Benign(
        "norm-reversed", "global_norm", "from the last tensor", {"global_norm": late.reversed_norm}
    ),
    Benign(
        "norm-float64",
        "global_norm",
        "float64 inside",
        {"global_norm": other.precise(ops.global_norm)},
    ),
    Benign(
        "adamw-foreach",
        "adamw",
        "torch.optim.AdamW's foreach arithmetic",
        {"adamw": late.foreach_adamw},
    ),
    Benign("adamw-float64", "adamw", "float64 inside", {"adamw": late.precise_adamw}),
    Benign("adamw-folded", "adamw", "sqrt(v) / sqrt(correction)", {"adamw": late.folded_adamw()}),
)

PRECISE: Kernels = {
    **{
        op.name: other.precise(op)
        for op in (
            ops.linear,
            ops.geglu,
            ops.gelu,
            ops.swiglu,
            ops.rope,
            ops.attention,
            CE,
            ops.global_norm,
        )
    },
    **other.both_norms(other.precise(ops.layer_norm), "layer"),
    **other.both_norms(other.precise(ops.rms_norm), "rms"),
    "adamw": late.precise_adamw,
    "embedding": splice(ops.embedding, ops.embedding.reference, late.summed_wide),
}
FLASHED: Kernels = {
    "attention": late.flash(32, True),
    **other.both_norms(other.native_rms_norm, "rms"),
    **other.both_norms(other.layer_norm_by(other.pairwise), "layer"),
    "adamw": late.foreach_adamw,
    CE.name: late.chunked_loss(32),
}

RUNS = (
    Benign("micro-batch-4", "", "two forwards of 4 sequences", micro_batch=4),
    Benign("micro-batch-2", "", "four forwards of 2 sequences", micro_batch=2, setup="glm4"),
    Benign("threads-2", "", "two threads", threads=2, neutral=True),
    *(
        Benign(f"all-float64-{s}", "", "every op in float64 inside", PRECISE, setup=s)
        for s in ("130b", "glm4", "glm")
    ),
    *(
        Benign(
            f"all-reordered-{s}", "", "flash attention, other norms, loss, AdamW", FLASHED, setup=s
        )
        for s in ("130b", "glm4")
    ),
    *(
        Benign(f"{b}-{s}", "", f"the {b} backend", registered=b, setup=s)
        for b in ("cpu", "onnxrt")
        for s in ("130b", "glm4", "glm")
    ),
)

BENIGN: tuple[Benign, ...] = (
    *LINEAR,
    *NORM,
    *ACTIVATION,
    *ATTENTION,
    *LOSS,
    *OPTIMIZER,
    *RUNS,
)
