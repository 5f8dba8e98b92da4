"""Judges what an op chose, such as a router's experts: another choice than the reference's is right
where the scores lie within rounding, and wrong anywhere else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from glm_core.choice import Choice
from glm_core.conformance.case import Case
from glm_core.conformance.oracle import CHOSEN, Jitter, widened
from glm_core.conformance.tolerance import MAX_ERROR_RATIO, Deviation, allowance

RUNS = 4
"""jittered runs of the scores, which show how much rounding moves them"""


def deviation(case: Case, name: str, got: Tensor) -> Deviation | None:
    """Returns how far a choice is from the best one, in units of the error that its scores may
    have; None for a result that is no choice."""
    choice = case.op.choice
    if choice is None or name != CHOSEN or not got.numel():
        return None
    args = case.sample.make(case.dtype)
    scores, slack = exact_scores(choice, args)
    last = scores.shape[-1] - 1
    if not bool(((got >= 0) & (got <= last)).all()):
        return Deviation(math.inf, f"chosen indexes must lie in 0 ... {last}")
    short = choice.shortfall(scores, slack, got, **without_tensors(args))
    worst = int(short.argmax())
    where = f"row {worst} chose {got[worst].tolist()}, but others score higher or come first"
    return Deviation(MAX_ERROR_RATIO * float(short[worst]), where)


def exact_scores(choice: Choice, args: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Returns the scores in float64, and the error that an honest kernel may have in each."""
    exact, near = choice.scores(**widened(args)), [choice.scores(**args)]
    for seed in range(RUNS):
        with Jitter(seed):
            near.append(choice.scores(**args))
    allowed = allowance(exact, near)
    return exact, MAX_ERROR_RATIO * allowed.error.reshape(exact.shape)


def without_tensors(args: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an op's other arguments, such as the number of experts of a token."""
    return {k: v for k, v in args.items() if not isinstance(v, Tensor)}
