"""Under teacher forcing a router's choice is judged by its margins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from glm_core import ops
from glm_core.align import choices, teacher_forcing
from glm_core.align.capture import Call
from glm_core.align.replay import CHOSEN, exact, replay
from glm_core.faults.catalogue import FAULTS

N, X = 512, 16
WRONG = {f.mutant: f for f in FAULTS if f.op == "route"}


def call(near: bool = False) -> Call:
    """Returns a call; if `near`, expert 1 of each token scores as expert 0 to 1e-8."""
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(N, 24, generator=g), torch.randn(X, 24, generator=g) * 0.2
    bias = torch.randn(X, generator=g) * 0.1
    if near:
        weight[1], bias[1] = weight[0], bias[0]
        weight[1, 0].nextafter_(torch.tensor(9.0))
    args = {"x": x, "weight": weight, "bias": bias, "top_k": 4, "groups": 1}
    args |= {"top_groups": 1, "scale": 1.8, "normalize": True}
    gradients = [None, torch.randn(N, 4, generator=g)]
    return Call(op=ops.route, index=0, layer="0", step=1, args=args, output_gradients=gradients)


def exchanged(**a: Any) -> tuple[Tensor, Tensor]:
    """Chooses expert 1 where the reference chooses expert 0, and the other way round."""
    experts, _ = ops.route.reference(**a)
    swap = torch.arange(X)
    swap[:2] = torch.tensor([1, 0])
    assert ops.route.choice is not None
    given: tuple[Tensor, Tensor] = ops.route.choice.given(swap[experts], **a)
    return given


def test_an_honest_flip_is_settled_and_a_wrong_one_stays() -> None:
    near, apart = call(near=True), call()
    for case, honest in ((near, True), (apart, False)):
        results = replay(case, exchanged)
        right = exact(case, results)
        found = choices.flips(case, results[CHOSEN].long())
        assert found.seen > 50
        assert bool(found.wrong.any()) is not honest
        settled = choices.settled(case, results)
        assert torch.equal(settled[CHOSEN], right[CHOSEN]) is honest
        for name in ("y1", "d_x", "d_weight"):
            close = (settled[name] - right[name]).abs().max() < 1e-4
            assert bool(close)


@pytest.mark.parametrize("mutant", ["", "bfloat16_logits", "bias_in_weights", "not_normalised"])
def test_a_router_in_bfloat16_is_convicted_and_the_reference_is_not(mutant: str) -> None:
    items = list(teacher_forcing.cases([call()]))
    limits = teacher_forcing.benign_limits(items, torch.float32)
    kernel = WRONG[mutant].kernels()["route"] if mutant else ops.route.reference
    measured, _ = teacher_forcing.measure(items, lambda c: replay(c, kernel))
    worst = max(
        float(abs(effect).max())
        / teacher_forcing.limit(limits, key, torch.float32, case.terms if case else 1)
        for key, effect, _, case in measured.by_statistic()
        if key.statistic == "peak"
    )
    assert worst > 100 if mutant else worst <= 1


def test_rounding_is_expected_to_flip_a_few_rows_in_a_million() -> None:
    found = choices.flips(call(), replay(call(), ops.route.reference)[CHOSEN].long())
    assert found.seen == 0
    assert 0.1 < choices.per_million(found.rows, found.expected) < 100
