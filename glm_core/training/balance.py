"""Keeps the experts of a mixture evenly loaded: by the router's bias, or by an auxiliary loss.

Shapes: N tokens, D width, X experts, T experts chosen for a token."""

from __future__ import annotations

import torch
from torch import Tensor

from glm_core.ops.precision import wide


def moved_bias(bias: Tensor, counts: Tensor, rate: float) -> Tensor:
    """Returns the router's bias [X] after a step in which the experts took `counts` [X] rows. It is
    raised by `rate` for experts with fewer rows than the mean, and lowered by it for those with
    more. The counts are those of the whole global batch, over all micro-batches and processes.
    Nothing here has a gradient. Source: Wang et al. 2024 (loss-free balancing), algorithm 1."""
    load = counts.to(bias.dtype)
    return bias + rate * torch.sign(load.mean() - load)


def balance_loss(x: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
    """Returns the auxiliary loss sum(f * p) of one sequence, to be added with a small factor. f is
    each expert's share of the chosen, times X; p is the mean over tokens of its share of a token's
    scores, s = sigmoid(x weight^T). It is 1 where all experts are chosen equally often, and X / T
    at most. The gradient reaches x and weight through p alone.

    Shapes: x [N, D], weight [X, D] float32, experts [N, T] as `route` chose them -> scalar float32.
    Source: DeepSeek-AI 2024 (DeepSeek-V3), eq. 17 to 20."""
    a = wide(x)
    scores = torch.sigmoid(torch.nn.functional.linear(a, weight.to(a.dtype)))  # [N, X]
    shares = scores / scores.sum(-1, keepdim=True)
    places = experts.flatten()
    counts = shares.new_zeros(len(weight)).index_add(0, places, shares.new_ones(len(places)))
    return (counts * (len(weight) / max(len(places), 1)) * shares.mean(0)).sum()
