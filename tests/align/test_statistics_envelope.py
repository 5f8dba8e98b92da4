"""The envelope: its quantiles, its error rate by simulation, and where it must raise the alarm."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from glm_core.align import envelope as e
from glm_core.errors import TraceError

RNG = np.random.default_rng
N = 60


def curves(count: int, seed: int, amplitude: float = 1e-4) -> np.ndarray:
    """Draws deviations that grow like a random walk, one row per run."""
    return amplitude * RNG(seed).standard_normal((count, N)).cumsum(1)


REFERENCE = np.linspace(6, 4, N)


@pytest.mark.parametrize("freedom", [3, 5, 7, 20])
@pytest.mark.parametrize("probability", [0.9, 0.99, 0.9997])
def test_student_t_is_scipys(probability: float, freedom: int) -> None:
    expected = stats.t.ppf(probability, freedom)
    assert e.student_t(probability, freedom) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("k", [4, 8])
def test_prediction_bound_is_exceeded_at_the_chosen_rate(k: int) -> None:
    rng, rate, trials = RNG(k), 0.05, 4000
    draws = np.exp(3 + 0.5 * rng.standard_normal((trials, k + 1)))
    over = np.mean([d[-1] > e.prediction_bound(d[:-1], rate) for d in draws])
    assert 0.6 * rate < over < 1.4 * rate


@pytest.mark.parametrize("k", [4, 8])
def test_an_honest_curve_stays_inside(k: int) -> None:
    rate, alarms = 0.05, 0
    for seed in range(200):
        d = curves(k + 1, seed)
        alarms += (
            e.envelope(REFERENCE, REFERENCE + d[:-1], REFERENCE + d[-1], rate).first_step
            is not None
        )
    assert alarms <= 200 * 2 * rate


def test_a_single_wrong_step_is_found_and_named() -> None:
    candidate = REFERENCE + curves(1, 99)[0]
    candidate[41] += 0.1
    found = e.envelope(REFERENCE, REFERENCE + curves(8, 1), candidate, 1e-3)
    assert found.first_step == 42
    assert found.ratio[41] > 1 > np.delete(found.ratio, 41).max()


def test_what_is_not_finite_is_outside() -> None:
    candidate = REFERENCE.copy()
    candidate[30:] = np.nan
    found = e.envelope(REFERENCE, REFERENCE + curves(8, 1), candidate, 1e-3)
    assert found.first_step == 31
    assert np.isinf(found.ratio[30])


def test_controls_that_agree_to_the_bit_still_allow_the_losss_own_rounding() -> None:
    controls = np.tile(REFERENCE, (6, 1))
    candidate = REFERENCE * (1 + 1e-7)
    assert e.envelope(REFERENCE, controls, candidate, 1e-3).first_step is None
    assert e.envelope(REFERENCE, controls, REFERENCE * (1 + 1e-4), 1e-3).first_step == 1


def test_fewer_controls_give_a_wider_bound() -> None:
    controls = REFERENCE + curves(12, 3)
    few, many = (
        e.envelope(REFERENCE, c, REFERENCE, 1e-3).bound.mean() for c in (controls[:4], controls)
    )
    assert few > 1.5 * many


@pytest.mark.parametrize("fault", ["few", "infinite"])
def test_controls_that_say_nothing_are_refused(fault: str) -> None:
    controls = REFERENCE + curves(3 if fault == "few" else 8, 1)
    if fault == "infinite":
        controls[2, 5] = np.inf
    with pytest.raises(TraceError, match="controls=6" if fault == "few" else "not finite"):
        e.envelope(REFERENCE, controls, REFERENCE, 1e-3)


def test_error_bound_is_relative_to_the_honest_spread_and_has_a_floor() -> None:
    honest = 1e-3 * np.exp(0.1 * RNG(0).standard_normal((10, 3, 5)))
    bound = e.error_bound(honest, 1e-9, 1e-3)
    assert bound.shape == (3, 5)
    assert (honest < bound).all()
    assert (bound < 5e-3).all()
    assert e.error_bound(honest * 1e-6, 1e-3, 1e-3).min() >= 1e-3


@pytest.mark.parametrize("numbers", [False, True])
def test_losses_whose_errors_have_a_common_part_are_convicted_at_the_chosen_rate(
    numbers: bool,
) -> None:
    """At two of three steps all honest runs are off alike, at one they are not: the spread of the
    worst steps then says nothing about that one."""
    rng, rate, trials = RNG(0), 0.01, 2000
    common = np.array([3.0, 0.0, -3.0])
    over = 0
    for errors in np.abs(common + rng.standard_normal((trials, 11, 3))):
        over += (errors[0] > e.error_bound(errors[1:], 1e-9, rate, numbers)).any()
    assert over < 1.2 * rate * trials if numbers else over > 1.5 * rate * trials
