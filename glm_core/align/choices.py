"""Judges an op's choice under teacher forcing, such as a router's experts: another choice than
float64's is honest where the scores lie within rounding, and wrong anywhere else."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glm_core import dispatch
from glm_core.align.capture import Call
from glm_core.align.replay import CHOSEN, Results, exact
from glm_core.align.trace_format import Routing
from glm_core.conformance.choices import exact_scores, without_tensors
from glm_core.conformance.tolerance import MAX_ERROR_RATIO
from glm_core.dispatch import Op
from glm_core.model.glm import Router


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
    return Flips(len(chosen), _expected(call, scores, slack), int(differ.sum()), wrong)


def _judged(call: Call, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the scores in float64, the error that each may have, and which rows chose wrong."""
    choice = call.op.choice
    assert choice is not None, "only for ops that choose"
    scores, slack = exact_scores(choice, call.args)
    last = scores.shape[-1] - 1
    strange = ((chosen < 0) | (chosen > last)).any(-1)
    held = chosen.clamp(0, last)
    short = choice.shortfall(scores, slack, held, **without_tensors(call.args))
    return scores, slack, (short > 1) | strange


def _expected(call: Call, scores: Tensor, slack: Tensor) -> float:
    """Returns how many rows the reference's rounding flips. Two neighbours in the order change
    places where the difference of two errors exceeds their gap: at a density f of gaps near zero
    and a standard deviation s of the difference, in f s / sqrt(2 pi) of the rows. An error is taken
    as normal, the largest of several runs as twice its standard deviation."""
    if not len(scores):
        return 0.0
    assert call.op.choice is not None
    gaps = call.op.choice.gaps(scores, **without_tensors(call.args))  # [N, K]
    near = gaps.quantile(NEAR, dim=0).clamp(min=1e-300)
    spread = 2**0.5 * float(slack.median()) / MAX_ERROR_RATIO / 2
    shares = NEAR / near * spread / (2 * math.pi) ** 0.5
    return len(scores) * float(shares.sum().clamp(max=1.0))


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
    scores, _, wrong = _judged(call, chosen)
    wrong = wrong[:, None]
    known = ((chosen >= 0) & (chosen < scores.shape[-1])).all(-1, keepdim=True)
    held = torch.where(known, chosen, right[CHOSEN].long())
    given = exact(call, results, functools.partial(call.op.choice.given, held))
    moved = {n: y + (right[n] - given[n]) for n, y in results.items() if n != CHOSEN}
    return {CHOSEN: torch.where(wrong, results[CHOSEN], right[CHOSEN]), **moved}


class Figures:
    """Collects how a candidate's choices differ from float64's, one row per captured call."""

    def __init__(self) -> None:
        self.rows: dict[tuple[int, int], Routing] = {}

    def seen(self, call: Call, results: Results) -> Results:
        """Takes the results of a call of an op that chooses, the first time that it runs. Returns
        them."""
        place = (call.step, call.index)
        if call.op.choice is not None and place not in self.rows:
            best = exact(call, {})[CHOSEN]
            chosen = results[CHOSEN].long()
            if chosen.shape == best.shape:
                self.rows[place] = _row(call, flips(call, chosen))
        return results


def _row(call: Call, found: Flips) -> Routing:
    return {
        "step": call.step,
        "layer": call.layer,
        "rows": found.rows,
        "expected": float(found.expected),
        "seen": found.seen,
        "wrong": int(found.wrong.sum()),
    }


# a whole step -------------------------------------------------------------------------


@contextmanager
def recorded(model: torch.nn.Module) -> Iterator[list[Tensor]]:
    """Collects the experts that the model's routers choose in the block, call by call."""
    chosen: list[Tensor] = []

    def keep(router: torch.nn.Module, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        chosen.append(output[0].detach().cpu())

    handles = [m.register_forward_hook(keep) for m in model.modules() if isinstance(m, Router)]
    try:
        yield chosen
    finally:
        for handle in handles:
            handle.remove()


def by_layer(model: torch.nn.Module, chosen: Sequence[Tensor]) -> list[Tensor]:
    """Returns each router's choices of a whole step, its micro-batches one after another."""
    count = sum(isinstance(m, Router) for m in model.modules())
    return [torch.cat(list(chosen[i::count])) for i in range(count)]


@contextmanager
def imposed(layers: list[Tensor], batches: int) -> Iterator[None]:
    """Makes the routers choose in the block what `by_layer` returned, in so many micro-batches."""
    parts = [layer.chunk(batches) for layer in layers]
    following = iter([part[i] for i in range(batches) for part in parts])

    def give(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if op.choice is None:
            return dispatch.run(op, args, kwargs)
        named = op.named(args, kwargs)
        return op.choice.given(next(following), **named)

    with dispatch.intercept(give):
        yield


def moved_tokens(layers: list[Tensor], right: list[Tensor]) -> int:
    """Returns how many tokens have other experts, in the layer where most have."""
    return max(int((a != b).any(-1).sum()) for a, b in zip(layers, right, strict=True))
