"""Declares the wrong kernels of the router of experts. Shapes: N tokens, X experts, T chosen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glm_core.faults import rounding
from glm_core.faults.fault import benign, fault, mutant, planted
from glm_core.faults.kernels import Arguments, backward_only, changed, pulled
from glm_core.ops import route as op
from glm_core.ops.precision import wide

F = torch.nn.functional
WEIGHT_IS_NARROW: dict[str, Any] = {
    "dtypes": ("float32",),
    "reason": "in bfloat16 the router's weight is a bfloat16 number already",
}


def weights_of(scores: Tensor, experts: Tensor, scale: float, normalize: bool) -> Tensor:
    """Returns the weights [N, T] of the chosen experts by the right formula."""
    weights = scores.gather(-1, experts)
    total = weights.sum(-1, keepdim=True) + 1e-20
    return (weights / total if normalize else weights) * scale


def logits(a: Arguments) -> Tensor:
    return F.linear(wide(a["x"]), a["weight"].to(wide(a["x"]).dtype))


@mutant(op, "the bias is added to the weights too", **planted("route-bias-in-weights"))
def bias_in_weights(scale: float, normalize: bool, **a: Any) -> tuple[Tensor, Tensor]:
    experts, _ = op.reference(**a)
    scores = torch.sigmoid(logits(a)) + a["bias"]
    return experts, weights_of(scores, experts, scale, normalize)


@mutant(op, "softmax in the place of the sigmoid", **planted("route-softmax"))
def softmax_scores(scale: float, normalize: bool, **a: Any) -> tuple[Tensor, Tensor]:
    probabilities = torch.softmax(logits(a), -1)
    biased = (probabilities + a["bias"]).detach()
    odds = torch.log(biased.clamp(1e-6, 1 - 1e-6)) - torch.log1p(-biased.clamp(1e-6, 1 - 1e-6))
    zero = torch.zeros_like(a["bias"])
    eye = torch.eye(len(zero), dtype=odds.dtype)
    experts, _ = op.reference(**a | {"x": odds, "weight": eye, "bias": zero})
    return experts, weights_of(probabilities, experts, scale, normalize)


@mutant(op, "a group's score is its best expert's alone", **planted("route-group-by-best"))
def groups_by_their_best(**a: Any) -> tuple[Tensor, Tensor]:
    biased = (torch.sigmoid(logits(a)) + a["bias"]).detach()
    by_group = biased.unflatten(-1, (a["groups"], -1))  # [N, G, X / G]
    kept = (
        by_group.amax(-1).sort(dim=-1, descending=True, stable=True).indices[:, : a["top_groups"]]
    )
    mask = torch.zeros(by_group.shape[:2], dtype=torch.bool).scatter(-1, kept, True)
    biased = by_group.masked_fill(~mask[..., None], -torch.inf).flatten(-2)
    experts = biased.sort(dim=-1, descending=True, stable=True).indices[:, : a["top_k"]]
    scores = torch.sigmoid(logits(a))
    return experts, weights_of(scores, experts, a["scale"], a["normalize"])


@mutant(op, "of equal scores the expert with the higher index is chosen")
def ties_from_the_end(x: Tensor, weight: Tensor, bias: Tensor, **a: Any) -> tuple[Tensor, Tensor]:
    experts, weights = op.reference(x, weight.flip(0), bias.flip(0), **a)
    return len(weight) - 1 - experts, weights


@mutant(op, "logits are computed in bfloat16", **planted("route-bfloat16", "dtype"))
def bfloat16_logits(x: Tensor, weight: Tensor, **a: Any) -> tuple[Tensor, Tensor]:
    rounded = F.linear(x.bfloat16(), weight.bfloat16()).float()
    eye = torch.eye(len(weight), dtype=rounded.dtype)
    experts, weights = op.reference(rounded, eye, **a)
    return experts, weights.to(torch.promote_types(x.dtype, torch.float32))


@mutant(
    op,
    "scores and indexes share a sort key of 32 bits: the scores keep 16, and of equal ones the "
    "expert with the higher index is chosen",
    **planted("route-ties"),
)
def packed_keys(scale: float, normalize: bool, **a: Any) -> tuple[Tensor, Tensor]:
    scores = torch.sigmoid(logits(a))
    cut = rounding.bf16((scores + a["bias"]).detach()).flip(-1)
    eye, zero = torch.eye(cut.shape[-1], dtype=cut.dtype), torch.zeros_like(a["bias"])
    odds = torch.logit(cut.clamp(1e-6, 1 - 1e-6))
    experts, _ = op.reference(**a | {"x": odds, "weight": eye, "bias": zero})
    experts = cut.shape[-1] - 1 - experts
    return experts, weights_of(scores, experts, scale, normalize)


@mutant(op, "an expert is chosen twice in the place of the last one")
def last_is_the_first(scale: float, normalize: bool, **a: Any) -> tuple[Tensor, Tensor]:
    experts, _ = op.reference(**a)
    if experts.shape[-1] > 1:
        experts = torch.cat((experts[:, :-1], experts[:, :1]), -1)
    return experts, weights_of(torch.sigmoid(logits(a)), experts, scale, normalize)


def sum_without_gradient(scale: float, normalize: bool, **a: Any) -> tuple[Tensor, Tensor]:
    """Divides by the chosen scores' sum as if it were a constant."""
    experts, weights = op.reference(**a, normalize=False)
    total = weights.sum(-1, keepdim=True).detach() + 1e-20
    return experts, (weights / total if normalize else weights) * scale


def shuffled_weights(**a: Any) -> tuple[Tensor, Tensor]:
    experts, weights = op.reference(**a)
    return experts, weights.flip(-1)


def precise_route(**a: Any) -> tuple[Tensor, Tensor]:
    """Returns the reference in float64, rounded once at the end."""
    wide_arguments = {k: rounding.double(v) for k, v in a.items()}
    experts, weights = op.reference(**wide_arguments)
    return experts, weights.float()


benign("route-float64", op, "the router in float64 inside", precise_route)
fault(op, "the bias is ignored", changed(op, bias=lambda a: a["bias"] * 0), mutant="bias_ignored")
fault(op, "the bias is subtracted", changed(op, bias=lambda a: -a["bias"]), mutant="bias_negated")
fault(
    op,
    "weights are not normalised",
    changed(op, normalize=False),
    mutant="not_normalised",
    **planted("route-not-normalised"),
)
fault(op, "weights are always normalised", changed(op, normalize=True), mutant="always_normalised")
fault(
    op,
    "the scale is forgotten",
    changed(op, scale=1.0),
    mutant="scale_forgotten",
    **planted("route-scale-forgotten", "scale"),
)
fault(
    op,
    "experts of all groups are chosen",
    changed(op, top_groups=lambda a: a["groups"]),
    mutant="group_mask_off",
    **planted("route-group-mask-off"),
)
fault(op, "weights go to the wrong experts", shuffled_weights, mutant="weights_reversed")
fault(
    op,
    "the gradient ignores that weights are normalised",
    backward_only(op, sum_without_gradient),
    mutant="gradient_through_the_sum_missing",
    **planted("route-sum-gradient", "gradient", "backward"),
)
fault(
    op,
    "the router's weight is rounded to bfloat16",
    changed(op, weight=lambda a: rounding.bf16(a["weight"])),
    mutant="narrow_weight",
    **planted("route-narrow-weight", "dtype", **WEIGHT_IS_NARROW),
)
fault(
    op,
    "the router learns nothing: neither x nor weight gets a gradient",
    changed(op, x=lambda a: a["x"].detach(), weight=lambda a: pulled(a["weight"], lambda g: g * 0)),
    mutant="gradient_not_passed",
    **planted("route-no-gradient", "gradient", "backward"),
)
