"""Declares the wrong and benign kernels of the cross-entropy.
Shapes: N tokens, D width, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from glm_core.faults.fault import BFLOAT16, ONLY_FLOAT32, benign, fault, mutant, planted
from glm_core.faults.kernels import (
    Arguments,
    Function,
    Gradients,
    backward_only,
    changed,
    edited,
    pulled,
    with_gradients,
)
from glm_core.faults.rounding import Edit, bf16, precise
from glm_core.ops import linear_cross_entropy as op
from glm_core.ops.precision import product, wide

F = torch.nn.functional
LossPerToken = Callable[[Tensor, Tensor], Tensor]
"""(logits [N, V], labels [N]) -> [N]"""


def cross_entropy(
    each: LossPerToken = lambda z, labels: F.cross_entropy(z, labels, reduction="none"),
    logits: Edit = lambda z: z,
) -> Function:
    """Returns a kernel whose logits pass through `logits` and whose loss per token is `each`."""

    def kernel(x: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor) -> Tensor:
        z = logits(wide(product(x, weight)))
        return (each(z, labels) * token_weight).sum()

    return kernel


def picked(z: Tensor, labels: Tensor) -> Tensor:
    """Returns each token's value at its label, [N]."""
    return z.gather(-1, labels[:, None])[:, 0]


# wrong --------------------------------------------------------------------------------


def last_counted(factor: float) -> Function:
    """Returns the reference with the weight of the last token that counts multiplied by
    `factor`."""

    def token_weight(a: Arguments) -> Tensor:
        weight: Tensor = a["token_weight"].clone()
        weight[weight.nonzero()[-1:].flatten()] *= factor
        return weight

    return changed(op, token_weight=token_weight)


def equal_weights(a: Arguments) -> Tensor:
    """Returns token_weight spread evenly over all tokens, also over those that do not count."""
    weight: Tensor = a["token_weight"]
    return weight.mean().expand_as(weight)


def safe_log(z: Tensor, labels: Tensor) -> Tensor:
    return -torch.log(picked(torch.softmax(z, -1), labels) + 1e-6)


def half_logit_gradient(a: Arguments, outputs: tuple[Tensor, ...]) -> Gradients:
    """Passes the gradient of the logits through float16 without a loss scale."""
    z = wide(F.linear(a["x"], a["weight"]))
    dz = torch.softmax(z, -1) - F.one_hot(a["labels"], z.shape[-1])
    dz = (dz * a["token_weight"][:, None] * outputs[0]).half().to(a["x"].dtype)
    return {"x": dz @ a["weight"], "weight": dz.t() @ a["x"]}


def last_class_lost(a: Arguments, grads: Gradients) -> Gradients:
    """Zeroes the gradient of the last row of the vocabulary."""
    weight = grads["weight"]
    assert weight is not None
    weight[-1] = 0
    return {"weight": weight}


fault(
    op,
    "every token has the same weight in the backward",
    backward_only(op, changed(op, token_weight=equal_weights)),
    **planted("ce-equal-weights-in-gradient", "gradient", "backward"),
)
fault(op, "the last token is not counted", last_counted(0.0), **planted("ce-token-lost", "rows"))
fault(
    op, "the last token is counted twice", last_counted(2.0), planted="ce-token-twice", kind="rows"
)
fault(
    op,
    "logits are rounded to bfloat16 in every dtype",
    cross_entropy(logits=bf16),
    mutant="narrow_logits",
    **planted("ce-bfloat16-logits", "dtype", **ONLY_FLOAT32),
)
fault(op, "-log(p + 1e-6)", cross_entropy(safe_log), **planted("ce-log-eps", "eps"))
fault(
    op,
    "the logits' gradient is float16 without loss scale",
    with_gradients(op, half_logit_gradient),
    **planted("ce-float16-logit-gradient", "dtype", "backward"),
)
fault(
    op,
    "the last vocabulary row receives no gradient",
    edited(op, last_class_lost),
    **planted("ce-last-class-lost", "rows", "backward", setup="glm4"),
)
fault(
    op,
    "token weights are taken for 1",
    changed(op, token_weight=lambda a: torch.ones_like(a["token_weight"])),
    mutant="weights_ignored",
)
fault(
    op,
    "token weights are taken for 0 or 1",
    changed(op, token_weight=lambda a: (a["token_weight"] != 0).float()),
    mutant="weights_as_mask",
)
fault(
    op,
    "token n is scored against the label of token n + 1",
    changed(op, labels=lambda a: a["labels"].roll(-1)),
    mutant="labels_shifted",
)
fault(
    op,
    "exp without subtracting the maximum",
    cross_entropy(lambda z, labels: z.exp().sum(-1).log() - picked(z, labels)),
    mutant="maximum_not_subtracted",
)
fault(
    op,
    "the last word of the vocabulary is missing in the sum of exponentials",
    cross_entropy(
        lambda z, labels: z[:, : max(z.shape[1] - 1, 1)].logsumexp(-1) - picked(z, labels)
    ),
    mutant="last_word_lost",
)
fault(
    op,
    "vocabulary past the last whole block of 1024 is missing in the sum",
    cross_entropy(
        lambda z, labels: (
            z[:, : z.shape[1] // 1024 * 1024 or z.shape[1]].logsumexp(-1) - picked(z, labels)
        )
    ),
    mutant="last_block_lost",
)
fault(
    op,
    "labels are smoothed by 0.001",
    cross_entropy(
        lambda z, labels: F.cross_entropy(z, labels, reduction="none", label_smoothing=1e-3)
    ),
    mutant="smoothed",
)
fault(
    op,
    "a label out of range scores as the nearest word",
    changed(op, labels=lambda a: a["labels"].clamp(0, len(a["weight"]) - 1)),
    mutant="labels_clamped",
)
fault(
    op,
    "backward is the softmax without the one at the label",
    backward_only(op, cross_entropy(lambda z, labels: z.logsumexp(-1))),
    mutant="gradient_without_label",
)


@mutant(op, "the mean over tokens, not the sum")
def mean(**a: Any) -> Tensor:
    y: Tensor = op.reference(**a)
    return y / max(len(a["x"]), 1)


@mutant(op, "softmax and logarithm in the working dtype")
def narrow_softmax(x: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor) -> Tensor:
    z = F.linear(x, weight)
    return -(wide(picked(z.log_softmax(-1), labels)) * token_weight).sum()


@mutant(op, "the gradient of weight leaves the token weights out")
def weight_gradient_unweighted(**a: Any) -> Tensor:
    y: Tensor = op.reference(**a | {"weight": a["weight"].detach()})
    ones = torch.ones_like(a["token_weight"])
    other = op.reference(**a | {"x": a["x"].detach(), "token_weight": ones})
    return y + (other - other.detach())


@mutant(op, "backward ignores the gradient that comes in: the loss is taken for the root")
def incoming_gradient_ignored(**a: Any) -> Tensor:
    return pulled(op.reference(**a), torch.ones_like)


# benign -------------------------------------------------------------------------------


def split_vocabulary(parts: int) -> LossPerToken:
    """Returns the loss with logsumexp taken over parts of the vocabulary, then over the parts."""

    def each(z: Tensor, labels: Tensor) -> Tensor:
        sums = torch.stack([torch.logsumexp(p, -1) for p in z.chunk(parts, -1)], -1)
        return torch.logsumexp(sums, -1) - picked(z, labels)

    return each


def chunked(rows: int) -> Function:
    """Returns a kernel that cuts the tokens into chunks, each with its own product and sum."""

    def kernel(x: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor) -> Tensor:
        chunks = zip(*(t.split(rows) for t in (x, labels, token_weight)), strict=True)
        return torch.stack([op.reference(x, weight, labels, w) for x, labels, w in chunks]).sum()

    return kernel


def padded(x: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor) -> Tensor:
    more = (F.pad(x, (0, 0, 11, 0)), weight, F.pad(labels, (11, 0)), F.pad(token_weight, (11, 0)))
    return op.reference(*more)


benign("ce-float64", op, "float64 inside", precise(op))
benign("ce-split-vocabulary", op, "logsumexp over 3 parts", cross_entropy(split_vocabulary(3)))
for n in (32, 100):
    benign(f"ce-chunked-{n}", op, f"chunks of {n} tokens", chunked(n))
benign("ce-padded", op, "11 tokens of weight 0 before the first", padded)
benign(
    "ce-unrounded-logits",
    op,
    "logits stay in float32",
    changed(op, x=lambda a: wide(a["x"]), weight=lambda a: wide(a["weight"])),
    dtypes=BFLOAT16,
)
