"""Scores a model on its own training objective, which quantising must not change much."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from glm_core.data.sampler import Batch
from glm_core.model.glm import GLM


class Score(NamedTuple):
    """A model's figures over all targets (positions with a loss weight) of the batches."""

    perplexity: float
    exact: float
    """share of targets whose most likely token is the label"""
    targets: int


@torch.no_grad()
def score(model: GLM, batches: Sequence[Batch]) -> Score:
    """Scores the model on the active backend in the model's dtype; cross-entropy in float32."""
    total, hits, count = 0.0, 0, 0
    for b in batches:
        logits = model.logits(b.tokens, b.positions, b.key_start, b.key_end).float()
        kept = b.loss_weight > 0
        labels = b.labels[kept]
        total += float(torch.nn.functional.cross_entropy(logits[kept], labels, reduction="sum"))
        hits += int((logits[kept].argmax(-1) == labels).sum())
        count += len(labels)
    return Score(math.exp(total / max(count, 1)), hits / max(count, 1), count)
