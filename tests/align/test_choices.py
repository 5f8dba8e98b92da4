"""Under teacher forcing a router's choice is judged by its margins."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import toy
from torch import Tensor

from glm_core import ops
from glm_core.align import choices, teacher_forcing
from glm_core.align.capture import Call
from glm_core.align.envelope import error_bound
from glm_core.align.gradients import exact_gradients, gradient_errors
from glm_core.align.replay import CHOSEN, exact, replay
from glm_core.align.training import Run, Snapshot
from glm_core.faults import kernels
from glm_core.faults.catalogue import FAULTS
from glm_core.training.parallel import initial_weights

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
    swap = torch.arange(len(a["weight"]))
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
        if key.statistic in ("peak", "differ")
    )
    assert worst > 100 if mutant else worst <= 1


@pytest.mark.parametrize("groups", [(1, 1), (4, 2)])
def test_rounding_is_expected_to_flip_a_few_rows_in_a_million(groups: tuple[int, int]) -> None:
    case = call()
    case.args |= {"groups": groups[0], "top_groups": groups[1]}
    found = choices.flips(case, replay(case, ops.route.reference)[CHOSEN].long())
    assert found.seen == 0
    assert 0.1 < 1e6 * found.expected / found.rows < 100


def differing(items: list[teacher_forcing.Case], kernel: Any) -> dict[str, float]:
    """Returns the share that differs of each result that is whole numbers."""
    measured, _ = teacher_forcing.measure(items, lambda c: replay(c, kernel))
    scores = [(k, e) for k, e, _, _ in measured.by_statistic() if k.statistic == "differ"]
    return {key.tensor: float(effect[0]) for key, effect in scores}


def test_a_choice_without_an_expert_is_wrong_and_stays() -> None:
    def lost(**a: Any) -> tuple[Tensor, Tensor]:
        experts, weights = ops.route.reference(**a)
        return experts.index_fill(0, torch.tensor([3]), -1), weights

    items = list(teacher_forcing.cases([call()]))
    assert differing(items, ops.route.reference) == {"y0": 0.0}
    assert differing(items, lost) == {"y0": 1 / N}


def test_an_order_and_counts_must_be_exact() -> None:
    g = torch.Generator().manual_seed(0)
    args = {"x": torch.randn(N, 4, generator=g), "num_experts": X}
    args["experts"] = torch.randint(0, X, (N, 2), generator=g)
    sorting = Call(op=ops.permute, index=0, layer="0", step=1, args=args, output_gradients=[])

    def two_exchanged(**a: Any) -> tuple[Tensor, Tensor, Tensor]:
        rows, order, counts = ops.permute.reference(**a)
        order[:2] = order[:2].flip(0)
        return rows, order, counts

    items = list(teacher_forcing.cases([sorting]))
    assert differing(items, ops.permute.reference) == {"y1": 0.0, "y2": 0.0}
    assert differing(items, two_exchanged) == {"y1": 2 / (2 * N), "y2": 0.0}


def test_float64_follows_the_choice_of_a_step() -> None:
    config = toy.config(toy.SPARSE, ramp_from=0)
    weights = initial_weights(config)
    for name, w in weights.items():
        if name.endswith("router.weight"):
            w[1] = w[0]  # experts 0 and 1 score alike: either is honest, and they differ
    snapshot = Snapshot(1, weights, [toy.Sampler().next(2) for _ in range(3)])
    oracle = [exact_gradients(config, snapshot)]
    swapping = Run(config, toy.Sampler(), kernels.backend("swapping", {"route": exchanged}))
    plain = gradient_errors(Run(config, toy.Sampler(), "reference"), [snapshot], oracle)
    found = gradient_errors(swapping, [snapshot], oracle)
    assert found.moved[0] > 10
    assert found.gradient.max() < 5 * plain.gradient.max() < 1e-4
    _, gradients = swapping.gradients(snapshot.batches)
    name = "blocks.1.mlp.experts_up.weight"
    right = oracle[0].gradients[name]
    assert (gradients[name] - right).norm() > 0.1 * right.norm()


def test_a_few_moved_tokens_are_honest_where_no_disguise_moved_one() -> None:
    from glm_core.align.verdict import FALSE_ALARM_RATE, FEW

    bound = error_bound(np.zeros((10, 3)), FEW, FALSE_ALARM_RATE / 9)
    assert 3 < bound.min() <= bound.max() < 12
