"""The statistics against their definitions, and their error rates by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_core.align import statistics
from glm_core.align.statistics import (
    CorrectResult,
    Grouping,
    critical_z,
    divergence,
    excess,
    quantile_bins,
    scores,
)

RNG = np.random.default_rng


BF16 = 2.0**-7
"""eps of bfloat16"""


def correct_result(shape: tuple[int, ...], seed: int = 0) -> CorrectResult:
    y = RNG(seed).standard_normal(shape)
    groupings = statistics.structure(shape)
    groupings.append(Grouping("bin", 4, 1, RNG(1).integers(0, 4, y.size).astype(np.uint8)))
    return CorrectResult(y.reshape(-1), groupings, 1e-4, BF16)


@given(shape=st.lists(st.integers(1, 5), min_size=0, max_size=4).map(tuple))
@settings(max_examples=40, deadline=None)
def test_groupings_partition_and_both_ways_of_summing_agree(shape: tuple[int, ...]) -> None:
    b, x = correct_result(shape), RNG(2).standard_normal(math.prod(shape))
    for g in b.groupings:
        at = np.arange(x.size)
        (dense,), (sparse,) = g.totals([x]), g.totals_at(at, [x])
        naive = [x[g.of(at) == i].sum() for i in range(g.groups)]
        np.testing.assert_allclose(dense, naive, atol=1e-12)
        np.testing.assert_allclose(sparse, naive, atol=1e-12)
        assert g.totals([np.ones(x.size)])[0].sum() == x.size


def test_structure_names_rows_channels_positions_and_heads() -> None:
    found = {g.name: g for g in statistics.structure((2, 3, 4, 5))}
    index = np.arange(120)
    b, position, head, channel = np.unravel_index(index, (2, 3, 4, 5))
    assert (found["position"].of(index) == position).all()
    assert (found["head"].of(index) == head).all()
    assert (found["channel"].of(index) == channel).all()
    assert (found["row"].of(index) == (b * 3 + position) * 4 + head).all()
    assert [g.name for g in statistics.structure(())] == ["all"]


@pytest.mark.parametrize("kind", ["normal", "heavy", "ties", "constant"])
def test_bins_order_the_key_and_are_about_equally_full(kind: str) -> None:
    x = RNG(0).standard_normal(40_000)
    key = {"heavy": x**3, "ties": np.round(x), "constant": x * 0}.get(kind, x)
    bins = quantile_bins(key)
    assert (np.diff(bins[np.argsort(key)].astype(int)) >= 0).all()
    if kind == "normal":
        assert 0.7 < np.bincount(bins, minlength=32).min() / (x.size / 32) < 1.05


@pytest.mark.parametrize("sparse", [False, True])
def test_effects_are_what_was_put_in(sparse: bool) -> None:
    b = correct_result((40, 50))
    touched = RNG(3).random(2000) < (0.1 if sparse else 1.1)
    error = np.where(touched, 1e-3 * b.y, 0.0)
    found = scores(statistics.sums(b, b.errors(b.y + error))[0], b.least)
    share = (b.y[touched] ** 2).sum() / (b.y**2).sum()
    assert found["scale"][0][0] == pytest.approx(1e-3 * share, rel=1e-6)
    assert found["size"][0][0] == pytest.approx(1e-3 * math.sqrt(share), rel=1e-6)
    shifted = scores(statistics.sums(b, b.errors(b.y + 0.01))[0], b.least)
    rms = math.sqrt((b.y**2).mean())
    assert shifted["offset"][0][0] == pytest.approx(0.01 / rms, rel=1e-6)


def sign(b: CorrectResult, result: np.ndarray) -> float:
    return float(scores(statistics.sums(b, b.errors(result))[0], b.least)["sign"][0][0])


def test_signs_count_where_few_elements_differ() -> None:
    b, at = correct_result((100, 100)), np.arange(0, 10_000, 50)

    def changed(elements: np.ndarray, by: float) -> float:
        result = b.y.copy()
        result[elements] *= 1 + by
        return sign(b, result)

    assert changed(at, 1e-2) == pytest.approx(1.0, abs=0.1)
    assert changed(at, -1e-2) == pytest.approx(-1.0, abs=0.1)
    assert changed(np.arange(0, 10_000, 4), 1e-2) == 0.0  # rounding twice is biased, honestly


def test_a_lean_is_seen_where_many_elements_differ() -> None:
    b = correct_result((100, 100))

    def lean(elements: np.ndarray, by: np.ndarray | float) -> float:
        result = b.y.copy()
        result[elements] *= 1 + by
        found, error = statistics.lean(statistics.sums(b, b.errors(result))[0])
        assert error[0] == pytest.approx(elements.size**-0.5)
        return float(found[0])

    many = np.arange(0, 10_000, 4)
    assert lean(many, 1e-2) == pytest.approx(1.0, abs=0.1)
    assert abs(lean(many, RNG(1).choice([-1e-2, 1e-2], many.size))) < 0.05
    assert lean(np.arange(0, 10_000, 50), 1e-2) == 0.0  # the signs' own test sees these


@pytest.mark.parametrize("leans", [1, 8])
def test_signs_allow_what_a_lean_of_the_scales_floor_flips(leans: int) -> None:
    exact = RNG(0).standard_normal(400_000)
    exact[::2] *= 0.1
    rms = math.sqrt((exact**2).mean())

    def rounded(x: np.ndarray) -> np.ndarray:
        gap = np.ldexp(BF16, np.frexp(np.abs(x))[1] - 1)
        return np.asarray(np.round(x / gap) * gap)

    y = rounded(exact)
    b = CorrectResult(y, statistics.structure(y.shape)[:1], 0.03, BF16)
    lean = leans * statistics.FLOOR * (np.abs(exact) + rms) * np.sign(exact)
    found = sign(b, rounded(exact + lean))
    assert found < 0.15 if leans == 1 else found > 0.7


def test_sums_add_up_over_calls() -> None:
    a, b = correct_result((30, 8), 4), correct_result((30, 8), 5)
    errors = [x.errors(x.y * (1 + 1e-3)) for x in (a, b)]
    pooled = statistics.sums(a, errors[0])[0] + statistics.sums(b, errors[1])[0]
    y = np.concatenate((a.y, b.y))
    both = CorrectResult(y, statistics.structure((60, 8)), 1e-4, BF16)
    whole = statistics.sums(both, np.concatenate(errors))[0]
    for name in (n for n in pooled.__slots__ if not n.endswith("_calls")):
        rtol = 0.01 if name == "explained" else 1e-7  # each call's own root mean square
        np.testing.assert_allclose(getattr(pooled, name), getattr(whole, name), rtol)


@pytest.mark.parametrize("repeats", [1, 66])
def test_equal_rows_are_one_error_and_not_many(repeats: int) -> None:
    y = np.repeat(RNG(0).standard_normal((60, 8)), repeats, 0)
    b = CorrectResult(y.reshape(-1), statistics.structure(y.shape)[:1], 1e-4, BF16, 8)
    wrong = y.copy()
    wrong[: 20 * repeats, 3] *= 1 + BF16
    found = scores(statistics.sums(b, b.errors(wrong.reshape(-1)))[0], b.least)
    for name in ("scale", "offset", "sign"):
        effect, error = found[name]
        assert abs(effect[0] / error[0]) <= math.sqrt(20) + 1e-9
    assert abs(found["scale"][0][0] / found["scale"][1][0]) > 2


def test_calls_that_lean_to_opposite_sides_do_not_cancel() -> None:
    calls = [correct_result((30, 8), seed) for seed in range(4)]
    leans = [1e-3 * (-1) ** i for i in range(4)]
    pairs = zip(calls, leans, strict=True)
    one, *others = [statistics.sums(c, c.errors(c.y * (1 + lean)))[0] for c, lean in pairs]
    pooled = sum(others, one)
    assert abs(scores(pooled, 1e-4)["scale"][0][0]) < 1e-4
    assert statistics.spread(pooled, 1e-4)["scale"][0] == pytest.approx(5e-4, rel=0.1)
    assert statistics.spread(one, 1e-4)["scale"][0] == pytest.approx(1e-3, rel=0.1)


def test_what_is_not_finite_or_of_another_shape_is_as_wrong_as_can_be() -> None:
    b = correct_result((4, 4))
    bad = b.y.copy()
    bad[3] = np.nan
    assert b.errors(bad)[3] == 1e30
    assert (b.errors(b.y[:5]) == 1e30).all()


def test_small_groups_are_measured_against_the_tensor() -> None:
    y = np.ones((10, 10))
    y[3] = 1e-9
    b = CorrectResult(y.reshape(-1), statistics.structure(y.shape), 0.03)
    rows = next(i for i, g in enumerate(b.groupings) if g.name == "row")
    s = statistics.sums(b, b.errors(y.reshape(-1) + 1e-9))[rows]
    assert scores(s, b.least)["size"][0].max() < 1e-7
    assert scores(s, 1e-12)["size"][0].max() > 0.9


@pytest.mark.parametrize("terms", [1, 2, 5, 30, 1000])
@pytest.mark.parametrize("sizes", ["equal", "heavy"])
def test_critical_z_keeps_its_rate_for_any_number_of_terms(terms: int, sizes: str) -> None:
    rng, rate = RNG(terms), 0.05
    d = np.ones((20_000, terms)) if sizes == "equal" else rng.standard_cauchy((20_000, terms))
    d *= rng.choice([-1.0, 1.0], d.shape)
    z = d.sum(1) / np.sqrt((d**2).sum(1))
    assert (np.abs(z) > critical_z(rate, 1)).mean() <= rate


@pytest.mark.parametrize(
    "copies", [[1] * 20, [5] * 6, [7, 4, 4, *[1] * 12]], ids=["20", "6x5", "mixed"]
)
def test_a_share_of_signs_is_as_rare_as_its_bound_says(copies: list[int]) -> None:
    total, squares = sum(copies), sum(c * c for c in copies)
    chance = np.ones(1)  # of each sum of signs, exactly
    for c in copies:
        chance = np.convolve(chance, [0.5, *[0.0] * (2 * c - 1), 0.5])
    at_least = chance[::-1].cumsum()[::-1]
    share = np.arange(-total, total + 1) / total
    bound = np.exp(-divergence(np.abs(share), 0.0) * total**2 / squares)
    assert (at_least <= bound + 1e-12)[share > 0].all()
    assert bound[-1] == pytest.approx(2.0 ** -(total**2 / squares))  # Hoeffding's is e^-(n / 2)


def test_the_smallest_share_that_shows_as_much() -> None:
    error = np.array([41**-0.5])
    (low,) = statistics.lower_bound(np.array([0.967]), error, 4.0, share=True)
    assert 41 * divergence(np.array([0.967]), low) == pytest.approx(8.0, rel=1e-5)
    assert 0.967 - 4 * error[0] < 0.5 < low  # four standard errors know less
    assert statistics.lower_bound(np.array([0.3]), error, 4.0, share=True) == 0


def test_signs_alone_need_31_that_agree() -> None:
    def ratio(projection: str, signs: int) -> float:
        z = critical_z(1e-3 / 3, 300_000)
        values = np.array([[1.0, signs**-0.5, 0.5]])
        return float(statistics.ratios_of([projection], values, z)[0])

    assert ratio("sign in row 3", 30) < 1 < ratio("sign in row 3", 31)
    assert ratio("scale in row 3", 42) < 1
    both = np.array([[1e-3, 0.0, 1e-4], [math.nan, 0.1, 0.5]])
    assert statistics.ratios_of(["size", "sign"], both, 6.0).tolist() == [
        pytest.approx(10),
        math.inf,
    ]


def test_critical_z_pays_for_the_number_of_tests() -> None:
    assert critical_z(1e-3, 1) == pytest.approx(math.sqrt(2 * math.log(2000)))
    assert critical_z(1e-3, 10**6) == pytest.approx(math.sqrt(2 * math.log(2e9)))


def test_guilt_needs_significance_and_an_effect_beyond_the_benign_range() -> None:
    def ratio(effect: float, error: float, limit: float) -> float:
        return float(excess(np.array([effect]), np.array([error]), limit, 6.0)[0])

    assert ratio(1e-3, 1e-5, 1e-4) > 1
    assert ratio(1e-3, 1e-5, 2e-3) < 1  # significant, but benign changes do as much
    assert ratio(1e-3, 2e-4, 1e-4) < 1  # large, but five standard errors are not six
    assert ratio(1e-3, 0.0, 1e-4) == pytest.approx(10)  # sizes have no standard error
