"""Computes the auxiliary loss that evens the loads of a sparse layer's experts.

Shapes: B sequences of L tokens, D width, X experts, T experts chosen for a token."""

from __future__ import annotations

import torch
from torch import Tensor

from glm_core.ops.precision import wide


def sequence_balance(x: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
    """Returns the auxiliary loss sum(f * p) of each sequence, to be added with a small factor. f is
    each expert's share of the chosen, times X; p is the mean over tokens of its share of a token's
    scores, s = sigmoid(x weight^T). It is 1 where all experts are chosen equally often, and X / T
    at most. The gradient reaches x and weight through p alone.

    Shapes: x [B, L, D], weight [X, D], experts [B, L, T] as `route` chose them -> [B], float32.
    Source: DeepSeek-AI 2024 (DeepSeek-V3), eq. 17 to 20."""
    a = wide(x)
    scores = torch.sigmoid(torch.nn.functional.linear(a, weight.to(a.dtype)))  # [B, L, X]
    shares = scores / scores.sum(-1, keepdim=True)
    places = experts.flatten(1)  # [B, L * T]
    ones = shares.new_ones(places.shape)
    counts = shares.new_zeros(len(x), len(weight)).scatter_add(1, places, ones)  # [B, X]
    return (counts * (len(weight) / max(places.shape[1], 1)) * shares.mean(1)).sum(-1)
