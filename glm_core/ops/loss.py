"""Declares the cross-entropy loss together with the output projection before it.

Shapes: N tokens, D width, V vocabulary."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from glm_core.dispatch import op
from glm_core.ops.layout import gapped
from glm_core.ops.precision import num_bytes, product, wide
from glm_core.spec import Cost, Maker, Sample, exact, integers, normal


def linear_cross_entropy_samples() -> Iterator[Sample]:
    def make(
        id: str,
        n: int,
        d: int,
        v: int,
        std: float = 1.0,
        weights: list[float] | None = None,
        labels: list[int] | None = None,
        strided: bool = False,
    ) -> Sample:
        per_token: Maker = lambda draw: torch.rand(n, generator=draw.generator).to(draw.device)  # noqa: E731
        args = {
            "x": normal(n, d, std=std, strided=strided),
            "weight": normal(v, d, std=d**-0.5, strided=strided),
            "labels": integers(0, v, n) if labels is None else exact(labels, torch.int64),
            "token_weight": per_token if weights is None else exact(weights, torch.float32),
        }
        return Sample(id, args, real="65024" in id)

    yield make("10x96-50", 10, 96, 50)
    yield make("3x33-517-masked", 3, 33, 517, weights=[0.0, 1.0, 0.5])
    yield make("4x8-5-edges", 4, 8, 5, weights=[1.0, 2.0, 0.25, 0.0], labels=[0, 4, 4, 0])
    yield make("5x24-31-strided", 5, 24, 31, strided=True)
    yield Sample("5x24-31-gapped", gapped(make("", 5, 24, 31).args))
    yield make("70x24-1031", 70, 24, 1031)
    yield make("1x1-1", 1, 1, 1)
    yield make("1x1-3", 1, 1, 3)
    yield make("0x8-16", 0, 8, 16)
    yield make("7x16-1000-huge", 7, 16, 1000, std=100.0)
    yield make("7x16-1000-tiny", 7, 16, 1000, std=1e-3)
    yield Sample("67x33-2049", make("", 67, 33, 2049, strided=True).args, large=True)
    yield make("4x256-65024", 4, 256, 65024)


def linear_cross_entropy_cost(
    x: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor
) -> Cost:
    flops = (2 * x.shape[1] + 4) * x.shape[0] * weight.shape[0]
    moved = num_bytes(x, weight, labels, token_weight) + 4
    return Cost(flops, moved, 2 * flops, 2 * num_bytes(x, weight) + moved)


@op(
    samples=linear_cross_entropy_samples,
    cost=linear_cross_entropy_cost,
    differentiable=("x", "weight"),
    may_keep_wide="logits",
)
def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor) -> Tensor:
    """Computes sum_n token_weight[n] * (logsumexp(z_n) - z_n[labels[n]]) with the logits z = x
    weight^T.

    Shapes: x [N, D], weight [V, D], labels [N] int64 in [0, V), token_weight [N] float32 (0 skips a
    token) -> float32 scalar. Logits are rounded to x's dtype, as a linear layer's output is; a
    kernel may keep them in float32, forward and backward alike. Everything after them is float32.
    Accumulates in float32: logits over D, the loss over V and N, the gradient of x over V, that of
    weight over N. Source: torch.nn.functional.cross_entropy of a linear layer, weighted by
    token."""
    z = wide(product(x, weight))  # [N, V]
    each = torch.nn.functional.cross_entropy(z, labels, reduction="none")
    return (each * token_weight.to(z.dtype)).sum()
