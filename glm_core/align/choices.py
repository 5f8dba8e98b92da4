"""Judges an op's choice under teacher forcing, such as a router's experts: another choice than
float64's is honest where the scores lie within rounding, and wrong anywhere else."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from glm_core.align.capture import Call
from glm_core.align.replay import CHOSEN, Results, exact
from glm_core.conformance.choices import exact_scores, without_tensors
from glm_core.conformance.tolerance import MAX_ERROR_RATIO


class Flips(NamedTuple):
    """How a candidate's choices differ from float64's."""

    rows: int
    expected: float
    """rows that rounding alone is expected to flip"""
    seen: int
    """rows whose choice differs"""
    wrong: Tensor
    """which rows differ where the scores do not lie within rounding, bool [rows]"""


def flips(call: Call, chosen: Tensor) -> Flips:
    """Returns how `chosen` differs from what float64 chooses for this call."""
    scores, slack, wrong = _judged(call, chosen)
    best = exact(call, {})[CHOSEN].long()
    differ = (best != chosen).any(-1)
    return Flips(len(chosen), _expected(scores, slack, best), int(differ.sum()), wrong)


def _judged(call: Call, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the scores in float64, the error that each may have, and which rows chose wrong."""
    choice = call.op.choice
    assert choice is not None, "only for ops that choose"
    scores, slack = exact_scores(choice, call.args)
    short = choice.shortfall(scores, slack, chosen, **without_tensors(call.args))
    return scores, slack, short > 1


def _expected(scores: Tensor, slack: Tensor, best: Tensor) -> float:
    """Returns how many rows the reference's rounding flips. Two neighbours in the order change
    places where the difference of two errors exceeds their gap: at a density f of gaps near zero
    and a standard deviation s of the difference, in f s / sqrt(2 pi) of the rows. An error is taken
    as normal, the largest of several runs as twice its standard deviation."""
    if not len(best):
        return 0.0
    rest = scores.scatter(-1, best, -torch.inf).amax(-1, keepdim=True)
    ranked = torch.cat((scores.gather(-1, best), rest), -1)  # [N, T + 1]
    gaps = (ranked[:, :-1] - ranked[:, 1:]).clamp(min=0.0)  # [N, T]
    near = gaps.quantile(NEAR, dim=0).clamp(min=1e-300)
    spread = 2**0.5 * float(slack.median()) / MAX_ERROR_RATIO / 2
    shares = NEAR / near * spread / (2 * math.pi) ** 0.5
    return len(best) * float(shares.sum().clamp(max=1.0))


NEAR = 0.05
"""the share of the gaps that shows their density near zero"""


def settled(call: Call, results: Results) -> Results:
    """Returns a candidate's results as if it had chosen what float64 chooses, wherever its own
    choice is honest: what follows from the choice is exchanged, its errors stay. A wrong choice
    stays as well, and is an error."""
    if call.op.choice is None or CHOSEN not in results:
        return results
    right, chosen = exact(call, results), results[CHOSEN].long()
    if torch.equal(right[CHOSEN].long(), chosen) or chosen.shape != right[CHOSEN].shape:
        return results
    given = exact(call, results, functools.partial(call.op.choice.given, chosen))
    moved = {n: y + (right[n] - given[n]) for n, y in results.items() if n != CHOSEN}
    wrong = _judged(call, chosen)[2][:, None]
    return {CHOSEN: torch.where(wrong, results[CHOSEN], right[CHOSEN]), **moved}


def per_million(rows: int, count: float) -> float:
    """Returns flips per million rows; NaN of none."""
    return 1e6 * count / rows if rows else math.nan
