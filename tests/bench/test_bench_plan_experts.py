"""Checks the arithmetic of the bench of sparse predictions. Times themselves are never tested."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from glm_core.backends.registry import probe
from glm_core.bench import plan_experts
from glm_core.planner import cluster
from glm_core.planner.this_machine import READ, SIDE

pytestmark = pytest.mark.skipif(not probe("cpu").ok, reason=probe("cpu").reason)


def test_factors_come_from_dense_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    here = cluster.preset("CPU", 1)
    planted = np.array([1.5, 2.5, 1e-3])

    def timed(calls: Any, rounds: int) -> dict[str, float]:
        seconds = {"product": 2.0 * SIDE**3 / here.peak, "read": READ / here.memory_bandwidth}
        for name, step in plan_experts.dense().items():
            seconds[name] = float(plan_experts.nominal(*step, here) @ planted)
        for name, step in plan_experts.sparse().items():  # twice as long as dense ones suggest
            seconds[name] = 2 * float(plan_experts.nominal(*step, here) @ planted)
        assert list(seconds) == list(calls)
        return seconds

    monkeypatch.setattr(plan_experts, "alone_step", lambda model, batch: lambda: None)
    monkeypatch.setattr(plan_experts, "cpu_seconds", timed)
    found = plan_experts.measure(1)
    assert [*found["factors"].values()] == pytest.approx(planted.tolist(), rel=1e-6)
    assert found["median_abs_error_dense"] == pytest.approx(0, abs=1e-9)
    assert found["median_abs_error_sparse"] == pytest.approx(0.5)
    assert {row["step"] for row in found["rows"] if row["error"] < -0.4} == {*plan_experts.sparse()}
