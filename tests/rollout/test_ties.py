"""Where a router's choice is a near tie, every choice that rounding allows is known, and what an
honest engine reports there is measured from the nearest of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from glm_core import dispatch, ops
from glm_core.dispatch import Interceptor, Op
from glm_core.model.glm import GLM
from glm_core.rollout.causes import Cause
from glm_core.rollout.controls import wide
from glm_core.rollout.distribution import OWN
from glm_core.rollout.engine import PLAIN, Variant
from glm_core.rollout.files import Reply
from glm_core.rollout.mistakes import moved_end
from glm_core.rollout.planted import MODELS
from glm_core.rollout.ties import Reading, Scored, moved_by, settled
from glm_core.rollout.verdict import Judgement, judge

NUM, LENGTH, SLACK = 8, 12, 0.01
REPLIES = [
    Reply(tuple(range(4 + i)), tuple(range(LENGTH)), (-1.0,) * LENGTH, cached=i // 2)
    for i in range(NUM)
]


@pytest.mark.parametrize(
    ("experts", "top_k", "groups", "top_groups"),
    [(8, 2, 1, 1), (6, 1, 1, 1), (4, 4, 1, 1), (12, 3, 4, 2), (6, 2, 3, 1)],
)
def test_every_choice_that_rounding_allows_is_known(
    experts: int, top_k: int, groups: int, top_groups: int
) -> None:
    generator = torch.Generator().manual_seed(experts)
    scores = torch.rand(64, experts, generator=generator, dtype=torch.float64)
    slack = torch.full((64,), 0.5 / experts**2, dtype=torch.float64)
    args = {"top_k": top_k, "groups": groups, "top_groups": top_groups}
    choose = ops.route.choice
    assert choose is not None
    best = next(iter(choose.others(scores, **args)))
    ways = Scored(choose, scores, args).ways(slack)
    known = [torch.where(near[:, None], other, best).sort(-1)[0] for other, near in ways]
    known.append(best.sort(-1)[0])
    flips = 0
    for _ in range(64):
        noise = torch.rand(scores.shape, generator=generator, dtype=torch.float64) * 2 - 1
        moved = scores + noise * slack[:, None]
        best = next(iter(choose.others(moved, **args))).sort(-1)[0]
        flips += int((best != known[-1]).any(-1).sum())
        assert bool(torch.stack([(best == w).all(-1) for w in known]).any(0).all())
    assert flips > 20 or top_k == experts


def test_the_first_choice_is_what_the_op_chooses() -> None:
    args = {"x": torch.randn(32, 16), "weight": torch.randn(12, 16), "bias": torch.zeros(12)}
    choose = ops.route.choice
    assert choose is not None
    first = next(iter(choose.others(choose.scores(**args), 3, 4, 2)))
    assert torch.equal(first, ops.route(**args, top_k=3, groups=4, top_groups=2)[0])


def moved_router(seed: int) -> Interceptor:
    """Returns an engine whose router chooses by scores that are off by up to SLACK."""
    generator = torch.Generator().manual_seed(seed)

    def run(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if op.choice is None:
            return dispatch.run(op, args, kwargs)
        named = op.named(args, kwargs)
        noise = torch.rand(8, generator=generator, dtype=torch.float64) * 2 - 1
        chosen = op.reference(**{**named, "bias": named["bias"] + SLACK * noise})[0]
        return op.choice.given(chosen, **named)

    return run


@pytest.mark.parametrize("mistake", [PLAIN, moved_end(-1)], ids=["right", "mask"])
def test_a_flip_is_measured_from_what_the_other_choice_gives(mistake: Variant) -> None:
    model = wide(GLM(MODELS["experts"]).init_weights(3))
    right = Reading(model, REPLIES, OWN, mistake)
    slack = [torch.full((len(c.scores),), SLACK, dtype=torch.float64) for c in right.calls]
    flipped = dataclasses.replace(mistake, interceptor=moved_router(1))
    found = Reading(model, REPLIES, OWN, flipped).logprobs - right.logprobs
    assert np.abs(found).max() > 1e-3
    assert np.abs(settled(found, right.others(slack, 1))).max() < 1e-9
    assert (np.abs(settled(found, right.flipped(slack))) > 1e-9).sum() <= 2  # three close scores
    assert np.abs(settled(found, right.others([x * 1e-3 for x in slack], 1))).max() > 1e-3


def test_only_controls_that_read_alike_say_how_far_scores_move() -> None:
    choose = ops.route.choice
    assert choose is not None

    def calls(*scores: list[float]) -> list[Scored]:
        return [Scored(choose, torch.tensor([s], dtype=torch.float64), {}) for s in scores]

    exact, near = calls([1.0, 2.0], [3.0, 4.0]), calls([1.0, 2.25], [3.0, 4.0])
    assert [float(m) for m in moved_by(exact, near)] == [0.25, 0.0]
    assert [float(m) for m in moved_by(exact, calls([9.0, 9.0]))] == [0.0, 0.0]


def test_a_jump_is_honest_only_where_another_choice_gives_it() -> None:
    size = NUM * LENGTH
    draw = np.random.default_rng(0)
    base, noise = draw.uniform(-4, -0.1, size), 1e-3 * draw.standard_normal((7, size))
    others = np.zeros((1, size))
    others[0, 5] = 0.5
    jump = np.zeros(size)
    jump[5] = 0.5

    def verdict(deviation: np.ndarray, causes: tuple[Cause, ...] = ()) -> Judgement:
        return judge(base + deviation, base, base + noise[1:], REPLIES, causes, others)

    found = verdict(noise[0] + jump)
    assert (found.verdict, found.ties) == ("aligned", 1)
    assert verdict(noise[0] + np.roll(jump, 1)).verdict == "diverged"
    assert verdict(noise[0] - jump).verdict == "diverged"
    shape = 3e-3 * draw.standard_normal(size)
    cause = Cause("known", "it is known", (shape + jump)[None], -others)  # it flips the router too
    assert verdict(noise[0] + shape, (cause,)).cause == "known"
