"""Conformance judges a choice by its margin: another one is right within rounding alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from glm_core import ops
from glm_core.conformance.case import Case
from glm_core.conformance.check import judge
from glm_core.errors import ShapeError
from glm_core.faults.kernels import backend
from glm_core.spec import Sample, exact, normal


def two_best(gap: float) -> Sample:
    """Returns a sample whose expert 2 scores best, and expert 3 a `gap` less."""
    rows = [[0.0, 0.0], [0.5, 0.0], [1.0, 1.0 + gap], [1.0, 1.0]]
    x = exact([[1.0, 0.5], [2.0, 1.0], [0.5, 0.25]], torch.float32)
    weight, bias = exact(rows, torch.float64), normal(4, std=0.0, wide=True)
    to_float: Any = lambda draw: weight(draw).to(torch.float32)  # noqa: E731
    return Sample("two-best", {"x": x, "weight": to_float, "bias": bias, "top_k": 1})


def second_best(x: Tensor, weight: Tensor, bias: Tensor, top_k: int, **a: Any) -> Any:
    """Chooses expert 3 where expert 2 is the best."""
    assert ops.route.choice is not None
    experts = torch.full((len(x), top_k), 3)
    return ops.route.choice.given(experts, x=x, weight=weight, **a)


@pytest.mark.parametrize("mode", ["test", "grad"])
@pytest.mark.parametrize(("gap", "honest"), [(1.2e-7, True), (1e-4, False)])
def test_a_choice_is_judged_by_its_margin(mode: str, gap: float, honest: bool) -> None:
    case = Case(ops.route, two_best(gap), torch.float32, mode)
    right = ops.route.reference(**case.sample.make(torch.float32))[0]
    assert right.tolist() == [[2]] * 3
    judgement = judge(case, backend("second", {"route": second_best}))
    assert judgement.passed is honest
    assert honest or "row" in judgement.reason


def short(scores: list[float], chosen: list[int], groups: int = 1, top_groups: int = 1) -> float:
    table = torch.tensor([scores], dtype=torch.float64)
    slack = torch.full_like(table, 0.01)
    picked = torch.tensor([chosen])
    return float(ops.routing.shortfall(table, slack, picked, len(chosen), groups, top_groups))


def test_shortfall_by_hand() -> None:
    assert short([0.5, 0.3, 0.1], [0, 1]) == 0
    assert short([0.5, 0.49, 0.1], [1, 0]) == pytest.approx(0.5)
    assert short([0.5, 0.3, 0.1], [0, 2]) == pytest.approx(10)
    assert short([0.5, 0.5, 0.1], [1]) == math.inf  # a tie goes to the lower index
    assert short([0.5, 0.3, 0.1], [0, 0]) == math.inf


def test_shortfall_of_groups() -> None:
    kept, dropped = [0.5, 0.4, 0.9, 0.1], [0.5, 0.4, 0.6, 0.1]  # groups of two: 0.9 and 1.0; 0.7
    assert short(kept, [2], 2, 1) == 0
    assert short(kept, [0], 2, 1) == math.inf
    assert short(dropped, [0], 2, 1) == 0
    assert short([0.5, 0.4, 0.87, 0.02], [2], 2, 1) == 0  # within rounding of the other group
    assert short([0.5, 0.4, 0.87, 0.02], [0], 2, 1) == 0


@pytest.mark.parametrize(
    ("top_k", "groups", "top_groups", "words"),
    [
        (9, 1, 1, "top_k must be 1 ... 8"),
        (0, 1, 1, "top_k must be 1 ... 8"),
        (5, 4, 2, "top_k must be 1 ... 4, the experts in 2 of 4 groups; received 5"),
        (2, 3, 1, "groups=3 must divide the 8 experts"),
        (2, 4, 5, "top_groups must be 1 ... groups=4; received 5"),
    ],
)
def test_a_choice_that_cannot_be_made_says_why(
    top_k: int, groups: int, top_groups: int, words: str
) -> None:
    with pytest.raises(ShapeError, match=words):
        ops.route(torch.randn(2, 4), torch.randn(8, 4), torch.zeros(8), top_k, groups, top_groups)


def test_counts_that_do_not_fit_say_so() -> None:
    with pytest.raises(ShapeError, match=r"2 experts and 3 rows .* 2 counts with sum 4"):
        ops.grouped_linear(torch.ones(3, 2), torch.ones(2, 2, 2), torch.tensor([1, 3]))
