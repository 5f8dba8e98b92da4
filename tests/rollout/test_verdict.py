"""The verdict on rollouts, from numbers alone: honest noise is acquitted, and each kind of
deviation is convicted by the test that is made for it."""

from __future__ import annotations

import numpy as np
import pytest

from glm_core.rollout.causes import Cause, fit
from glm_core.rollout.distribution import Draws
from glm_core.rollout.files import Reply
from glm_core.rollout.verdict import figures, judge

NUM, LENGTH, NOISE = 32, 12, 1e-3
REPLIES = [
    Reply(tuple(range(5 + i)), tuple(range(LENGTH)), (-1.0,) * LENGTH, step=i // 16, cached=i % 2)
    for i in range(NUM)
]
BASE = np.random.default_rng(0).uniform(-4, -0.1, NUM * LENGTH)


NO_TIES = np.zeros((0, BASE.size))


def noise(seed: int, size: int = 1) -> np.ndarray:
    return NOISE * np.random.default_rng(seed).standard_normal((size, BASE.size))


def verdict(deviation: np.ndarray, causes: tuple[Cause, ...] = (), drawn: Draws | None = None):
    controls = BASE + noise(1, 6)
    return judge(BASE + deviation, BASE, controls, REPLIES, causes, drawn=drawn)


@pytest.mark.parametrize("seed", range(2, 12))
def test_honest_noise_is_acquitted(seed: int) -> None:
    assert verdict(noise(seed)[0]).verdict == "aligned"


def test_no_deviation_is_identical() -> None:
    assert verdict(np.zeros(BASE.size)).verdict == "identical"


@pytest.mark.parametrize(
    ("deviation", "statistic"),
    [
        pytest.param(noise(2)[0] * 3, "size", id="three-times-the-noise"),
        pytest.param(noise(2)[0] + NOISE, "lean", id="a-lean-of-one-standard-deviation"),
        pytest.param(
            np.where(np.arange(BASE.size) == 77, 0.1, noise(2)[0]), "peak", id="one-token"
        ),
    ],
)
def test_each_kind_of_deviation_has_its_test(deviation: np.ndarray, statistic: str) -> None:
    found = verdict(deviation)
    assert found.verdict == "diverged"
    assert statistic in {t.statistic for t in found.tests}


def test_a_deviation_of_some_replies_alone_names_their_group_and_beginning() -> None:
    late = np.repeat([r.step == 1 for r in REPLIES], LENGTH)
    found = verdict(noise(2)[0] + late * 0.02)
    assert found.begins.startswith("step 1, place")
    assert any(t.group == "step, part 1" for t in found.tests)
    assert not any(t.group == "step, part 0" for t in found.tests)


def test_a_mistake_below_the_noise_is_found_by_its_likeness() -> None:
    shape = np.random.default_rng(5).standard_normal(BASE.size) * NOISE
    cause = Cause("known", "it is known", shape[None], NO_TIES)
    found = verdict(noise(2)[0] + shape, (cause,))
    assert (found.verdict, found.cause) == ("diverged", "known")
    assert verdict(noise(2)[0], (cause,)).verdict == "aligned"
    assert verdict(noise(2)[0] + shape).verdict == "aligned"


def test_the_parameter_lies_between_two_rows() -> None:
    rows, zero = np.outer([1.0, 2.0, 3.0], np.ones(4)), np.zeros((0, 4))
    found = fit(
        Cause("c", "", rows, zero, (10.0, 20.0, 30.0), between=True), np.full(4, 2.25), zero
    )
    assert found.value == pytest.approx(22.5)
    assert fit(Cause("c", "", rows, zero, (10.0, 20.0, 30.0)), np.full(4, 2.25), zero).value == 20.0


def test_tokens_that_are_no_draws_are_convicted() -> None:
    found = verdict(noise(2)[0], drawn=Draws(9.0, 0.0))
    assert (found.verdict, found.cause) == ("diverged", "draws")
    assert verdict(noise(2)[0], drawn=Draws(2.0, -2.0)).verdict == "aligned"


def test_the_figures_are_those_of_their_formulas() -> None:
    trainer, sampler = np.log([0.5, 0.25, 0.2]), np.log([0.4, 0.25, 0.3])
    found = figures(
        trainer, sampler, [Reply((1,), (2, 3), (-1.0, -1.0)), Reply((1,), (2,), (-1.0,), 7)]
    )
    r = np.array([1.25, 1.0, 2 / 3])
    assert found.k1 == pytest.approx(-np.log(r).mean())
    assert found.k3 == pytest.approx((r - 1 - np.log(r)).mean())
    assert found.ratio[0] == pytest.approx(2 / 3)
    assert found.ratio[-1] == pytest.approx(1.25)
    assert found.equal == pytest.approx(1 / 3)
    assert found.by_step[7] == pytest.approx(-np.log(2 / 3))
