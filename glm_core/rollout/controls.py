"""Finds the range of honest rounding for these weights and tokens: the same log probabilities,
computed in the working dtype in ways that all are right."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import numpy as np
import torch
from torch import Tensor

from glm_core import dispatch
from glm_core.align.disguise import Regrouped, Rounded
from glm_core.model.glm import GLM
from glm_core.rollout.distribution import Shaping, collect
from glm_core.rollout.engine import generated, trained
from glm_core.rollout.files import Array, Reply
from glm_core.rollout.ties import Scored, Scoring, moved_by

_Way = tuple[str, Callable[[], AbstractContextManager[object]], Callable[..., Iterator[Tensor]]]
NUM_ROUNDED = 6
"""controls below float32 whose intermediates are rounded once more, three of four, drawn anew"""
ROUNDED_ELEMENTS = 1024
"""the smallest intermediate that a control rounds once more"""
SCORE_FACTOR = 2.0
"""a router's score may be moved this many times as far as the controls move it"""


def _ways(dtype: torch.dtype) -> list[_Way]:
    """Returns the honest ways by name: by the training forward pass, as a generator does with two
    sizes of chunks and batches, in other orders of summation, and below float32 with intermediates
    rounded once more."""
    none = nullcontext
    found: list[_Way] = [
        ("training forward", none, trained),
        ("prefill and decode", none, partial(generated, slots=32)),
        ("small chunks", none, partial(generated, chunk=16, slots=12)),
        ("regrouped", partial(Regrouped, 1), trained),
    ]
    if dtype not in (torch.bfloat16, torch.half):
        more: _Way = ("regrouped again", partial(Regrouped, 2), trained)
        return [*found, more, ("other batches", none, partial(trained, rows=5))]
    for seed in range(NUM_ROUNDED):
        rounded = partial(Rounded, dtype, ROUNDED_ELEMENTS, seed=seed)
        found.append((f"rounded {seed}", rounded, trained))
    return found


def wide(model: GLM) -> GLM:
    """Returns the model in a dtype beyond its own: float64 for float32, else float32."""
    own = model.embedding.dtype
    return copy.deepcopy(model).to(torch.float64 if own == torch.float32 else torch.float32)


def controls(
    model: GLM, replies: Sequence[Reply], how: Shaping, exact: Sequence[Scored]
) -> tuple[Array, list[Tensor]]:
    """Returns the log probabilities [controls, tokens] that honest engines report, and of each of
    the exact calls the slack of its rows' scores [N]: SCORE_FACTOR times what a control moves them
    at most."""
    found = []
    slack = [torch.zeros(len(x.scores), dtype=torch.float64) for x in exact]
    for _, context, logits in _ways(model.embedding.dtype):
        scoring = Scoring()
        with context(), dispatch.intercept(scoring):
            found.append(collect(logits(model, replies), replies, [how])[0])
        slack = list(map(torch.maximum, slack, moved_by(exact, scoring.calls)))
    return np.stack(found), [SCORE_FACTOR * s for s in slack]
