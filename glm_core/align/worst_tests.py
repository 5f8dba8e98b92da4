"""Chooses from many scores the test of each family that is furthest outside, and names it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from glm_core.align import statistics, teacher_forcing
from glm_core.align.teacher_forcing import Case, Key, Measures
from glm_core.align.trace_format import OpResult, OpTest

Array = NDArray[np.float64]
CRITICAL = statistics.critical_z(1e-3, 1_000_000)
"""standard errors that are left out when tests are compared with each other"""
MAX_SUSPECTS, MAX_MEASURED = 2, 12
"""calls outside whose own range is measured: of an op at a time, and in all"""


def op_result(case: Case, tensor: str) -> OpResult:
    """Names one result of the case's call."""
    call = case.call
    direction = "backward" if tensor.startswith("d_") else "forward"
    return {
        "step": call.step,
        "call": call.index,
        "op": call.op.name,
        "layer": call.layer,
        "direction": direction,
        "tensor": tensor,
    }


def with_tests(taught: dict[str, Any], tests: list[Any], values: list[Any]) -> dict[str, Any]:
    """Returns a trace's fields of teacher forcing with further tests, and their effect, standard
    error and limit [T, 3]."""
    return taught | {
        "tests": [*taught["tests"], *tests],
        "test_values": np.concatenate((taught["test_values"], np.reshape(values, (-1, 3)))),
    }


def worst_tests(
    measured: Measures, cases: list[Case], limits: dict[Key, float]
) -> tuple[list[OpTest], Array]:
    """Returns the test of each family (`Key`) that is furthest outside its benign range, and its
    effect, standard error and limit [T, 3]."""
    worst: dict[Key, tuple[float, OpTest, list[float]]] = {}
    by_result = {(c.call.op.name, tensor): c for c in cases for tensor in c.dtypes}
    terms = {id(case): case.terms for case in cases}
    tested = list(measured.by_statistic())
    # pooled: any case has the dtype and shape
    of = [case or by_result[key.op, key.tensor] for key, _, _, case in tested]
    limits_of = [
        teacher_forcing.limit(limits, key, case.dtypes[key.tensor], terms[id(case)])
        for (key, *_), case in zip(tested, of, strict=True)
    ]
    limit_array = np.array(limits_of)

    def excess(effect: Array, error: Array, family: Any, of_signs: NDArray[np.bool_]) -> Array:
        return statistics.excess(effect, error, limit_array[family], CRITICAL, share=of_signs)

    excesses = teacher_forcing.at_once(tested, excess)
    for (key, effect, error, _), case, limit, outside in zip(
        tested, of, limits_of, excesses, strict=True
    ):
        dtype = case.dtypes[key.tensor]
        group = int(np.argmax(outside))
        if key in worst and worst[key][0] >= outside[group]:
            continue
        test: OpTest = {
            **op_result(case, key.tensor),
            "dtype": str(dtype).removeprefix("torch."),
            "shape": list(case.shapes[key.tensor]),
            "projection": _projection(key, group),
        }
        if key.pooled:
            test |= {"step": 0, "call": -1, "layer": ""}
        values = [float(effect[group]), float(error[group]), limit]
        worst[key] = (float(outside[group]), test, values)
    tests = [test for _, test, _ in worst.values()]
    return tests, np.array([values for _, _, values in worst.values()]).reshape(-1, 3)


def fair_tests(
    measured: Measures, cases: list[Case], limits: dict[Key, float]
) -> tuple[list[OpTest], Array]:
    """Returns the worst tests after the benign range of what is outside was measured on these very
    calls: `limits` come from a sample of the calls, and honest kernels may do more on another. What
    all calls show together keeps its limit, except for shares of signs: of few roundings a sample
    shows no share at all."""
    limits, seen = dict(limits), set[tuple[int, int]]()
    results = {d for c in cases for d in c.dtypes.values() if d.is_floating_point}
    dtype = min(results, key=lambda d: d.itemsize, default=torch.float32)  # the working dtype
    by_place = {(c.call.step, c.call.index): c for c in cases}
    while True:
        tests, values = worst_tests(measured, cases, limits)
        suspects: dict[str, list[Case]] = {}
        for test in outside_first(tests, values):
            place = (test["step"], test["call"])
            of_op = suspects.setdefault(test["op"], [])
            if test["call"] >= 0 and place not in seen and len(of_op) < MAX_SUSPECTS:
                seen.add(place)
                of_op.append(by_place[place])
        chosen = [case for of_op in suspects.values() for case in of_op]
        if not chosen or len(seen) > MAX_MEASURED:
            break
        own = teacher_forcing.benign_limits(chosen, dtype)
        for key, value in own.items():
            if not key.pooled:
                limits[key] = max(value, limits.get(key, 0.0))
    if ops := _guilty_by_shares_alone(tests, values):
        chosen = [case for case in cases if case.call.op.name in ops]
        for key, value in teacher_forcing.benign_limits(chosen, dtype, sampled=False).items():
            if key.pooled and key.statistic in statistics.SHARES:
                limits[key] = max(value, limits.get(key, 0.0))
        tests, values = worst_tests(measured, cases, limits)
    return tests, values


def _guilty_by_shares_alone(tests: list[OpTest], values: Array) -> set[str]:
    """Returns the ops of which nothing is outside but signs of all calls together."""
    outside = outside_first(tests, values)
    shares = [t for t in outside if t["call"] < 0 and t["projection"].startswith(statistics.SHARES)]
    return {t["op"] for t in shares} - {t["op"] for t in outside if t not in shares}


def outside_first(tests: list[OpTest], values: Array) -> list[OpTest]:
    """Returns the tests outside their limit, the furthest first."""
    ratios = statistics.ratios_of([test["projection"] for test in tests], values, CRITICAL)
    order = sorted(range(len(tests)), key=lambda i: -ratios[i])
    return [tests[i] for i in order if ratios[i] > 1]


def _projection(key: Key, group: int) -> str:
    """Returns the statistic and its group: `scale`, `offset in row 7`, `sign in bin of half 1 12,
    all calls`."""
    where = "" if key.grouping == "all" else f" in {key.grouping} {group}"
    return key.statistic + where + (", all calls" if key.pooled else "")
