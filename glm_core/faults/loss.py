"""Wrong cross-entropies. Shapes: N tokens, D width, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from glm_core.faults.mutant import mutant, pulled
from glm_core.ops import linear_cross_entropy as op
from glm_core.ops.precision import wide


def _loss(z: Tensor, labels: Tensor, token_weight: Tensor) -> Tensor:
    each = functional.cross_entropy(z, labels, reduction="none")
    return (each * token_weight.to(z.dtype)).sum()


@mutant(op, wrong="the mean over tokens, not the sum")
def mean(x: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor) -> Tensor:
    return op.reference(x, weight, labels, token_weight) / max(len(x), 1)


@mutant(op, wrong="token weights are taken for 1")
def weights_ignored(x: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor) -> Tensor:
    return op.reference(x, weight, labels, torch.ones_like(token_weight))


@mutant(op, wrong="token weights are taken for 0 or 1")
def weights_as_mask(x: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor) -> Tensor:
    return op.reference(x, weight, labels, (token_weight != 0).float())


@mutant(op, wrong="token n is scored against the label of token n + 1")
def labels_shifted(x: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor) -> Tensor:
    return op.reference(x, weight, labels.roll(-1), token_weight)


@mutant(op, wrong="exp without subtracting the maximum")
def maximum_not_subtracted(
    x: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor
) -> Tensor:
    z = wide(functional.linear(x, weight))
    each = z.exp().sum(-1).log() - z.gather(1, labels[:, None])[:, 0]
    return (each * token_weight.to(z.dtype)).sum()


@mutant(op, wrong="the last word of the vocabulary is missing in the sum of exponentials")
def last_word_lost(x: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor) -> Tensor:
    z = wide(functional.linear(x, weight))
    total = z[:, : max(z.shape[1] - 1, 1)].logsumexp(-1)
    each = total - z.gather(1, labels[:, None])[:, 0]
    return (each * token_weight.to(z.dtype)).sum()


@mutant(op, wrong="vocabulary past the last whole block of 1024 is missing in the sum")
def last_block_lost(x: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor) -> Tensor:
    z = wide(functional.linear(x, weight))
    whole = z.shape[1] // 1024 * 1024 or z.shape[1]
    each = z[:, :whole].logsumexp(-1) - z.gather(1, labels[:, None])[:, 0]
    return (each * token_weight.to(z.dtype)).sum()


@mutant(op, wrong="labels are smoothed by 0.001")
def smoothed(x: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor) -> Tensor:
    z = wide(functional.linear(x, weight))
    each = functional.cross_entropy(z, labels, reduction="none", label_smoothing=1e-3)
    return (each * token_weight.to(z.dtype)).sum()


@mutant(op, wrong="softmax and logarithm in the working dtype")
def narrow_softmax(x: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor) -> Tensor:
    z = functional.linear(x, weight)
    picked = z.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    return -(wide(picked) * token_weight.to(wide(x).dtype)).sum()


@mutant(op, wrong="logits are rounded to bfloat16 in every dtype")
def narrow_logits(x: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor) -> Tensor:
    z = wide(functional.linear(x, weight))
    return _loss(z + (z.bfloat16().to(z.dtype) - z).detach(), labels, token_weight)


@mutant(op, wrong="a label out of range scores as the nearest word")
def labels_clamped(x: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor) -> Tensor:
    return op.reference(x, weight, labels.clamp(0, len(weight) - 1), token_weight)


@mutant(op, wrong="the gradient of weight leaves the token weights out")
def weight_gradient_unweighted(
    x: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor
) -> Tensor:
    y = op.reference(x, weight.detach(), labels, token_weight)
    other = op.reference(x.detach(), weight, labels, torch.ones_like(token_weight))
    return y + (other - other.detach())


@mutant(op, wrong="backward is the softmax without the one at the label")
def gradient_without_label(
    x: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor
) -> Tensor:
    z = wide(functional.linear(x, weight))
    other = (z.logsumexp(-1) * token_weight.to(z.dtype)).sum()
    return op.reference(x.detach(), weight.detach(), labels, token_weight) + (
        other - other.detach()
    )


@mutant(op, wrong="backward ignores the gradient that comes in: the loss is taken for the root")
def incoming_gradient_ignored(
    x: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor
) -> Tensor:
    return pulled(op.reference(x, weight, labels, token_weight), torch.ones_like)
